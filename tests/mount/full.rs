//! A disk that is full: its own small file system for the data directory.

use std::process::Command;

use rusqlite::ErrorCode;
use test_case::test_matrix;

use super::{DB, check_integrity};
use crate::support::node::{Member, Node, Settings};
use crate::support::{sqlite, wait};

/// A file system in memory, unmounted when it is dropped.
struct Disk(std::path::PathBuf);

impl Disk {
    fn mount(node: &Node, size: &str) -> Disk {
        std::fs::create_dir(node.data()).unwrap();
        let disk = Disk(node.data());
        disk.call(&["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]);
        disk
    }

    fn resize(&self, size: &str) {
        self.call(&["-o", &format!("remount,size={size}")]);
    }

    #[track_caller]
    fn call(&self, arguments: &[&str]) {
        let status = Command::new("mount").args(arguments).arg(&self.0).status().unwrap();
        assert!(status.success(), "mount {arguments:?}: {status}");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// P7: "If the LTX files cannot be written, or less than 4 MiB are free on the disk, no write
/// transaction begins: SQLITE_BUSY, in WAL and rollback mode alike." Readers go on, also new ones,
/// and when there is room again, so do writers.
#[test_matrix(["delete", "wal"])]
fn a_full_disk_refuses_writers_and_no_reader(mode: &str) {
    let mut node = Node::new(&Settings::default(), Member::Primary);
    let disk = Disk::mount(&node, "32m");
    node.start();
    let file = node.file(DB);
    sqlite::run(
        &file,
        &format!("pragma journal_mode={mode}; create table t(x); insert into t values (7)"),
    );
    let pos = node.pos(DB);
    let filler = node.data().join("filler");
    std::fs::write(&filler, vec![1; 29 << 20]).unwrap();

    for _ in 0..2 {
        // Nobody has it open: the first one in WAL mode has to build the wal-index.
        assert_eq!(sqlite::run(&file, "select x from t"), "7");
        let db = sqlite::open(&file);
        db.busy_timeout(std::time::Duration::ZERO).unwrap();
        let error = db.execute_batch("insert into t values (8)").unwrap_err();
        assert_eq!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy), "{error}");
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
