//! A disk that is full: its own small file system for the data directory.

use rusqlite::ErrorCode;
use test_case::test_matrix;

use super::{DB, check_integrity};
use crate::support::disk::Disk;
use crate::support::node::{Member, Node, Settings};
use crate::support::{sqlite, wait};

/// P7: "no write transaction begins: SQLITE_BUSY, in WAL and rollback mode alike; without passthrough a
/// commit in WAL mode fails with SQLITE_FULL instead." Readers go on, also new ones, which build the
/// wal-index, and when there is room again, so do writers.
#[test_matrix(["delete", "truncate", "persist", "wal"], ["auto", "off"])]
fn a_full_disk_refuses_writers_and_no_reader(mode: &str, passthrough: &'static str) {
    let mut node = Node::new(&Settings { passthrough, ..Settings::default() }, Member::Primary);
    let disk = Disk::mount(&node.data(), "32m");
    node.start();
    let file = node.file(DB);
    sqlite::run(
        &file,
        &format!("pragma journal_mode={mode}; create table t(x); insert into t values (7)"),
    );
    // Without passthrough nobody can tell a writer from a reader that builds the wal-index: both get
    // the lock, and what is written to the WAL is refused.
    let refusal = match (mode, passthrough) {
        ("wal", "off") => ErrorCode::DiskFull,
        _ => ErrorCode::DatabaseBusy,
    };
    let pos = node.pos(DB);
    let filler = node.data().join("filler");
    std::fs::write(&filler, vec![1; 29 << 20]).unwrap();

    for _ in 0..2 {
        // Nobody has it open: the first one in WAL mode has to build the wal-index.
        assert_eq!(sqlite::run(&file, "select x from t"), "7");
        let db = sqlite::open(&file);
        db.busy_timeout(std::time::Duration::ZERO).unwrap();
        let error = db.execute_batch("insert into t values (8)").unwrap_err();
        assert_eq!(error.sqlite_error_code(), Some(refusal), "{error}");
        check_integrity(&db);
    }
    assert_eq!(node.pos(DB), pos);
    assert_eq!(node.log_count("disk full, writers are refused"), 1);

    disk.resize("64m");
    wait::until("room for a writer", || {
        sqlite::open(&file).execute_batch("insert into t values (9)").ok()
    });
    assert_eq!(sqlite::run(&file, "select sum(x) from t"), "16");
    node.stop();
}
