//! Bodies that peers and people send: a database to import, a transaction of the holder of a HALT lock,
//! and the lines of events.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame};
use ltx::{Checksum, Compression, Encoder, Header, NodeId, PageSize, Pgno, Pos, Txid};
use rusqlite::Connection;
use tempfile::TempDir;
use tokio::runtime::{self, Runtime};

use super::client::RoleLines;
use super::events;
use super::halt;
use super::transfer::Upload;
use crate::engine::halt::HaltId;
use crate::engine::{self, Db, DbName, DbState, Engine, Event, Role};
use crate::os;
use crate::properties::ram_dir;
use crate::sqlite::header::{self, DatabaseHeader, HEADER_SIZE};

/// The HALT lock under which transactions come.
const LOAN: HaltId = HaltId(7);
/// From this number of transactions on an engine begins anew, in an empty directory.
const TRANSACTIONS_MAX: u64 = 1000;

thread_local! {
    static NODE: RefCell<Option<Node>> = const { RefCell::new(None) };
}

/// A primary.
struct Node {
    engine: Arc<Engine>,
    runtime: Runtime,
    dir: TempDir,
    /// How often it was used.
    used: u64,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.engine.close().expect("memory takes it");
    }
}

impl Node {
    fn new() -> Node {
        let dir = ram_dir();
        let engine = Engine::open(engine::Options {
            dir: dir.path().join("data"),
            compression: Compression::Lz4,
            retention: Duration::ZERO,
            retention_interval: Duration::ZERO,
            retain: engine::Retain::Free,
            strict_verify: true,
            node_id: NodeId(1),
            clock: Box::new(|| 1),
        });
        let engine = engine.expect("an empty directory");
        engine.set_role(Role::Primary);
        let runtime = runtime::Builder::new_current_thread().enable_time().build();
        Node { engine, runtime: runtime.expect("a runtime"), dir, used: 0 }
    }

    /// Calls `act` with the node of this thread.
    fn with(act: impl FnOnce(&Node)) {
        NODE.with(|node| {
            let mut node = node.borrow_mut();
            if node.as_ref().is_some_and(|node| node.used > TRANSACTIONS_MAX) {
                *node = None;
            }
            let node = node.get_or_insert_with(Node::new);
            node.used += 1;
            act(node);
        });
    }

    fn store(&self, content: &[u8], piece: usize) -> Upload {
        let body = Pieces::of(content, piece);
        let upload = self.runtime.block_on(Upload::store(self.dir.path(), body));
        upload.expect("the body is whole")
    }

    /// Makes `content` a database; where it stands.
    fn import(&self, name: &str, content: &[u8]) -> (Arc<Db>, Pos) {
        let upload = self.store(content, content.len());
        let name = DbName::new(name).expect("a name");
        let pos = self.engine.import(&name, upload.path()).expect("SQLite says that it is healthy");
        (self.engine.database(name.as_str()).expect("it was imported"), pos)
    }
}

/// A body that comes in pieces.
struct Pieces(VecDeque<Bytes>);

impl Pieces {
    fn of(content: &[u8], piece: usize) -> Pieces {
        Pieces(content.chunks(piece.max(1)).map(Bytes::copy_from_slice).collect())
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
    }
}

/// A body of an import is stored as it comes, in pieces whose length the first byte says. What is taken
/// is a database of whole pages, as many as SQLite counts in it, and comes out again as it was, but for the
/// counters by which SQLite notices a change, and their size.
pub fn import(bytes: &[u8]) {
    let Some((&piece, content)) = bytes.split_first() else { return };
    Node::with(|node| {
        let upload = node.store(content, 16 * usize::from(piece));
        let stored = std::fs::read(upload.path()).expect("it was stored");
        assert!(stored == content, "what was stored is what came");
        if let Err(error) = upload.check() {
            let text = error.to_string();
            assert!(!text.trim().is_empty() && text.lines().count() == 1, "{text:?}");
            return;
        }
        let (db, pos) = node.import("import", content);
        let header = DatabaseHeader::parse(content).expect("it was accepted");
        let view = db.view();
        assert_eq!(view.page_size, Some(header.page_size));
        assert_eq!(Some(view.pages), header.page_count_or_len(content.len() as u64));
        let mut out = Vec::new();
        assert_eq!(db.export(&mut out).expect("it was imported"), pos);
        assert_eq!(out.len(), view.pages as usize * header.page_size.bytes());
        assert_eq!(sum_of(&pages_of(&out, header.page_size)), pos.checksum);
        let path = node.dir.path().join("exported");
        os::write_atomic("fuzz", &path, &out).expect("memory takes it");
        let sqlite = Connection::open(&path).expect("a file");
        let pragma = |name| sqlite.pragma_query_value(None, name, |row| row.get::<_, u32>(0));
        assert_eq!(pragma("page_count"), Ok(view.pages));
        assert_eq!(pragma("page_size"), Ok(header.page_size.get()));
        let mut expected = content[..out.len()].to_vec();
        let now = DatabaseHeader::parse(&out).expect("it was exported");
        header::set_counters(&mut expected, now.change_counter, now.schema_cookie, view.pages);
        assert!(expected == out, "the same pages");
    });
}

/// The pages of a database.
type Pages = BTreeMap<Pgno, Vec<u8>>;

fn pages_of(content: &[u8], page_size: PageSize) -> Pages {
    (1..).map(Pgno).zip(content.chunks(page_size.bytes()).map(<[u8]>::to_vec)).collect()
}

fn sum_of(pages: &Pages) -> Checksum {
    let sum = |sum: Checksum, (pgno, page): (&Pgno, &Vec<u8>)| {
        sum.toggle(ltx::page_checksum(*pgno, page))
    };
    pages.iter().fold(Checksum::EMPTY, sum)
}

/// A small database.
fn small_database() -> Vec<u8> {
    let dir = ram_dir();
    let path = dir.path().join("db");
    let sqlite = Connection::open(&path).expect("a file");
    let made = "PRAGMA page_size = 512; CREATE TABLE t (x); INSERT INTO t VALUES (zeroblob(900));";
    sqlite.execute_batch(made).expect("memory takes it");
    drop(sqlite);
    std::fs::read(&path).expect("SQLite made it")
}

/// A transaction that the holder of a HALT lock sends: an LTX file as the bytes describe it ([`Sent`]), in
/// pieces, perhaps damaged. It is taken whole, and then the database is what a plain model makes of it, or
/// nothing of it is.
pub fn tx(bytes: &[u8]) {
    thread_local! {
        static SMALL: Vec<u8> = small_database();
    }
    let [piece, damage, flip, rest @ ..] = bytes else { return };
    Node::with(|node| {
        let (db, pos) = SMALL.with(|small| node.import("tx", small));
        let before = exported(&db);
        let Some(Sent { mut file, pages, end, plain }) = Sent::of(rest, &before, pos) else {
            return;
        };
        let at = usize::from(*damage) * 31 % file.len();
        file[at] ^= flip;
        db.lend(LOAN, Duration::from_secs(20), &AtomicBool::new(false)).expect("nobody has it");
        let receiver = node.engine.receive(db.name()).expect("it is there");
        let body = Pieces::of(&file, usize::from(*piece));
        let receiver = node.runtime.block_on(halt::receive(&db, receiver, body));
        let taken = receiver.expect("the body is whole").finish_forwarded(LOAN);
        assert!(db.take_back(Some(LOAN), "released"));
        assert_eq!(db.state(), DbState::Ready, "{taken:?}");
        match taken {
            Ok(at) => {
                assert_eq!((at, db.pos()), (end, end));
                assert!(exported(&db) == pages, "what the transaction says");
            }
            Err(error) => {
                assert!(*flip != 0 || !plain, "a good file was refused: {error}");
                assert_eq!(db.pos(), pos, "{error}");
                assert!(exported(&db) == before, "nothing of it: {error}");
            }
        }
    });
}

/// The pages of a database; none of one that was deleted.
fn exported(db: &Db) -> Pages {
    let (mut out, view) = (Vec::new(), db.view());
    match (db.export(&mut out), view.page_size) {
        (Ok(pos), Some(page_size)) => {
            assert_eq!(pos, db.pos());
            pages_of(&out, page_size)
        }
        (exported, _) => {
            assert!(view.pages == 0, "{exported:?}");
            Pages::new()
        }
    }
}

/// An LTX file, and what it should do.
struct Sent {
    file: Vec<u8>,
    /// The database afterwards.
    pages: Pages,
    /// Where it leads to.
    end: Pos,
    /// It is as any node would send it.
    plain: bool,
}

impl Sent {
    /// A file that follows on `before` at `pos`, but for what the first bytes change; the others are its
    /// pages. None if there is no such file.
    fn of(bytes: &[u8], before: &Pages, pos: Pos) -> Option<Sent> {
        let [kind, size, min, max, pre, post, rest @ ..] = bytes else { return None };
        let is_snapshot = kind & 2 != 0;
        let page_size = if kind & 4 != 0 { PageSize::new(1024)? } else { PageSize::MIN };
        let commit = (before.len() as u32 + 4).checked_sub(u32::from(size % 16))?;
        let next = pos.txid.next();
        let header = Header {
            compression: if kind & 1 == 0 { Compression::None } else { Compression::Lz4 },
            page_size,
            commit,
            min_txid: if is_snapshot { Txid(1) } else { Txid(next.0.wrapping_add(signed(*min))) },
            max_txid: Txid(next.0.wrapping_add(signed(*max))),
            timestamp_ms: i64::from(*max),
            pre_apply: match is_snapshot {
                true => Checksum::NONE,
                false => pos.checksum.toggle(Checksum::flagged(u64::from(*pre))),
            },
            wal_offset: 0,
            wal_size: 0,
            wal_salt1: 0,
            wal_salt2: 0,
            node_id: NodeId(9),
        };
        let mut pages = if is_snapshot { Pages::new() } else { before.clone() };
        let changed: Pages =
            rest.chunks_exact(2).map(|page| changed(page, page_size, before)).collect();
        pages.extend(changed.clone());
        pages.retain(|pgno, _| pgno.0 <= commit);
        let checksum = sum_of(&pages).toggle(Checksum::flagged(u64::from(*post)));
        let mut encoder = Encoder::new(Vec::new(), header).ok()?;
        for (pgno, page) in changed.iter().filter(|(pgno, _)| pgno.0 <= commit) {
            encoder.page(*pgno, page).ok()?;
        }
        let (file, _) = encoder.finish(checksum).ok()?;
        let grows = pages.len() == commit as usize && commit >= before.len() as u32;
        let keeps_header = !changed.contains_key(&Pgno(1));
        let as_told = kind & !1 == 0 && [min, max, pre, post].iter().all(|byte| **byte == 0);
        let plain = as_told && grows && keeps_header;
        Some(Sent { file, pages, end: Pos { txid: header.max_txid, checksum }, plain })
    }
}

/// From -128 to 127.
fn signed(byte: u8) -> u64 {
    i64::from(byte as i8) as u64
}

/// A page that two bytes describe: which, and what is in it. Page 1 is that of `before` with one byte that
/// is another one, if it is among the first.
fn changed(bytes: &[u8], page_size: PageSize, before: &Pages) -> (Pgno, Vec<u8>) {
    let (pgno, content) = (Pgno(u32::from(bytes[0] % 12) + 1), bytes[1]);
    let mut page = vec![content; page_size.bytes()];
    if let (Pgno(1), Some(first)) = (pgno, before.get(&Pgno(1))) {
        page[..first.len()].copy_from_slice(first);
        if let Some(byte) = page[..HEADER_SIZE].get_mut(usize::from(content)) {
            *byte ^= 1 << (bytes[0] / 12 % 8);
        }
    }
    (pgno, page)
}

/// Lines of events say the same roles in pieces of the length that the first byte says as they do at once,
/// up to the same line that is none. A node's own lines say what happened.
pub fn events(bytes: &[u8]) {
    let Some((&piece, text)) = bytes.split_first() else { return };
    assert_eq!(roles(text, usize::from(piece).max(1)), roles(text, text.len().max(1)));
    let name = String::from_utf8_lossy(text).into_owned();
    let is_primary = piece % 2 == 0;
    let role = Event::PrimaryChange { is_primary, hostname: Some(name.clone()) };
    let mut lines = events::line(&role);
    if let Ok(db) = DbName::new(&name) {
        let (pos, timestamp_ms) = (Pos::ZERO, i64::from(piece));
        let tx = Event::Tx { db, pos, page_size: PageSize::MIN, commit: 1, timestamp_ms };
        lines.extend(events::line(&tx));
    }
    lines.extend(events::line(&role));
    assert_eq!(roles(&lines, 7), (vec![is_primary; 2], true), "{name:?}");
}

/// The roles that lines say, and whether all of them are lines of events.
fn roles(text: &[u8], piece: usize) -> (Vec<bool>, bool) {
    let (mut lines, mut roles) = (RoleLines::default(), Vec::new());
    for piece in text.chunks(piece) {
        lines.push(&BytesMut::from(piece).freeze());
        loop {
            match lines.next() {
                Ok(Some(role)) => roles.push(role),
                Ok(None) => break,
                Err(_) => return (roles, false),
            }
        }
    }
    (roles, true)
}
