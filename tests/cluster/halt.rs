//! Writes on a replica that holds the HALT lock of a database.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use test_case::test_matrix;

use super::Cluster;
use crate::support::node::{Node, Settings};
use crate::support::{sqlite, wait};

const DB: &str = "app.db";

/// What is asked of byte 72.
fn range(kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 72,
        l_len: 1,
        l_pid: 0,
    }
}

/// Opens the lock file of a database.
fn lock_file(node: &Node) -> File {
    let path = node.file(&format!("{DB}-lock"));
    File::options().read(true).write(true).open(path).unwrap()
}

/// A HALT lock; dropped, it is closed.
struct Halt(File);

impl Halt {
    #[track_caller]
    fn on(node: &Node) -> Halt {
        Halt::attempt(node).unwrap()
    }

    fn attempt(node: &Node) -> Result<Halt, Errno> {
        let file = lock_file(node);
        fcntl(file.as_fd(), FcntlArg::F_OFD_SETLKW(&range(libc::F_WRLCK)))?;
        Ok(Halt(file))
    }

    fn release(self) {
        fcntl(self.0.as_fd(), FcntlArg::F_OFD_SETLKW(&range(libc::F_UNLCK))).unwrap();
    }
}

/// Whether a node says that it holds the lock.
fn is_held(node: &Node) -> bool {
    let file = lock_file(node);
    let mut found = range(libc::F_WRLCK);
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut found)).unwrap();
    if i32::from(found.l_type) == libc::F_WRLCK {
        assert_eq!(found.l_pid, -1);
    }
    i32::from(found.l_type) == libc::F_WRLCK
}

fn cluster(mode: &str, passthrough: &'static str) -> Cluster {
    let settings = Settings { passthrough, lines: "strict-verify: true", ..Settings::default() };
    let cluster = Cluster::with(2, &settings);
    let setup = format!("pragma journal_mode = {mode}; create table t(n integer primary key, b)");
    sqlite::run(&cluster.file(DB), &setup);
    cluster.sync(DB);
    cluster
}

fn rows(path: &Path) -> String {
    sqlite::run(path, "select count(*), coalesce(sum(n), 0) from t")
}

/// Each is a transaction, or more than one.
const WRITES: &[&str] = &[
    "insert into t values (1, 'one')",
    "begin; insert into t values (2, randomblob(20000)); update t set b = 'first' where n = 1; commit",
    "create index i on t(b)",
    "with recursive c(n) as (select 3 union all select n + 1 from c where n < 300)
     insert into t select n, randomblob(400) from c",
    "begin; delete from t where n > 100; rollback",
    "pragma cache_size = 4; begin; update t set b = randomblob(500); delete from t where n % 7 = 0;
     update t set b = randomblob(300); commit",
    "delete from t where n > 50",
    "vacuum",
    "drop index i",
];

#[test_matrix(["delete", "truncate", "persist", "wal"], ["auto", "off"])]
fn a_replica_writes_under_a_halt_lock(mode: &str, passthrough: &'static str) {
    let cluster = cluster(mode, passthrough);
    let (primary, replica) = (cluster.primary(), cluster.replica());
    assert!(!is_held(replica));
    let halt = Halt::on(replica);
    assert!(is_held(replica) && !is_held(primary));
    for sql in WRITES {
        let before = replica.pos(DB).txid;
        sqlite::run(&replica.file(DB), &format!("pragma journal_mode = {mode}; {sql}"));
        if !sql.contains("rollback") {
            assert!(replica.pos(DB).txid > before, "{sql}");
        }
        assert_eq!(replica.pos(DB), primary.pos(DB), "{sql}");
        assert_eq!(rows(&replica.file(DB)), rows(&cluster.file(DB)), "{sql}");
    }
    halt.release();
    assert!(!is_held(replica));
    sqlite::refused(&replica.file(DB), ".timeout 0\ninsert into t values (1000, 'late')");
    sqlite::run(&cluster.file(DB), "insert into t values (1001, 'primary')");
    cluster.check();
    assert_eq!(primary.log_count("snapshot sent"), 0);
    wait::until_true("no reconnect", || replica.log_count("disconnected") == 0);
}
