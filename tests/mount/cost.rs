//! What a commit, a read and a page cost: counted, not timed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use rusqlite::Connection;
use test_case::{test_case, test_matrix};

use super::{DB, sqlite};
use crate::support::node::{Member, Node, Settings};
use crate::support::sqlite::Session;

const COMMITS: u32 = 50;

/// The kernel's number of a lock call that does not wait.
const SETLK: u32 = 32;

/// A database in that mode whose commits are synced, with nobody to checkpoint it.
fn open(node: &Node, mode: &str) -> Connection {
    let db = sqlite::open(&node.file(DB));
    let found: String = sqlite::value(&db, &format!("pragma journal_mode = {mode}"));
    assert_eq!(found, mode);
    db.execute_batch("pragma synchronous = full; create table t(x)").unwrap();
    let _: u32 = sqlite::value(&db, "pragma wal_autocheckpoint = 0");
    db
}

fn commit(db: &Connection) {
    for number in 0..COMMITS {
        db.execute("insert into t values (?1)", [number]).unwrap();
    }
}

/// `docs/differences.md`, 30: "WAL: none, a checkpoint syncs all LTX files at once. Rollback: the LTX
/// file and its directory".
#[test_case("wal", 0)]
#[test_case("delete", 2)]
#[test_case("truncate", 2)]
#[test_case("persist", 2)]
fn a_commit_syncs_no_more_than_it_must(mode: &str, own: u32) {
    let node = Node::primary(&Settings::default());
    let db = open(&node, mode);
    let count = |who: &str| node.metric(&format!("litefs_sync_count{{for=\"{who}\"}}")) as u32;
    let before = [count("application"), count("litefs")];
    commit(&db);
    let [applications, ours] = [count("application") - before[0], count("litefs") - before[1]];
    assert!(applications >= COMMITS, "{applications} of applications: is it counted?");
    // The files of former transactions may be synced meanwhile.
    let must = own * COMMITS;
    assert!((must..=must + 5).contains(&ours), "{ours} syncs in {COMMITS} commits");
    if mode == "wal" {
        let _: u32 = sqlite::value(&db, "pragma wal_checkpoint(truncate)");
        let files = COMMITS + 5;
        let ours = count("litefs") - before[1];
        assert!(ours > 0, "no syncs: are they counted?");
        assert!(ours <= files + 5, "{ours} syncs for at most {files} LTX files and a directory");
    }
}

/// `docs/decisions/0022-read-marks-ahead-of-readers.md`: READ, WRITE and both back, and of a reader READ alone.
#[test_matrix(["uring", "dev"])]
fn a_transaction_takes_no_lock_to_move_a_read_mark(transport: &'static str) {
    let settings = Settings { transport, fuse: ", debug: true", ..Settings::default() };
    let node = Node::primary(&settings);
    let db = open(&node, "wal");
    let mut replica = Node::new(&settings, Member::Replica(&node.url()));
    replica.start();
    replica.wait_for_pos(DB, node.pos(DB));
    let copy = sqlite::open(&replica.file(DB));
    let rows = || sqlite::value::<u32>(&copy, "select count(*) from t");
    assert_eq!(rows(), 0);
    let calls = |node: &Node| node.log_count(&format!(" opcode={SETLK} "));
    let mut reader = Session::open(&node.file(DB));
    for number in 1..=COMMITS {
        let before = [&node, &replica].map(calls);
        db.execute("insert into t values (?1)", [number]).unwrap();
        assert_eq!(calls(&node) - before[0], 4, "commit {number}");
        replica.wait_for_pos(DB, node.pos(DB));
        assert_eq!(rows(), number);
        assert_eq!(calls(&replica) - before[1], 2, "read of commit {number} on the replica");
        if number == COMMITS / 2 {
            // Three marks are left beside that of somebody who keeps one.
            assert_eq!(reader.run("begin; select count(*) from t;"), number.to_string());
        }
    }
    assert_eq!(reader.run("select count(*) from t;"), (COMMITS / 2).to_string());
    assert_eq!(reader.run("commit; select count(*) from t;"), COMMITS.to_string());
}

/// `docs/differences.md`, 29: "None of these", as far as a file is opened.
#[test_matrix(["wal", "persist"], ["auto", "off"])]
fn no_file_is_opened_for_a_read_a_write_or_a_sync(mode: &str, passthrough: &'static str) {
    let node = Node::primary(&Settings { passthrough, ..Settings::default() });
    let db = open(&node, mode);
    commit(&db);
    let file = File::open(node.file(DB)).unwrap();
    let opened = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
    opened.add_watch(node.db_dir(DB).path(), AddWatchFlags::IN_OPEN).unwrap();
    commit(&db);
    let mut page = [0; 512];
    for number in 0..100 {
        // Past the cache of the kernel, where there is one.
        let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        nix::fcntl::posix_fadvise(&file, 0, 0, advice).unwrap();
        file.read_at(&mut page, number % 4 * 512).unwrap();
    }
    // The directory is opened to make the name of a journal durable, and the chain's to add files.
    let names = opened.read_events().unwrap_or_default().into_iter();
    let names: Vec<_> = names.filter_map(|event| event.name).filter(|name| name != "ltx").collect();
    assert_eq!(names, Vec::<std::ffi::OsString>::new());
    // The watch does see what is opened.
    drop(File::open(node.db_dir(DB).database()).unwrap());
    assert_eq!(opened.read_events().unwrap()[0].name.as_deref(), Some("database".as_ref()));
}

/// Bytes that a node has read and written in all, by whatever call.
fn transferred(node: &Node) -> u64 {
    let counters = fs::read_to_string(format!("/proc/{}/io", node.pid())).unwrap();
    let counter = |name: &str| {
        let line = counters.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().parse::<u64>().unwrap()
    };
    counter("rchar:") + counter("wchar:")
}

/// `docs/differences.md`, 27: "It costs what the transaction is large", and not what the database is.
#[test_matrix(["wal", "delete"], ["auto", "off"])]
fn a_commit_costs_the_same_in_a_large_database(mode: &str, passthrough: &'static str) {
    const LARGE: u64 = 40 << 20;
    let node = Node::primary(&Settings { passthrough, ..Settings::default() });
    let db = open(&node, mode);
    let cost = || {
        commit(&db);
        let before = transferred(&node);
        commit(&db);
        transferred(&node) - before
    };
    let small = cost();
    db.execute_batch(&format!("insert into t values (zeroblob({LARGE}))")).unwrap();
    // The log starts over, and keeps its length.
    let _: Option<u32> = sqlite::value(&db, "pragma wal_checkpoint(restart)");
    let large = cost();
    println!("{COMMITS} commits: {small} bytes in a small database, {large} in a large one");
    // One look at a part in a thousand of the database for each commit would be as much.
    let slack = u64::from(COMMITS) * LARGE / 1000;
    assert!(small > 0 && large < small + slack, "{small} bytes in a small one, {large} in a large");
}

/// Resident memory of a node in bytes.
fn memory(node: &Node) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", node.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() << 10
}

/// `docs/differences.md`, 28: "8 bytes a page; nothing of the other two", which are all versions of the
/// pages in the WAL, and the owners of locks.
#[test]
fn memory_is_proportional_to_the_pages_only() {
    const PAGES: usize = 100_000;
    let node = Node::primary(&Settings::default());
    let before = memory(&node);
    let db = sqlite::open(&node.file(DB));
    db.execute_batch("pragma page_size = 512; pragma synchronous = off").unwrap();
    let _: String = sqlite::value(&db, "pragma journal_mode = wal");
    let _: u32 = sqlite::value(&db, "pragma wal_autocheckpoint = 0");
    let fill = format!(
        "create table t(id integer primary key, x);
         with recursive n(i) as (select 1 union all select i + 1 from n where i < {PAGES})
         insert into t select i, zeroblob(400) from n"
    );
    db.execute_batch(&fill).unwrap();
    let pages: usize = sqlite::value(&db, "pragma page_count");
    assert!(pages >= PAGES, "{pages} pages");
    for round in 0..8 {
        db.execute_batch(&format!("update t set x = zeroblob(400 - {round})")).unwrap();
    }
    let after = memory(&node);
    println!("{pages} pages in nine versions: {before} bytes before, {after} after");
    assert!(after < before + 16 * pages + (16 << 20), "{before} bytes before, {after} after");
}
