//! Writes on a replica that holds the HALT lock of a database.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use test_case::test_matrix;

use super::Cluster;
use crate::support::node::{Node, Settings};
use crate::support::shell::Shell;
use crate::support::{program, sqlite};

pub(super) const DB: &str = "app.db";

/// What is asked of byte 72.
pub(super) fn range(kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 72,
        l_len: 1,
        l_pid: 0,
    }
}

/// Opens the lock file of a database.
pub(super) fn lock_file(node: &Node) -> File {
    let path = node.file(&format!("{DB}-lock"));
    File::options().read(true).write(true).open(path).unwrap()
}

/// A HALT lock; dropped, it is closed.
pub(super) struct Halt(File);

impl Halt {
    #[track_caller]
    pub(super) fn on(node: &Node) -> Halt {
        Halt::attempt(node).unwrap()
    }

    fn attempt(node: &Node) -> Result<Halt, Errno> {
        Halt::of(&node.file(&format!("{DB}-lock")))
    }

    pub(super) fn of(path: &Path) -> Result<Halt, Errno> {
        let file = File::options().read(true).write(true).open(path).unwrap();
        fcntl(file.as_fd(), FcntlArg::F_OFD_SETLKW(&range(libc::F_WRLCK)))?;
        Ok(Halt(file))
    }

    pub(super) fn release(self) {
        fcntl(self.0.as_fd(), FcntlArg::F_OFD_SETLKW(&range(libc::F_UNLCK))).unwrap();
    }
}

/// Whether a node says that it holds the lock.
pub(super) fn is_held(node: &Node) -> bool {
    let file = lock_file(node);
    let mut found = range(libc::F_WRLCK);
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut found)).unwrap();
    if i32::from(found.l_type) == libc::F_WRLCK {
        assert_eq!(found.l_pid, -1);
    }
    i32::from(found.l_type) == libc::F_WRLCK
}

pub(super) fn cluster(mode: &str, passthrough: &'static str) -> Cluster {
    let settings = Settings { passthrough, lines: "strict-verify: true", ..Settings::default() };
    let cluster = Cluster::with(2, &settings);
    let setup = format!("pragma journal_mode = {mode}; create table t(n integer primary key, b)");
    sqlite::run(&cluster.file(DB), &setup);
    cluster.sync(DB);
    cluster
}

pub(super) fn rows(path: &Path) -> String {
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
    // The first transaction of a database is one.
    assert_eq!(primary.log_count("snapshot sent"), 1);
}

/// SEMANTICS H2, H6.
#[test_matrix(["delete", "wal"], ["auto", "off"])]
fn readers_of_the_primary_go_on_and_writers_wait(mode: &str, passthrough: &'static str) {
    let cluster = cluster(mode, passthrough);
    let (primary, replica) = (cluster.primary(), cluster.replica());
    let reader = sqlite::open(&primary.file(DB));
    let halt = Halt::on(replica);
    for n in 1..4 {
        sqlite::run(&replica.file(DB), &format!("insert into t values ({n}, 'replica')"));
        assert_eq!(sqlite::value::<i64>(&reader, "select count(*) from t"), n);
    }
    let busy =
        sqlite::refused(&primary.file(DB), ".timeout 0\ninsert into t values (10, 'primary')");
    assert!(busy.contains("locked"), "{busy}");
    halt.release();
    sqlite::run(&primary.file(DB), "insert into t values (11, 'primary')");
    drop(reader);
    cluster.check();
}

/// SEMANTICS H1.
#[test]
fn a_lock_goes_from_one_replica_to_the_other() {
    let cluster = Cluster::of(3);
    sqlite::run(&cluster.file(DB), "create table t(n integer primary key, b)");
    cluster.sync(DB);
    let on_primary = Halt::on(cluster.primary());
    let first = Halt::on(cluster.replica());
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| Halt::on(&cluster.nodes[2]));
        sqlite::run(&cluster.replica().file(DB), "insert into t values (1, 'first')");
        assert!(!waits.is_finished());
        first.release();
        let second = waits.join().unwrap();
        sqlite::run(&cluster.nodes[2].file(DB), "insert into t values (2, 'second')");
        assert!(!is_held(cluster.replica()));
        // Closing is releasing.
        drop(second);
    });
    on_primary.release();
    sqlite::run(&cluster.file(DB), "insert into t values (3, 'primary')");
    assert_eq!(rows(&cluster.file(DB)), "3|6");
    cluster.check();
}

/// SEMANTICS H5.
#[test]
fn who_had_the_wal_open_before_opens_it_again() {
    let cluster = cluster("wal", "auto");
    let replica = cluster.replica();
    let mut shell = Shell::open(&replica.file(DB));
    assert_eq!(shell.run("select count(*) from t").trim(), "0");
    let halt = Halt::on(replica);
    let refused = shell.refused("insert into t values (1, 'before')");
    assert!(refused.contains("locked"), "{refused}");
    assert_eq!(replica.log_count("it must open it again"), 1);
    shell.reopen(&replica.file(DB));
    shell.run("insert into t values (2, 'again')");
    assert_eq!(rows(&cluster.file(DB)), "1|2");
    shell.close();
    halt.release();
    cluster.check();
}

/// `litefs run -with-halt-lock-on` holds the lock for as long as its command runs.
#[test_matrix(["delete", "wal"])]
fn a_command_runs_under_the_lock(mode: &str) {
    let cluster = cluster(mode, "auto");
    for node in [cluster.replica(), cluster.primary(), cluster.replica()] {
        let path = node.file(DB);
        let path = path.to_str().unwrap();
        let command = ["sqlite3", path, "insert into t(b) values ('run')"];
        let arguments = [&["-with-halt-lock-on", path, "--"][..], &command].concat();
        let output = Command::new(program::litefs()).arg("run").args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert!(!is_held(node));
        cluster.sync(DB);
    }
    assert_eq!(rows(&cluster.file(DB)), "3|6");
    cluster.check();
}

/// Other calls than the one that takes the lock; what is written into these files is EIO.
#[test]
fn only_byte_72_can_be_locked_and_nothing_written() {
    let cluster = cluster("delete", "auto");
    let file = lock_file(cluster.replica());
    let wait = |range: &libc::flock| fcntl(file.as_fd(), FcntlArg::F_OFD_SETLKW(range)).map(drop);
    let now = fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&range(libc::F_WRLCK)));
    assert_eq!(now, Err(Errno::ENOSYS));
    let mut longer = range(libc::F_WRLCK);
    longer.l_len = 2;
    assert_eq!(wait(&longer), Err(Errno::EINVAL));
    assert_eq!(wait(&range(libc::F_RDLCK)), Err(Errno::ENOSYS));
    wait(&range(libc::F_WRLCK)).unwrap();
    assert_eq!(wait(&range(libc::F_WRLCK)), Err(Errno::ENOLCK));
    // Another descriptor of the same open file, closed: the lock stays.
    drop(file.try_clone().unwrap());
    assert!(is_held(cluster.replica()));
    wait(&range(libc::F_UNLCK)).unwrap();
    assert!(!is_held(cluster.replica()));
    for suffix in ["pos", "lock"] {
        let path = cluster.file(&format!("{DB}-{suffix}"));
        let written = std::os::unix::fs::FileExt::write_at(
            &File::options().write(true).open(path).unwrap(),
            b"x",
            0,
        );
        assert_eq!(written.unwrap_err().raw_os_error(), Some(libc::EIO));
        let made = File::create(cluster.file(&format!("unknown-{suffix}")));
        assert_eq!(made.unwrap_err().raw_os_error(), Some(libc::EACCES));
    }
    sqlite::run(&cluster.file("new.db"), "create table t(x)");
    cluster.check();
}
