//! A node that is killed while applications write. Whatever SQLite acknowledged must be there after
//! the next start, one transaction a commit.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ltx::Txid;
use nix::sys::statfs::{FUSE_SUPER_MAGIC, statfs};
use test_case::test_case;

use super::{DB, Node, check_chain, check_integrity, check_stopped, sqlite, strict};
use crate::support::node::{Member, Settings};
use crate::support::shell::Shell;
use crate::support::{program, wait};

/// How often the node is killed.
const ROUNDS: u64 = 5;
/// Applications that write at the same time.
const WRITERS: u64 = 2;

/// A program that commits one row after the other, and says the number of each that was
/// acknowledged.
struct Writer {
    child: Child,
    who: u64,
    /// What it said.
    output: PathBuf,
}

impl Writer {
    /// Begins to write rows from the number `first` on.
    fn start(node: &Node, who: u64, setup: &str, first: u64) -> Writer {
        let script = node.scratch(&format!("script-{who}"));
        let output = node.scratch(&format!("output-{who}"));
        let mut sql = format!(".timeout 20000\n{setup};\n");
        for n in first..first + 20_000 {
            sql += &format!(
                "begin immediate; insert into t values ({who}, {n}, hex(randomblob({size}))); \
                 update t set b = 'shorter' where who = {who} and n = {n} - 5; commit; \
                 select 'committed', {n};\n",
                size = n * 37 % 900,
            );
        }
        fs::write(&script, sql).unwrap();
        // Without a buffer: it is killed, and each line that it got to is wanted.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "sqlite3", "-batch", "-bail"]).arg(node.file(DB));
        command.stdin(File::open(script).unwrap()).stdout(File::create(&output).unwrap());
        Writer { child: command.stderr(Stdio::null()).spawn().unwrap(), who, output }
    }

    /// Kills the program; the last number that was acknowledged. SQLite itself would try the locks of
    /// the wal-index for ten seconds before it gives up.
    fn acknowledged(mut self) -> u64 {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let text = fs::read_to_string(&self.output).unwrap();
        let last = text.lines().filter_map(|line| line.strip_prefix("committed|")).next_back();
        last.map_or(0, |number| number.parse().unwrap())
    }
}

#[test_case("wal", "normal", "auto", "auto")]
#[test_case("wal", "normal", "auto", "dev")]
#[test_case("wal", "full", "auto", "auto")]
#[test_case("wal", "normal", "off", "auto")]
#[test_case("delete", "full", "auto", "auto")]
#[test_case("delete", "full", "off", "auto")]
#[test_case("delete", "full", "off", "dev")]
#[test_case("truncate", "full", "auto", "auto")]
#[test_case("persist", "normal", "auto", "auto")]
fn what_sqlite_acknowledged_survives_a_killed_node(
    mode: &str,
    synchronous: &str,
    passthrough: &'static str,
    transport: &'static str,
) {
    let mut node = Node::primary(&Settings { passthrough, transport, ..Settings::default() });
    let setup = format!(
        "pragma journal_mode={mode}; pragma synchronous={synchronous}; \
         pragma wal_autocheckpoint=20"
    );
    sqlite::run(&node.file(DB), &format!("{setup}; create table t(who, n, b);"));
    let before = node.pos(DB).txid.0;
    for round in 0..ROUNDS {
        let writers: Vec<Writer> =
            (0..WRITERS).map(|who| Writer::start(&node, who, &setup, next(&node, who))).collect();
        let start = node.pos(DB).txid.0;
        let enough = Txid(start + 10 + 23 * round);
        wait::until_or(
            || format!("transaction {enough}, stands at {}", node.pos(DB)),
            || (node.pos(DB).txid >= enough).then_some(()),
        );
        node.kill();
        let acknowledged: Vec<_> =
            writers.into_iter().map(|writer| (writer.who, writer.acknowledged())).collect();
        assert!(acknowledged.iter().any(|(_, last)| *last > 0), "nobody got anything done");
        node.start();
        let db = sqlite::open(&node.file(DB));
        check_integrity(&db);
        for (who, last) in acknowledged {
            let found = next(&node, who) - 1;
            assert!(found >= last, "{last} was acknowledged to {who}, {found} is the last");
            let count = format!("select count(*) from t where who = {who}");
            assert_eq!(sqlite::value::<u64>(&db, &count), found, "rows of {who} without a gap");
        }
        let rows: u64 = sqlite::value(&db, "select count(*) from t");
        assert_eq!(node.pos(DB).txid, Txid(before + rows), "one transaction a commit");
        check_chain(&node.db_dir(DB), node.pos(DB));
    }
    let pos = node.pos(DB);
    node.stop();
    assert_eq!(check_stopped(&node.db_dir(DB)), pos);
    assert!(!node.db_dir(DB).lost_found().exists(), "nothing had to be set aside");
}

/// The number after the last row of `who`.
fn next(node: &Node, who: u64) -> u64 {
    let sql = format!("select coalesce(max(n), 0) + 1 from t where who = {who}");
    sqlite::value(&sqlite::open(&node.file(DB)), &sql)
}

#[test_case("wal", "auto")]
#[test_case("delete", "auto")]
#[test_case("delete", "off")]
fn an_application_survives_the_node_and_opens_its_database_again(
    mode: &str,
    passthrough: &'static str,
) {
    let mut node = strict(passthrough);
    let file = node.file(DB);
    let mut shell = Shell::open(&file);
    shell.run(&format!("pragma journal_mode={mode}; create table t(x); insert into t values (1)"));
    shell.run("begin immediate; insert into t values (2)");
    node.kill();
    shell.attempt("insert into t values (3)");
    shell.attempt("select sum(x) from t");
    shell.attempt("rollback");
    node.start();
    shell.refused("begin immediate");
    shell.reopen(&file);
    shell.run("insert into t values (4)");
    assert_eq!(shell.run("select group_concat(x) from t"), "1,4");
    shell.close();
    check_chain(&node.db_dir(DB), node.pos(DB));
}

/// Two processes on one data directory would each destroy what the other writes.
#[test]
fn a_second_process_on_a_data_directory_is_refused() {
    let mut node = strict("auto");
    sqlite::run(&node.file(DB), "create table t(x)");
    let config = fs::read_to_string(node.scratch("litefs.yml")).unwrap();
    let mount = node.mount().display().to_string();
    let other = node.scratch("other.yml");
    let config = config.replace(&mount, &format!("{mount}-2")).replace("addr: '", "addr: ':0' #");
    fs::write(&other, config.replace("#", "}\n# ")).unwrap();
    let mut command = Command::new(program::litefs());
    let output = program::output(command.args(["mount", "-config"]).arg(&other)).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{said}");
    let data = node.data().display().to_string();
    let line = said.lines().find(|line| line.contains("in use by another process"));
    assert!(line.is_some_and(|line| line.contains(&data)), "{said}");
    sqlite::run(&node.file(DB), "insert into t values (1)");
    node.kill();
    node.start();
    assert_eq!(sqlite::run(&node.file(DB), "select count(*) from t"), "1");
}

/// A file system of its own for the data directory; unmounted when dropped.
struct Disk(PathBuf);

impl Disk {
    fn mount(node: &Node, kind: &str) -> Disk {
        let (image, data) = (node.scratch("disk.img"), node.data());
        let call = |command: &mut Command| assert!(command.status().unwrap().success());
        fs::create_dir_all(&data).unwrap();
        File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let option = if kind == "tmpfs" { "size=64m" } else { "loop" };
        if kind != "tmpfs" {
            call(Command::new(format!("mkfs.{kind}")).arg("-q").arg(&image));
        }
        call(Command::new("mount").args(["-t", kind, "-o", option]).args([&image, &data]));
        Disk(data)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A primary whose data is on a file system of this kind, and an application in the middle of a
/// transaction, with one row committed.
fn in_a_transaction(kind: &str) -> (Node, Disk, Shell) {
    // Without passthrough nobody could commit while no process is there.
    let settings = Settings { passthrough: "auto", ..Settings::default() };
    let mut node = Node::new(&settings, Member::Primary);
    let disk = Disk::mount(&node, kind);
    node.start();
    let mut shell = Shell::open(&node.file(DB));
    shell.run("pragma journal_mode=wal; pragma synchronous=normal; create table t(x)");
    shell.run("insert into t values (1); begin immediate; insert into t values (2)");
    (node, disk, shell)
}

/// What the log says where a late commit would be lost.
const CANNOT: &str = "late commits cannot be refused";

/// The application has the WAL of the process before open, and SQLite ignores that its unlock fails.
#[test_case(Node::kill; "killed")]
#[test_case(|node| _ = node.stop(); "stopped")]
fn a_commit_to_the_wal_of_a_former_process_is_refused(end: fn(&mut Node)) {
    let (mut node, disk, mut shell) = in_a_transaction("ext4");
    let pos = node.pos(DB);
    end(&mut node);
    node.start();
    shell.refused("commit");
    shell.attempt("rollback");
    let mut again = Shell::open(&node.file(DB));
    assert_eq!(again.run("select group_concat(x) from t"), "1");
    assert_eq!(node.pos(DB), pos);
    again.run("insert into t values (3)");
    again.close();
    shell.kill();
    check_chain(&node.db_dir(DB), node.pos(DB));
    assert_eq!(node.log_count(CANNOT), 0);
    node.stop();
    drop(disk);
}

/// What is committed while no process is there is in the WAL that the next one reads.
#[test_case(Node::kill; "killed")]
#[test_case(|node| _ = node.stop(); "stopped")]
fn a_commit_between_two_processes_counts(end: fn(&mut Node)) {
    let (mut node, disk, mut shell) = in_a_transaction("tmpfs");
    let pos = node.pos(DB);
    end(&mut node);
    shell.run("commit");
    node.start();
    assert_eq!(node.log_count(CANNOT), 1, "{}", node.log());
    assert_eq!(node.pos(DB).txid, pos.txid.next());
    assert_eq!(sqlite::run(&node.file(DB), "select group_concat(x) from t"), "1,2");
    shell.kill();
    check_chain(&node.db_dir(DB), node.pos(DB));
    node.stop();
    drop(disk);
}

/// An application that has opened its database may be about to open the WAL, by its name: in a plain
/// directory it would make one, commit to it, and all that would be lost.
#[test]
fn nothing_is_made_in_the_place_of_a_mount_that_is_in_use() {
    let mut node = strict("auto");
    sqlite::run(
        &node.file(DB),
        "pragma journal_mode = wal; create table t(x); insert into t values (1)",
    );
    let opened = File::open(node.file(DB)).unwrap();
    assert!(!node.stop().success(), "it complains");
    let late = wait::until("the kernel to cut the mount off", || {
        let failed = File::create(node.file("app.db-wal")).unwrap_err().raw_os_error();
        (failed != Some(nix::libc::ECONNABORTED) && failed != Some(nix::libc::ECANCELED))
            .then_some(failed)
    });
    assert_eq!(late, Some(nix::libc::ENOTCONN));
    // Looked at all the time while another mount takes the place of the dead one.
    let (dir, over) = (node.mount(), Arc::new(AtomicBool::new(false)));
    let (watched, ended) = (dir.clone(), over.clone());
    let watcher = std::thread::spawn(move || {
        let mut looks = 0;
        while !ended.load(Ordering::SeqCst) {
            assert!(is_covered(&watched), "the plain directory was in sight");
            looks += 1;
        }
        looks
    });
    node.start();
    over.store(true, Ordering::SeqCst);
    assert!(watcher.join().unwrap() > 0);
    assert_eq!(sqlite::run(&node.file(DB), "insert into t values (2); select sum(x) from t"), "3");
    // And again over the one that is in its place now, however often that happens.
    for _ in 0..2 {
        node.kill();
        assert!(is_covered(&dir));
        node.start();
    }
    drop(opened);
    assert!(node.stop().success());
    assert!(!is_covered(&dir), "a dead mount is left");
}

/// Whether a mount is in sight, dead or alive; a plain directory is of another file system.
fn is_covered(dir: &Path) -> bool {
    statfs(dir).map_or(true, |found| found.filesystem_type() == FUSE_SUPER_MAGIC)
}
