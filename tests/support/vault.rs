//! Where backups go: a directory of LTX files, and a real server that keeps one as the protocol of
//! LiteFS Cloud says. Written without the code under test, but for the format of the files.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Cursor, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use ltx::{Checksum, Compression, Encoder, Header, NodeId, PageSize, Pgno, Pos, Txid};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::node::free_address;
use super::wait;

/// What the server wants to be shown.
pub const TOKEN: &str = "cluster secret";
/// The cluster it is asked for.
pub const CLUSTER: &str = "my cluster";

/// A directory of LTX files: `PATH/NAME/MIN-MAX.ltx`.
#[derive(Clone)]
pub struct Vault(Arc<tempfile::TempDir>);

impl Vault {
    /// An empty one.
    pub fn new() -> Vault {
        Vault(Arc::new(tempfile::tempdir().unwrap()))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The directory of one database.
    pub fn dir(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// The files of one database, in their order.
    pub fn files(&self, name: &str) -> Vec<(Txid, Txid, PathBuf)> {
        let entries = fs::read_dir(self.dir(name)).into_iter().flatten();
        let parse = |entry: std::io::Result<fs::DirEntry>| {
            let path = entry.unwrap().path();
            let (min, max) = ltx::parse_file_name(path.file_name()?.to_str()?)?;
            Some((min, max, path))
        };
        let mut files: Vec<_> = entries.filter_map(parse).collect();
        files.sort();
        files
    }

    /// Where the backup of a database stands; zero if there is none.
    pub fn pos(&self, name: &str) -> Pos {
        self.files(name).last().map_or(Pos::ZERO, |(_, _, path)| verified(path).1)
    }

    /// Waits until the backup stands at `pos`.
    #[track_caller]
    pub fn wait_for_pos(&self, name: &str, pos: Pos) {
        wait::until_or(
            || format!("backup of {name} at {pos}; it stands at {}", self.pos(name)),
            || (self.pos(name) == pos).then_some(()),
        );
    }

    /// The database file that the files lead to: each verifies and goes on from the one before, and the
    /// pages have the checksum of the last.
    #[track_caller]
    pub fn database(&self, name: &str) -> Vec<u8> {
        let mut database = Cursor::new(Vec::new());
        let (mut at, mut page_size) = (Pos::ZERO, None);
        for (_, _, path) in self.files(name) {
            let (header, pos) = verified(&path);
            assert_eq!(header.pre_pos(), at, "{} does not go on", path.display());
            if page_size.replace(header.page_size).is_some_and(|size| size != header.page_size) {
                database = Cursor::new(Vec::new());
            }
            ltx::apply(reader(&path), &mut database).unwrap();
            at = pos;
        }
        let bytes = database.into_inner();
        let page_size = page_size.expect("a backup");
        let pages = bytes.chunks(page_size.bytes()).zip(1..).map(|(page, pgno)| (Pgno(pgno), page));
        let sum = pages
            .filter(|(pgno, _)| *pgno != page_size.lock_pgno())
            .fold(Checksum::EMPTY, |sum, (pgno, page)| sum.toggle(ltx::page_checksum(pgno, page)));
        assert_eq!(sum, at.checksum, "the backup leads to other pages");
        bytes
    }

    /// Somebody sets the backup of a database to other content, `transactions` later.
    pub fn set(&self, name: &str, database: &[u8], transactions: u64) -> Pos {
        let at = self.pos(name);
        let stored = u16::from_be_bytes([database[16], database[17]]);
        let page_size = PageSize::new(u32::from(stored)).unwrap();
        let header = Header {
            compression: Compression::None,
            page_size,
            commit: (database.len() / page_size.bytes()) as u32,
            min_txid: at.txid.next(),
            max_txid: Txid(at.txid.0 + transactions),
            timestamp_ms: 1,
            pre_apply: at.checksum,
            wal_offset: 0,
            wal_size: 0,
            wal_salt1: 0,
            wal_salt2: 0,
            node_id: NodeId(0),
        };
        let path = self.dir(name).join("set.tmp");
        fs::create_dir_all(self.dir(name)).unwrap();
        let mut encoder =
            Encoder::new(BufWriter::new(File::create(&path).unwrap()), header).unwrap();
        let mut post = Checksum::EMPTY;
        for (page, pgno) in database.chunks(page_size.bytes()).zip(1..) {
            post = post.toggle(encoder.page(Pgno(pgno), page).unwrap());
        }
        encoder.finish(post).unwrap().0.flush().unwrap();
        let target = ltx::file_name(header.min_txid, header.max_txid);
        fs::rename(&path, self.dir(name).join(target)).unwrap();
        Pos { txid: header.max_txid, checksum: post }
    }

    /// A snapshot of all files of a database.
    fn snapshot(&self, name: &str) -> Vec<u8> {
        let inputs = self.files(name).into_iter().map(|(_, _, path)| reader(&path)).collect();
        let mut out = Vec::new();
        ltx::compact(inputs, &mut out, Compression::Lz4).unwrap();
        out
    }

    fn take(&self, name: &str, file: &[u8]) -> Result<Pos, Pos> {
        let (header, trailer) = ltx::verify(file).unwrap();
        let at = self.pos(name);
        if header.pre_pos() != at {
            return Err(at);
        }
        fs::create_dir_all(self.dir(name)).unwrap();
        let path = self.dir(name).join("taken.tmp");
        fs::write(&path, file).unwrap();
        let target = ltx::file_name(header.min_txid, header.max_txid);
        fs::rename(&path, self.dir(name).join(target)).unwrap();
        Ok(Pos { txid: header.max_txid, checksum: trailer.post_apply })
    }

    fn positions(&self) -> BTreeMap<String, Pos> {
        let names = fs::read_dir(self.path()).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.map(|name| (name.clone(), self.pos(&name))).collect()
    }
}

fn reader(path: &Path) -> BufReader<File> {
    BufReader::new(File::open(path).unwrap())
}

#[track_caller]
fn verified(path: &Path) -> (Header, Pos) {
    let (header, trailer) =
        ltx::verify(reader(path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    (header, Pos { txid: header.max_txid, checksum: trailer.post_apply })
}

/// A server; dropped, it is gone.
pub struct Cloud {
    /// What it keeps.
    pub vault: Vault,
    address: String,
    state: Arc<State>,
    runtime: Option<tokio::runtime::Runtime>,
}

#[derive(Default)]
struct State {
    /// It answers that it cannot now.
    refuses: AtomicBool,
    /// What becomes of snapshots, until another one is chosen.
    snapshots: watch::Sender<Snapshots>,
    /// What it was asked, a line each.
    requests: Mutex<Vec<String>>,
}

/// What becomes of the snapshots that a server sends.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub enum Snapshots {
    /// All are as they should be.
    #[default]
    Whole,
    /// Those of this database have a flipped bit.
    Damaged(&'static str),
    /// Those of this database do not come.
    Held(&'static str),
}

impl Cloud {
    /// A server that answers.
    pub fn start() -> Cloud {
        let (vault, address, state) = (Vault::new(), free_address(), Arc::default());
        let mut cloud = Cloud { vault, address, state, runtime: None };
        cloud.resume();
        cloud
    }

    /// Its URL, with a path, which does not count.
    pub fn url(&self) -> String {
        format!("http://{}/ignored", self.address)
    }

    /// Nobody answers any more, and open connections are broken.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// It answers again.
    pub fn resume(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = { runtime }.worker_threads(1).enable_all().build().unwrap();
        let (vault, state, address) = (self.vault.clone(), self.state.clone(), &self.address);
        let listener =
            wait::until("the server's port", || runtime.block_on(TcpListener::bind(address)).ok());
        runtime.spawn(async move {
            loop {
                let Ok((socket, _)) = listener.accept().await else { continue };
                let (vault, state) = (vault.clone(), state.clone());
                let service = service_fn(move |request| {
                    let (vault, state) = (vault.clone(), state.clone());
                    async move { Ok::<_, Infallible>(answer(&vault, &state, request).await) }
                });
                let connection =
                    http1::Builder::new().serve_connection(TokioIo::new(socket), service);
                tokio::spawn(async move { drop(connection.await) });
            }
        });
        self.runtime = Some(runtime);
    }

    /// From now on it answers 503, or does not any more.
    pub fn refuse(&self, refuses: bool) {
        self.state.refuses.store(refuses, Ordering::SeqCst);
    }

    /// What becomes of snapshots from now on, also of one that is held.
    pub fn send_snapshots(&self, how: Snapshots) {
        self.state.snapshots.send_replace(how);
    }

    /// How often it was asked for a snapshot of a database so far.
    pub fn snapshots_asked(&self, name: &str) -> usize {
        let asked = format!("GET /db/snapshot?db={name}&");
        self.requests().iter().filter(|line| line.starts_with(&asked)).count()
    }

    /// What it was asked so far: method, path, and headers that tell something.
    pub fn requests(&self) -> Vec<String> {
        self.state.requests.lock().unwrap().clone()
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn answer(vault: &Vault, state: &State, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let header = |name: &str| {
        let value = head.headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let query = head.uri.query().unwrap_or_default();
    let line = format!(
        "{} {} id={} instance={}",
        head.method,
        head.uri,
        header("litefs-cluster-id"),
        header("fly-force-instance-id")
    );
    state.requests.lock().unwrap().push(line);
    let body = match body.collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => return plain(400, "cut off"),
    };
    if state.refuses.load(Ordering::SeqCst) {
        return plain(503, "not now");
    }
    if header("authorization") != TOKEN {
        return plain(401, r#"{"code":"EUNAUTHORIZED","error":"who are you?"}"#);
    }
    let cluster = format!("cluster={}", CLUSTER.replace(' ', "%20"));
    if !query.split('&').any(|part| part == cluster) {
        return plain(404, "no such cluster");
    }
    let name = query.split('&').find_map(|part| part.strip_prefix("db=")).unwrap_or_default();
    let mut response = match head.uri.path() {
        "/pos" => {
            let positions = vault.positions();
            let text = positions.iter().map(|(name, pos)| format!("\"{name}\":{}", json(*pos)));
            plain(200, &format!("{{{}}}", text.collect::<Vec<_>>().join(",")))
        }
        "/db/snapshot" => Response::new(Full::new(snapshot(vault, state, name).await.into())),
        "/db/tx" => match vault.take(name, &body) {
            Ok(pos) => {
                let mut taken = plain(200, "");
                taken.headers_mut().insert("Litefs-Hwm", pos.txid.to_string().parse().unwrap());
                taken
            }
            Err(pos) => plain(
                409,
                &format!(r#"{{"code":"EPOSMISMATCH","error":"mismatch","pos":{}}}"#, json(pos)),
            ),
        },
        _ => plain(404, "404 page not found"),
    };
    response.headers_mut().insert("Lfsc-Instance-Id", "instance-1".parse().unwrap());
    response
}

/// The snapshot of a database, as the test wants it.
async fn snapshot(vault: &Vault, state: &State, name: &str) -> Vec<u8> {
    let mut snapshots = state.snapshots.subscribe();
    let is_held = |how: &Snapshots| matches!(how, Snapshots::Held(held) if *held == name);
    let how = *snapshots.wait_for(|how| !is_held(how)).await.unwrap();
    let mut bytes = vault.snapshot(name);
    if matches!(how, Snapshots::Damaged(damaged) if damaged == name) {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    }
    bytes
}

fn json(pos: Pos) -> String {
    format!(r#"{{"TXID":"{}","PostApplyChecksum":"{}"}}"#, pos.txid, pos.checksum)
}

fn plain(code: u16, text: &str) -> Response<Full<Bytes>> {
    Response::builder().status(code).body(Full::new(text.to_owned().into())).unwrap()
}
