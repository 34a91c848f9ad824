//! A primary that becomes something else while applications write: what was begun is finished and
//! counts, or is refused, or is kept apart; never is it mixed into what another primary does.

use std::fs;
use std::thread;
use std::time::Duration;

use litefs::boot_time::BootTime;
use litefs::engine::{Error, Role};
use litefs::sqlite::wal::HEADER_SIZE;
use ltx::Pos;
use test_case::test_matrix;

use super::{DB, check_chain, sqlite};
use crate::support::local::{Local, replica};
use crate::support::shell::Shell;
use crate::support::wait;

/// A primary with a table of one row.
fn primary(mode: &str, passthrough: &str) -> Local {
    let node = Local::primary(passthrough, 1, None);
    let setup = format!("pragma journal_mode={mode}; create table t(x); insert into t values (1)");
    sqlite::run(&node.file(DB), &setup);
    node
}

fn rows(node: &Local) -> String {
    sqlite::run(&node.file(DB), "select group_concat(x) from t")
}

fn lost_and_found(node: &Local) -> Vec<String> {
    let entries = fs::read_dir(node.db_dir(DB).lost_found()).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test_matrix(["delete", "wal"], ["auto", "off"])]
fn who_stops_the_writes_waits_for_a_transaction_that_has_begun(mode: &str, passthrough: &str) {
    let node = primary(mode, passthrough);
    let mut writer = Shell::open(&node.file(DB));
    writer.run("begin immediate; insert into t values (2)");
    let before = node.db(DB).pos();
    let engine = node.engine.clone();
    let stopping = thread::spawn(move || engine.stop_writes(Duration::from_secs(100)));
    wait::until_true("no more to be begun", || !node.db(DB).may_begin());
    let mut other = Shell::open(&node.file(DB));
    let complaint = other.refused("begin immediate");
    assert!(complaint.contains("locked"), "{complaint}");
    assert_eq!(other.run("select group_concat(x) from t"), "1", "readers go on");
    writer.run("commit");
    let drained = stopping.join().unwrap();
    assert_eq!(drained.unfinished, []);
    let pos = node.db(DB).pos();
    assert_eq!(pos.txid, before.txid.next());
    assert_eq!(drained.positions, [(node.db(DB).name().clone(), pos)]);
    other.refused("begin immediate");
    node.engine.resume_writes();
    other.run("insert into t values (3)");
    assert_eq!(rows(&node), "1,2,3");
    check_chain(&node.db_dir(DB), node.db(DB).pos());
}

/// The new primary is made of what this node had; the node then gets what the new one commits.
fn follow_another(node: &Local, passthrough: &str, before: Pos) {
    let other = Local::primary(passthrough, 2, Some(&node.data()));
    assert_eq!(other.db(DB).pos(), before);
    sqlite::run(&other.file(DB), "insert into t values ('new')");
    let target = node.receive(DB, &other.ltx_after(DB, before)).unwrap();
    assert_eq!(target, other.db(DB).pos());
    let db = node.db(DB);
    wait::until_or(|| format!("{target}; at {}", db.pos()), || (db.pos() == target).then_some(()));
    assert_eq!(rows(node), "1,new");
    check_chain(&node.db_dir(DB), target);
}

#[test_matrix(["delete", "truncate", "persist", "wal"], ["auto", "off"])]
fn a_commit_that_comes_too_late_does_not_get_into_the_chain(mode: &str, passthrough: &str) {
    let node = primary(mode, passthrough);
    let mut writer = Shell::open(&node.file(DB));
    // A sync of the WAL, also of its new header, would be refused.
    writer.run("pragma synchronous=off; begin immediate; insert into t values (2)");
    let before = node.db(DB).pos();
    // As another node would have got it.
    let drained = node.engine.stop_writes(Duration::ZERO);
    assert_eq!(drained.unfinished, [node.db(DB).name().clone()]);
    node.engine.set_role(replica());
    let is_seen = mode == "wal" && passthrough == "auto";
    if is_seen {
        // SQLite asks nobody.
        writer.run("commit");
        wait::until_true("the commit in lost+found", || lost_and_found(&node).len() == 1);
        let name = format!("{0}-{0}.ltx", before.txid.next());
        assert_eq!(lost_and_found(&node), [name]);
        wait::until_true("the commit out of the log", || rows(&node) == "1");
    } else {
        writer.refused("commit");
        writer.attempt("rollback");
        assert_eq!(rows(&node), "1");
        assert!(lost_and_found(&node).is_empty());
    }
    assert_eq!(node.db(DB).pos(), before);
    writer.close();
    follow_another(&node, passthrough, before);
    assert_eq!(lost_and_found(&node).len(), usize::from(is_seen));
}

/// A late commit of a primary that has become a replica, with applications that have the log open: one in
/// the middle of a read, one that does nothing, and the one that committed.
#[test_matrix(["insert into t values (2)", "create table seen(x); insert into seen values (2)"])]
fn a_late_commit_is_taken_out_of_a_log_that_is_open(late: &str) {
    let changes_schema = late.starts_with("create");
    let node = primary("wal", "auto");
    let [mut writer, mut reader, mut idle] = [(); 3].map(|()| Shell::open(&node.file(DB)));
    let count = "select count(*) from t";
    assert_eq!((reader.run(count), idle.run(count)), ("1".to_owned(), "1".to_owned()));
    writer.run(&format!("pragma synchronous=off; begin immediate; {late}"));
    let before = node.db(DB).pos();
    node.engine.stop_writes(Duration::ZERO);
    node.engine.set_role(replica());
    reader.run(&format!("begin; {count}"));
    writer.run("commit");
    wait::until_true("the commit in lost+found", || lost_and_found(&node).len() == 1);
    // As long as somebody reads from the log it stays, and shows him what he has seen.
    assert_eq!(reader.run(count), "1");
    assert_eq!(node.db(DB).pos(), before);
    reader.run("commit");
    wait::until_true("the commit out of the log", || rows(&node) == "1");
    let other = Local::primary("auto", 2, Some(&node.data()));
    assert_eq!(other.db(DB).pos(), before);
    // With the number that the lost schema had.
    sqlite::run(&other.file(DB), "create table other(x); insert into t values ('new')");
    while node.db(DB).pos() != other.db(DB).pos() {
        let next = node.receive(DB, &other.ltx_after(DB, node.db(DB).pos())).unwrap();
        wait::until_true("what the other one has", || node.db(DB).pos() == next);
    }
    for (connection, seen) in [(&mut writer, "seen"), (&mut reader, "t"), (&mut idle, "t")] {
        if changes_schema {
            for sql in [&format!("select * from {seen}"), count] {
                let complaint = connection.refused(sql);
                let ended = ["disk I/O error", "unable to open database file"];
                assert!(ended.iter().any(|text| complaint.contains(text)), "{sql}: {complaint}");
            }
        } else {
            assert_eq!(connection.run(count), "2");
            assert_eq!(connection.run("select count(*) from other"), "0");
        }
        connection.reopen(&node.file(DB));
        assert_eq!(connection.run("select group_concat(x) from t"), "1,new");
    }
    assert_eq!((rows(&node).as_str(), lost_and_found(&node).len()), ("1,new", 1));
    [writer, reader, idle].into_iter().for_each(Shell::close);
    check_chain(&node.db_dir(DB), other.db(DB).pos());
}

/// Its frames must not be gone on from, whoever writes next.
#[test_matrix(["auto"])]
fn a_primary_that_is_primary_again_goes_on_from_its_chain(passthrough: &str) {
    let node = primary("wal", passthrough);
    let mut reader = Shell::open(&node.file(DB));
    let mut writer = Shell::open(&node.file(DB));
    // A sync of the WAL, also of its new header, would be refused.
    writer.run("pragma synchronous=off; begin immediate; insert into t values (2)");
    let before = node.db(DB).pos();
    node.engine.set_role(Role::Unknown);
    writer.run("commit");
    wait::until_true("the commit in lost+found", || lost_and_found(&node).len() == 1);
    // Keeps the frames where they are.
    reader.attempt("begin; select count(*) from t");
    node.engine.set_role(Role::Primary);
    assert_eq!(node.db(DB).pos(), before);
    reader.run("commit");
    let insert = || {
        writer.attempt("insert into t values (3)");
        node.db(DB).pos().txid > before.txid
    };
    wait::until_true("a writer to be let in", insert);
    assert_eq!(rows(&node), "1,3");
    assert_eq!(node.db(DB).pos().txid, before.txid.next());
    let log = fs::metadata(node.db_dir(DB).wal()).unwrap().len();
    assert!(log > HEADER_SIZE as u64, "the log is in use");
    check_chain(&node.db_dir(DB), node.db(DB).pos());
}

/// A new primary takes writers as soon as it has applied what it has received.
#[test_matrix(["delete", "wal"], ["auto", "off"])]
fn a_new_primary_first_applies_what_it_has_received(mode: &str, passthrough: &str) {
    let node = primary(mode, passthrough);
    let other = Local::primary(passthrough, 2, Some(&node.data()));
    let before = node.db(DB).pos();
    sqlite::run(&other.file(DB), "insert into t values ('old primary')");
    let bytes = other.ltx_after(DB, before);
    node.engine.set_role(replica());
    // In rollback mode a transaction waits for readers.
    let mut reader = Shell::open(&node.file(DB));
    reader.run("begin; select count(*) from t");
    let received = node.receive(DB, &bytes).unwrap();
    node.engine.set_role(Role::Primary);
    let late = node.receive(DB, &bytes);
    assert!(matches!(late, Err(Error::Busy { .. })), "{late:?}");
    let mut writer = Shell::open(&node.file(DB));
    if mode != "wal" {
        writer.refused("begin immediate");
        assert_eq!(node.db(DB).pos(), before);
    }
    reader.run("commit");
    let insert = || {
        writer.attempt("insert into t values ('new primary')");
        node.db(DB).pos().txid > received.txid
    };
    wait::until_true("a writer to be let in", insert);
    assert_eq!(rows(&node), "1,old primary,new primary");
    check_chain(&node.db_dir(DB), node.db(DB).pos());
}

/// Begins a transaction that is larger than the page cache, so that half of it is in the file.
fn spill(writer: &mut Shell) {
    writer.run(
        "pragma cache_size = 4; begin immediate; \
         insert into t select hex(randomblob(3000)) from \
         (with recursive n(i) as (select 1 union all select i + 1 from n where i < 50) select i from n)",
    );
}

/// What an application left half-written when it died is not what the next transaction goes on from.
#[test_matrix(["delete", "persist"], ["auto", "off"])]
fn a_dead_writer_of_a_former_primary_leaves_nothing(mode: &str, passthrough: &str) {
    let node = primary(mode, passthrough);
    let before = node.db(DB).pos();
    let other = Local::primary(passthrough, 2, Some(&node.data()));
    sqlite::run(&other.file(DB), "insert into t values ('new')");
    let mut writer = Shell::open(&node.file(DB));
    spill(&mut writer);
    node.engine.set_role(replica());
    writer.kill();
    let target = node.receive(DB, &other.ltx_after(DB, before)).unwrap();
    let db = node.db(DB);
    wait::until_or(|| format!("{target}; at {}", db.pos()), || (db.pos() == target).then_some(()));
    assert_eq!(rows(&node), "1,new");
    check_chain(&node.db_dir(DB), target);
}

/// Nobody else has to come and roll it back first.
#[test_matrix(["delete", "truncate", "persist"])]
fn a_database_with_a_hot_journal_is_rolled_back_and_copied_out(mode: &str) {
    let node = primary(mode, "auto");
    let mut writer = Shell::open(&node.file(DB));
    let before = node.db(DB).pos();
    spill(&mut writer);
    writer.kill();
    let copy = node.data().with_extension("copy");
    let pos = node.db(DB).export(&mut fs::File::create(&copy).unwrap()).unwrap();
    assert_eq!(pos, before);
    let found = sqlite::run(&copy, "pragma integrity_check; select group_concat(x) from t");
    assert_eq!(found, "ok\n1");
    node.db(DB).snapshot(&mut Vec::new()).unwrap();
    sqlite::run(&node.file(DB), "insert into t values (2)");
    assert_eq!(rows(&node), "1,2");
    check_chain(&node.db_dir(DB), node.db(DB).pos());
}

/// SQLite rolls a commit back whose sync fails, and leaves its frames in the WAL. The next application
/// builds the wal-index from all that is valid there.
#[test]
fn a_commit_refused_at_its_sync_is_found_by_nobody() {
    let node = primary("wal", "auto");
    let mut writer = Shell::open(&node.file(DB));
    writer.run("insert into t values (2)");
    let before = node.db(DB).pos();
    writer.run("begin; insert into t values (3)");
    let fence = &node.engine.shared().fence;
    fence.confirm(BootTime::START);
    let complaint = writer.refused("commit");
    assert!(complaint.contains("disk I/O error"), "{complaint}");
    fence.confirm(BootTime::NEVER);
    // It dies, so that nobody ends the wal-index in good order.
    drop(writer);
    assert_eq!(rows(&node), "1,2");
    assert_eq!(node.db(DB).pos(), before);
    sqlite::run(&node.file(DB), "insert into t values (4)");
    assert_eq!(rows(&node), "1,2,4");
    check_chain(&node.db_dir(DB), node.db(DB).pos());
}
