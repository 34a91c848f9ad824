//! HALT locks at their edges: large transactions, waits that are interrupted, what is refused under a
//! lock, and a LiteFS node on the other side, played by hand.

use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use ltx::{Compression, Pos};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use rusqlite::{Connection, OpenFlags};
use test_case::test_case;

use super::Cluster;
use super::forward::{LITEFS, call};
use super::halt::{DB, Halt, cluster, is_held, lock_file, range, rows};
use crate::support::node::Node;
use crate::support::{sqlite, wait};

/// More than a node keeps in memory, on either side.
#[test_case("delete")]
#[test_case("wal")]
fn a_large_transaction_goes_through_a_spool(mode: &str) {
    let cluster = cluster(mode, "auto");
    let (primary, replica) = (cluster.primary(), cluster.replica());
    let halt = Halt::on(replica);
    // Random bytes do not become fewer on the way.
    let sql = "with recursive c(n) as (select 1 union all select n + 1 from c where n < 12)
               insert into t select n, randomblob(1000000) from c";
    sqlite::run(&replica.file(DB), sql);
    assert_eq!(replica.pos(DB), primary.pos(DB));
    let sum = "select count(*), sum(length(b)) from t";
    assert_eq!(sqlite::run(&primary.file(DB), sum), "12|12000000");
    sqlite::run(
        &replica.file(DB),
        "begin; update t set b = randomblob(900000); delete from t where n = 3; commit",
    );
    halt.release();
    let pos = cluster.sync(DB);
    // Who builds the wal-index anew, now that the primary has let go of it, commits nothing.
    assert_eq!(sqlite::run(&primary.file(DB), sum), "11|9900000");
    assert_eq!(primary.pos(DB), pos);
    cluster.check();
    for node in &cluster.nodes {
        let left = std::fs::read_dir(node.db_dir(DB).ltx()).unwrap();
        let left = left.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let left: Vec<_> = left.filter(|name| name.ends_with(".tmp")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

extern "C" fn heard(_: libc::c_int) {}

/// SEMANTICS H1. What it would have got in that moment is given back.
#[test]
fn a_signal_ends_the_wait_for_a_halt_lock() {
    let cluster = Cluster::of(3);
    sqlite::run(&cluster.file(DB), "create table t(n integer primary key, b)");
    cluster.sync(DB);
    let first = Halt::on(cluster.replica());
    let action = SigAction::new(SigHandler::Handler(heard), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
    let file = lock_file(&cluster.nodes[2]);
    let (ended, thread) = (AtomicBool::new(false), AtomicI32::new(0));
    let result = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            thread.store(nix::unistd::gettid().as_raw(), Ordering::SeqCst);
            let result = fcntl(file.as_fd(), FcntlArg::F_OFD_SETLKW(&range(libc::F_WRLCK)));
            ended.store(true, Ordering::SeqCst);
            result
        });
        // Before it waits there is nothing to interrupt.
        wait::until_true("the end of the wait", || {
            let (process, thread) = (std::process::id(), thread.load(Ordering::SeqCst));
            // SAFETY: it only sends a signal; a number that is no thread of this process is refused.
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGUSR1) };
            ended.load(Ordering::SeqCst)
        });
        waiting.join().unwrap()
    });
    assert_eq!(result, Err(Errno::EINTR));
    first.release();
    sqlite::run(&cluster.file(DB), "insert into t values (1, 'primary')");
    cluster.sync(DB);
    assert!(!is_held(&cluster.nodes[2]));
    // Through the same open file.
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLKW(&range(libc::F_WRLCK))).unwrap();
    assert!(is_held(&cluster.nodes[2]));
    sqlite::run(&cluster.nodes[2].file(DB), "insert into t values (2, 'replica')");
    drop(file);
    cluster.check();
}

/// SEMANTICS H7: "Under the lock a database cannot be removed".
#[test]
fn a_database_is_not_removed_under_a_halt_lock() {
    for mode in ["delete", "wal"] {
        let cluster = cluster(mode, "auto");
        let halt = Halt::on(cluster.replica());
        for node in &cluster.nodes {
            let refused = std::fs::remove_file(node.file(DB)).unwrap_err();
            let errno = refused.raw_os_error();
            assert!([Some(libc::EACCES), Some(libc::EBUSY)].contains(&errno), "{refused}");
        }
        sqlite::run(&cluster.replica().file(DB), "insert into t values (1, 'still there')");
        halt.release();
        cluster.check();
    }
}

/// SEMANTICS H7: "a transaction over several databases [...] fails".
#[test]
fn a_transaction_over_several_databases_fails_under_halt_locks() {
    let cluster = cluster("delete", "auto");
    let other = "other.db";
    sqlite::run(&cluster.file(other), "create table o(n)");
    let before = [DB, other].map(|name| cluster.sync(name));
    let replica = cluster.replica();
    let halts = [Halt::on(replica), Halt::of(&replica.file("other.db-lock")).unwrap()];
    let attach = format!("attach '{}' as other", replica.file(other).display());
    let sql =
        format!("{attach}; begin; insert into t values (1, 'x'); insert into o values (1); commit");
    sqlite::refused(&replica.file(DB), &sql);
    assert_eq!([DB, other].map(|name| cluster.sync(name)), before);
    // One after the other they can be written.
    sqlite::run(
        &replica.file(DB),
        &format!("{attach}; insert into o values (2); insert into t values (2, 'y')"),
    );
    assert_eq!(sqlite::run(&cluster.file(other), "select n from o"), "2");
    assert_eq!(rows(&cluster.file(DB)), "1|2");
    halts.into_iter().for_each(Halt::release);
    cluster.check();
}

/// SEMANTICS H7: a commit that SQLite pads, because it takes storage for one without powersafe overwrite.
#[test]
fn a_commit_that_is_padded_fails_under_a_halt_lock() {
    let cluster = cluster("wal", "auto");
    let replica = cluster.replica();
    let halt = Halt::on(replica);
    cluster.sync(DB);
    let uri = format!("file:{}?psow=0", replica.file(DB).display());
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_URI;
    let padded = Connection::open_with_flags(uri, flags).unwrap();
    padded.execute_batch("pragma synchronous = full").unwrap();
    let failed = padded.execute("insert into t values (1, 'padded')", []);
    assert!(failed.is_err());
    drop(padded);
    // The primary may have it all the same (H3); both have the same.
    wait::until_true("one position", || replica.pos(DB) == cluster.primary().pos(DB));
    sqlite::run(&replica.file(DB), "insert into t values (2, 'as usual')");
    assert_eq!(rows(&cluster.file(DB)), rows(&replica.file(DB)));
    halt.release();
    cluster.check();
}

/// What a LiteFS node does under its lock: it does not renew, and says nothing of the position.
#[test_case("delete")]
#[test_case("wal")]
fn a_litefs_node_writes_through_our_primary(mode: &str) {
    let cluster = cluster(mode, "auto");
    let primary = cluster.primary();
    let granted = call(primary, "POST", "/halt?name=app.db&id=77", b"");
    let Pos { txid, checksum } = primary.pos(DB);
    let pos = format!(
        r#"{{"id":77,"pos":{{"TXID":"{txid}","PostApplyChecksum":"{checksum}"}},"expires":""#
    );
    assert!(granted.0 == 200 && granted.1.starts_with(&pos), "{granted:?}");
    let ltx = litefs_transaction(primary, "insert into t values (5, randomblob(10000))");
    assert_eq!(call(primary, "POST", "/tx?name=app.db&lockID=77", &ltx), (200, String::new()));
    assert_eq!(primary.pos(DB).txid, txid.next());
    sqlite::refused(&primary.file(DB), ".timeout 0\ninsert into t values (1, 'primary')");
    assert_eq!(call(primary, "DELETE", "/halt?name=app.db&id=77", b"").0, 200);
    sqlite::run(&primary.file(DB), "insert into t values (6, 'primary')");
    assert_eq!(rows(&cluster.file(DB)), "2|11");
    cluster.check();
    // Its author finds itself in the file: by that it knows that it has it.
    let stored = primary.db_dir(DB).ltx_file(txid.next(), txid.next());
    let (header, _) =
        ltx::verify(std::io::BufReader::new(std::fs::File::open(stored).unwrap())).unwrap();
    assert_eq!(header.node_id, LITEFS);
}

/// What a LiteFS node makes of a statement, at the position of our primary.
pub fn litefs_transaction(primary: &Node, sql: &str) -> Vec<u8> {
    // What its SQLite would do, in a copy.
    let copy = primary.scratch("litefs.db");
    let exported = primary.litefs("export", &["-name", DB, copy.to_str().unwrap()]);
    assert!(exported.status.success(), "{exported:?}");
    let before = std::fs::read(&copy).unwrap();
    sqlite::run(&copy, sql);
    sqlite::run(&copy, "pragma wal_checkpoint(truncate)");
    difference(&before, &std::fs::read(&copy).unwrap(), primary.pos(DB))
}

/// The LTX file of the pages that differ.
fn difference(before: &[u8], after: &[u8], pos: Pos) -> Vec<u8> {
    let size = ltx::PageSize::new(4096).unwrap();
    let pages = |bytes: &[u8]| bytes.chunks(size.bytes()).map(<[u8]>::to_vec).collect::<Vec<_>>();
    let (before, after) = (pages(before), pages(after));
    let header = ltx::Header {
        compression: Compression::None,
        page_size: size,
        commit: after.len() as u32,
        min_txid: pos.txid.next(),
        max_txid: pos.txid.next(),
        timestamp_ms: 1,
        pre_apply: pos.checksum,
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: LITEFS,
    };
    let mut encoder = ltx::Encoder::new(Vec::new(), header).unwrap();
    let mut post = pos.checksum;
    for (pgno, page) in (1..).map(ltx::Pgno).zip(&after) {
        let old = before.get(pgno.0 as usize - 1);
        if old == Some(page) {
            continue;
        }
        if let Some(old) = old {
            post = post.toggle(ltx::page_checksum(pgno, old));
        }
        post = post.toggle(encoder.page(pgno, page).unwrap());
    }
    encoder.finish(post).unwrap().0
}
