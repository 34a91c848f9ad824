//! Transactions of a replica on their way to the primary: what is lost on the way, and what a primary
//! must not take.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use ltx::{Checksum, Compression, Encoder, Header, NodeId, PageSize, Pgno, Pos, Txid};
use test_case::{test_case, test_matrix};

use super::Cluster;
use super::halt::{DB, Halt, cluster, is_held, rows};
use crate::support::consul::Link;
use crate::support::node::{Member, Node, Settings, free_address};
use crate::support::{sqlite, wait};

/// A way to a node on which answers can get lost.
struct Relay {
    address: String,
    mute: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
}

impl Relay {
    fn to(target: String) -> Arc<Relay> {
        let address = free_address();
        let listener = TcpListener::bind(&address).unwrap();
        let relay =
            Arc::new(Relay { address, mute: AtomicBool::new(false), open: Mutex::default() });
        let shared = relay.clone();
        std::thread::spawn(move || {
            for near in listener.incoming() {
                // A target that is not there is a connection that ends.
                let (Ok(near), Ok(far)) = (near, TcpStream::connect(&target)) else { continue };
                let mut open = shared.open.lock().unwrap();
                open.extend([near.try_clone().unwrap(), far.try_clone().unwrap()]);
                let (there, back) = (shared.clone(), shared.clone());
                let (near2, far2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                std::thread::spawn(move || there.copy(near2, far2, false));
                std::thread::spawn(move || back.copy(far, near, true));
            }
        });
        relay
    }

    fn copy(&self, mut from: TcpStream, mut to: TcpStream, answers: bool) {
        let mut buffer = [0; 65536];
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            let lost = answers && self.mute.load(Ordering::SeqCst);
            if !lost && to.write_all(&buffer[..read]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    }

    /// Answers get lost from here on.
    fn mute(&self) {
        self.mute.store(true, Ordering::SeqCst);
    }

    /// Ends all connections; new ones work.
    fn renew(&self) {
        self.mute.store(false, Ordering::SeqCst);
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Primary {
    Stays,
    Dies,
}

/// SEMANTICS H3: an answer that is lost is asked for again, by position.
#[test_matrix(["delete", "persist", "wal"], [Primary::Stays, Primary::Dies])]
fn a_lost_answer_leaves_both_nodes_the_same(mode: &str, then: Primary) {
    let settings = Settings { lines: "strict-verify: true", ..Settings::default() };
    let primary = Node::primary(&settings);
    let relay = Relay::to(primary.address().to_owned());
    let url = format!("http://{}", relay.address);
    let mut replica = Node::new(&settings, Member::Replica(&url));
    replica.start();
    let mut cluster = Cluster { nodes: vec![primary, replica] };
    let setup = format!("pragma journal_mode = {mode}; create table t(n integer primary key, b)");
    sqlite::run(&cluster.file(DB), &setup);
    let before = cluster.sync(DB);
    let halt = Halt::on(cluster.replica());
    relay.mute();
    let path = cluster.replica().file(DB);
    let committed = std::thread::scope(|scope| {
        let sql = format!("pragma journal_mode = {mode}; insert into t values (1, 'lost')");
        let commit = scope.spawn(move || sqlite::try_run(&path, &sql));
        wait::until_true("the transaction", || cluster.primary().pos(DB).txid > before.txid);
        assert_eq!(cluster.replica().pos(DB), before);
        if then == Primary::Dies {
            cluster.nodes[0].kill();
        }
        relay.renew();
        if then == Primary::Dies {
            cluster.nodes[0].start();
        }
        commit.join().unwrap()
    });
    if then == Primary::Stays {
        committed.unwrap();
    }
    cluster.sync(DB);
    assert_eq!(rows(&cluster.replica().file(DB)), "1|1");
    drop(halt);
    sqlite::run(&cluster.file(DB), "insert into t values (2, 'after')");
    cluster.check();
}

/// SEMANTICS H3: "Loss of the primary in the middle rolls it back."
#[test_case("delete")]
#[test_case("wal")]
fn a_commit_without_its_primary_is_rolled_back(mode: &str) {
    let mut cluster = cluster(mode, "auto");
    let halt = Halt::on(cluster.replica());
    sqlite::run(&cluster.replica().file(DB), "insert into t values (1, 'there')");
    cluster.nodes[0].kill();
    sqlite::refused(&cluster.replica().file(DB), "insert into t values (2, 'lost')");
    assert_eq!(rows(&cluster.replica().file(DB)), "1|1");
    cluster.nodes[0].start();
    // The lock went with the process that had lent it.
    sqlite::run(&cluster.file(DB), "insert into t values (3, 'primary')");
    cluster.sync(DB);
    wait::until_true("the end of the lock", || !is_held(cluster.replica()));
    sqlite::refused(&cluster.replica().file(DB), ".timeout 0\ninsert into t values (4, 'late')");
    drop(halt);
    assert_eq!(rows(&cluster.replica().file(DB)), "2|4");
    cluster.check();
}

/// SEMANTICS H4: a lock is renewed as long as its node lives and reaches the primary, and expires 30 s after
/// that: "on the replica first".
#[test]
fn a_lock_lasts_as_long_as_its_node() {
    const OTHER: &str = "other.db";
    const FAR: &str = "far.db";
    let mut cluster = Cluster::of(3);
    let link = Link::to(cluster.primary().address());
    let url = format!("http://{}", link.address());
    let mut far = Node::new(&Settings::default(), Member::Replica(&url));
    far.start();
    cluster.nodes.push(far);
    for name in [DB, OTHER, FAR] {
        sqlite::run(&cluster.file(name), "create table t(n integer primary key, b)");
        cluster.sync(name);
    }
    let dying = Halt::on(cluster.replica());
    let other = cluster.nodes[2].file("other.db-lock");
    let renewed = Halt::of(&other).unwrap();
    let cut_off = Halt::of(&cluster.nodes[3].file("far.db-lock")).unwrap();
    sqlite::run(&cluster.nodes[3].file(FAR), "insert into t values (1, 'in time')");
    link.cut();
    cluster.nodes[1].kill();
    sqlite::run(&cluster.file(FAR), ".timeout 90000\ninsert into t values (2, 'at last')");
    sqlite::refused(&cluster.nodes[3].file(FAR), ".timeout 0\ninsert into t values (3, 'late')");
    cluster.nodes[3].wait_for_log("halt lock has expired");
    sqlite::run(&cluster.file(DB), ".timeout 90000\ninsert into t values (1, 'at last')");
    sqlite::run(&cluster.nodes[2].file(OTHER), "insert into t values (1, 'renewed')");
    sqlite::refused(&cluster.file(OTHER), ".timeout 0\ninsert into t values (2, 'primary')");
    drop((dying, renewed, cut_off));
    link.mend();
    cluster.nodes[1].start();
    assert_eq!(rows(&cluster.file(OTHER)), "1|1");
    assert_eq!(rows(&cluster.file(FAR)), "2|3");
    cluster.check();
    drop(link);
}

/// The node whose calls are played by hand.
pub(super) const LITEFS: NodeId = NodeId(0xab);

/// The status and the body of an answer to [`LITEFS`].
pub(super) fn call(node: &Node, method: &str, path: &str, body: &[u8]) -> (u16, String) {
    let mut stream = TcpStream::connect(node.address()).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nLitefs-Id: 00000000000000AB\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    // The answer may come before the end of the body.
    let _ = stream.write_all(body);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    let text = answer.split_once("\r\n\r\n").map_or("", |(_, text)| text).trim_end().to_owned();
    (status.unwrap_or(0), text)
}

/// An LTX file that writes page 2 of a database of 2 pages.
fn transaction(txid: u64, pre: Checksum, post: Checksum) -> Vec<u8> {
    let header = Header {
        compression: Compression::Lz4,
        page_size: PageSize::new(4096).unwrap(),
        commit: 2,
        min_txid: Txid(txid),
        max_txid: Txid(txid),
        timestamp_ms: 1,
        pre_apply: pre,
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: LITEFS,
    };
    let mut encoder = Encoder::new(Vec::new(), header).unwrap();
    encoder.page(Pgno(2), &[7; 4096]).unwrap();
    encoder.finish(post).unwrap().0
}

/// What is wrong is refused, changes nothing, and the node lives on.
#[test]
fn a_primary_takes_only_what_fits_under_the_lock() {
    let cluster = cluster("delete", "auto");
    let primary = cluster.primary();
    let Pos { txid: Txid(txid), checksum } = primary.pos(DB);
    let wrong = ltx::page_checksum(Pgno(2), &[9; 4096]);
    let good = transaction(txid + 1, checksum, wrong);
    let tx =
        |id: &str, body: &[u8]| call(primary, "POST", &format!("/tx?name={DB}&lockID={id}"), body);
    let check = |answer: (u16, String), status: u16, text: &str| {
        assert_eq!(answer.0, status, "{answer:?}");
        assert!(answer.1.contains(text), "{answer:?}");
    };
    check(tx("7", &good), 409, "is not held");
    check(call(primary, "POST", "/halt?name=app.db&id=0", b""), 500, "halt lock id required");
    check(call(primary, "POST", "/halt?name=app.db&id=x", b""), 400, "invalid id");
    check(call(primary, "POST", "/halt?name=../x&id=7", b""), 400, "");
    check(call(primary, "POST", "/halt?name=&id=7", b""), 400, "");
    check(call(primary, "POST", "/tx?name=../x&lockID=7", &good), 404, "database not found");
    check(call(primary, "DELETE", "/halt?name=unknown&id=7", b""), 404, "database not found");
    check(call(primary, "GET", "/halt?name=app.db&id=7", b""), 405, "method not allowed");
    check(call(cluster.replica(), "POST", "/halt?name=app.db&id=7", b""), 503, "lease expired");
    let granted = call(primary, "POST", "/halt?name=app.db&id=7", b"");
    check(granted.clone(), 200, &format!("\"TXID\":\"{:016x}\"", txid));
    assert!(granted.1.starts_with("{\"id\":7,\"pos\":{\"TXID\""), "{granted:?}");
    // Asked again it is the same lock.
    check(call(primary, "POST", "/halt?name=app.db&id=7", b""), 200, "\"id\":7,");
    check(tx("8", &good), 409, "is not held");
    check(tx("7", &good), 400, "does not lead to its checksum");
    check(tx("7", &transaction(txid + 2, checksum, wrong)), 409, "position mismatch");
    check(tx("7", &transaction(txid + 1, wrong, wrong)), 409, "position mismatch");
    check(tx("7", &good[..good.len() - 9]), 400, "write ltx file");
    check(tx("7", b"nothing"), 400, "write ltx file");
    check(call(cluster.replica(), "POST", "/tx?name=app.db&lockID=7", &good), 503, "lease expired");
    check(call(primary, "DELETE", "/halt?name=app.db&id=8", b""), 200, "");
    sqlite::refused(&primary.file(DB), ".timeout 0\ninsert into t values (1, 'locked')");
    check(call(primary, "DELETE", "/halt?name=app.db&id=7", b""), 200, "");
    assert_eq!(primary.pos(DB).txid, Txid(txid));
    sqlite::run(&primary.file(DB), "insert into t values (2, 'free')");
    cluster.check();
}
