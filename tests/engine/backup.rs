//! What a primary knows of a backup that was made before it: what counts for one history says nothing
//! about another.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use litefs::engine::backup::Need;
use litefs::engine::locks::LockKind;
use litefs::engine::{Db, Engine, Role};
use litefs::sqlite::lock_byte::{Lock, LockSet};
use ltx::{Checksum, Pos, Txid};
use test_case::test_case;

use super::replica::{
    ltx_file, ltx_range, other_history, receive, replica, snapshot, two_transactions,
};
use super::{PAGE, commit, database, image, lock, primary, unlock_all};
use crate::support::no_cache::NoCache;
use crate::support::wait;

/// What a primary of the database would do about a backup at `remote`.
enum Does {
    GoesOn,
    Stands,
}

#[track_caller]
fn check(engine: &Engine, remote: Pos, does: Does) {
    engine.set_role(Role::Primary);
    let need = database(engine, "db").backup_need(remote).unwrap();
    match (need, does) {
        (Need::Upload(upload), Does::GoesOn) => assert_eq!(upload.header.pre_pos(), remote),
        (Need::Diverged(_), Does::Stands) => {}
        (Need::Upload(upload), Does::Stands) => {
            panic!("{remote} is gone on from: {:?}", upload.pos)
        }
        (Need::Diverged(why), Does::GoesOn) => panic!("{why}"),
        (Need::Nothing | Need::Restore(_), _) => panic!("neither was asked for"),
    }
    engine.close().unwrap();
}

/// Has the snapshot of another history take the place of what is there.
fn replace(engine: &Engine, db: &Db) {
    let target = receive(engine, "db", &other_history(3)).unwrap();
    wait::until_true("the snapshot", || db.pos() == target);
}

/// How a replica comes to know that a snapshot may be of another history.
#[test_case(|engine, _, _| engine.shared().set_same_line(false); "another primary")]
#[test_case(|_, db, pos| db.set_contradicted(pos); "the primary says so")]
fn a_mark_of_a_former_primary_says_nothing_about_another_history(says: fn(&Engine, &Db, Pos)) {
    let dir = tempfile::tempdir().unwrap();
    let (engine, db, pos) = two_transactions(dir.path());
    db.set_hwm(pos.txid);
    says(&engine, &db, pos);
    replace(&engine, &db);
    check(&engine, pos, Does::Stands);
}

#[test]
fn a_mark_counts_when_a_snapshot_takes_the_place_of_its_own_history() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, db, pos) = two_transactions(dir.path());
    db.set_hwm(pos.txid);
    replace(&engine, &db);
    check(&engine, pos, Does::GoesOn);
}

/// The primary told how far its backup was, and had not sent that.
#[test]
fn a_mark_that_ran_ahead_says_nothing_about_what_came_instead() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, db, pos) = two_transactions(dir.path());
    db.set_hwm(Txid(4));
    let pages = [vec![5; PAGE], vec![6; PAGE]];
    let (other, _) = ltx_range([3, 6], pos.checksum, db.page_count() + 1, &pages);
    let target = receive(&engine, "db", &other).unwrap();
    wait::until_true("the transactions", || db.pos() == target);
    check(&engine, Pos { txid: Txid(4), checksum: Checksum::flagged(4) }, Does::Stands);
}

/// What a backup has confirmed to this node, as long as that was the primary.
#[test_case(false)]
#[test_case(true; "after a restart")]
fn what_a_backup_confirmed_says_nothing_about_another_history(restarts: bool) {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    commit(&db, &image(2));
    commit(&db, &image(3));
    let pos = db.pos();
    db.set_backed(pos, pos.txid, db.page_size()).unwrap();
    engine.close().unwrap();
    drop((engine, db));
    let engine = replica(dir.path(), Arc::new(NoCache));
    replace(&engine, &database(&engine, "db"));
    let engine = match restarts {
        false => engine,
        true => {
            engine.close().unwrap();
            drop(engine);
            primary(dir.path())
        }
    };
    check(&engine, pos, Does::Stands);
}

/// An upload that a primary began is answered when another history is here.
#[test]
fn what_a_backup_confirms_late_says_nothing_about_another_history() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, db, pos) = two_transactions(dir.path());
    let page_size = db.page_size();
    db.set_contradicted(pos);
    replace(&engine, &db);
    db.set_backed(pos, pos.txid, page_size).unwrap();
    assert_eq!(db.hwm(), Txid(0));
    check(&engine, pos, Does::Stands);
}

/// A backup that stands between two transactions of one LTX file, by what its writer noted of its inside.
#[test_case(true)]
#[test_case(false; "another history")]
fn a_backup_that_stands_inside_a_file_is_gone_on_from(same: bool) {
    let dir = tempfile::tempdir().unwrap();
    let engine = replica(dir.path(), Arc::new(NoCache));
    let (bytes, pages, first) = snapshot(3);
    let (at, grown) = (pages.len() as u32 + 1, [vec![3; PAGE], vec![4; PAGE]]);
    let (_, middle) = ltx_file(2, first, at, &grown[..1]);
    let (both, last) = ltx_range([2, 3], first, at, &grown);
    for bytes in [bytes, both] {
        let target = receive(&engine, "db", &bytes).unwrap();
        let db = database(&engine, "db");
        wait::until_true("the file to be applied", || db.pos() == target);
    }
    inside(dir.path(), [first, middle, last]);
    let (checksum, does) = match same {
        true => (middle, Does::GoesOn),
        false => (first, Does::Stands),
    };
    check(&engine, Pos { txid: Txid(2), checksum }, does);
}

/// Notes what is inside of the file of transactions 2 and 3, as who writes such a file does.
fn inside(dir: &Path, sums: [Checksum; 3]) {
    let mut known = sums.map(|sum| sum.get().to_be_bytes()).concat();
    known.extend(ltx::page_checksum(ltx::Pgno(1), &known).get().to_be_bytes());
    let name = format!("dbs/db/ltx/{}-{}.positions", Txid(2), Txid(3));
    fs::write(dir.join(name), known).unwrap();
}

/// The primary tells its mark right behind the snapshot, which still waits for a reader.
#[test]
fn a_mark_that_comes_before_its_snapshot_is_applied_counts_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, db, pos) = two_transactions(dir.path());
    db.set_contradicted(pos);
    db.set_hwm(Txid(1));
    let read = LockSet::one(Lock::Read1);
    wait::until_true("a reader", || lock(&db, read, LockKind::Shared).is_ok());
    let target = receive(&engine, "db", &other_history(3)).unwrap();
    assert!(db.has_queued_snapshot());
    db.set_hwm(target.txid);
    unlock_all(&db);
    wait::until_true("the snapshot", || db.pos() == target);
    assert_eq!(db.hwm(), target.txid);
    engine.close().unwrap();
}
