//! What follows on something that did not get to its end: an import, an apply, a journal.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use litefs::engine::db::{DbState, Refusal};
use litefs::engine::files::FileKind;
use litefs::engine::locks::LockKind;
use litefs::engine::{Db, Engine, PrimaryInfo, Role};
use litefs::os::fault;
use litefs::sqlite::lock_byte::{Lock, LockSet};
use ltx::{Pos, Txid};

use super::mapped::Mapped;
use super::replica::{self, Refusing, ltx_file, receive};
use super::{
    PAGE, commit, contents, database, fence, file, image, lock, primary, unlock_all, write_locks,
};
use crate::support::no_cache::NoCache;
use crate::support::wait;

fn follow(engine: &Engine) {
    let nobody = PrimaryInfo { hostname: String::new(), advertise_url: String::new() };
    engine.set_role(Role::Replica(nobody));
}

/// A primary at TXID 1 with an import that failed while its pages were written; and the snapshot of before.
fn failed_import(dir: &Path) -> (Arc<Engine>, Arc<Db>, Vec<u8>) {
    let engine = primary(dir);
    engine.mounted(Arc::new(NoCache), true);
    let db = database(&engine, "db");
    commit(&db, &image(3));
    let mut snapshot = Vec::new();
    db.snapshot(&mut snapshot).unwrap();
    let source = dir.join("import");
    fs::write(&source, image(30)).unwrap();
    let watching = fault::watch(dir, Arc::new(Refusing("apply:database")));
    db.import(&source).unwrap_err();
    drop(watching);
    (engine, db, snapshot)
}

/// The files, with all locks to be had.
fn check_readable(dir: &Path, db: &Db, pos: Pos) {
    assert_eq!((db.pos(), db.state()), (pos, DbState::Ready));
    lock(db, LockSet::one(Lock::Shared), LockKind::Shared).unwrap();
    assert_eq!(fence::files(dir), pos.checksum);
    unlock_all(db);
}

/// The next primary has nothing newer yet.
#[test]
fn a_snapshot_of_the_same_position_mends_an_import_that_failed() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, db, snapshot) = failed_import(dir.path());
    follow(&engine);
    let pos = receive(&engine, "db", &snapshot).unwrap();
    wait::until_true("the snapshot", || db.state() == DbState::Ready);
    check_readable(dir.path(), &db, pos);
    let pages = fs::metadata(dir.path().join("dbs/db/database")).unwrap().len() / PAGE as u64;
    let (next, _) = ltx_file(2, pos.checksum, pages as u32 + 1, &[vec![3; PAGE]]);
    let pos = receive(&engine, "db", &next).unwrap();
    wait::until_true("the next transaction", || db.pos() == pos);
    check_readable(dir.path(), &db, pos);
    engine.close().unwrap();
    let stored = contents(&dir.path().join("dbs/db/ltx"));
    assert!(stored.values().any(|file| *file == next), "{:?}", stored.keys());
}

#[test]
fn a_lost_database_takes_nothing_but_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, db, snapshot) = failed_import(dir.path());
    let pos = db.pos();
    engine.shared().set_same_line(true);
    follow(&engine);
    let pages = snapshot.len() as u32; // More than the database has.
    let (next, _) = ltx_file(2, pos.checksum, pages, &[vec![3; PAGE]]);
    // It is not asked for: the primary was told the position zero.
    assert!(receive(&engine, "db", &next).is_err());
    receive(&engine, "db", &snapshot).unwrap();
    wait::until_true("the snapshot", || db.state() == DbState::Ready);
    check_readable(dir.path(), &db, pos);
    engine.close().unwrap();
}

/// A primary goes on from what a replica has published, and not from what it could not.
#[test]
fn what_could_not_be_published_is_taken_back_and_tried_again() {
    for leads in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let engine = replica::replica(dir.path(), Arc::new(NoCache));
        let db = database(&engine, "db");
        let (first, pages, post) = replica::snapshot(3);
        let pos = receive(&engine, "db", &first).unwrap();
        wait::until_true("the snapshot", || db.pos() == pos);
        let watching = fault::watch(dir.path(), Arc::new(Refusing("apply:shm")));
        let more = [vec![3; PAGE], vec![4; PAGE]];
        let (next, _) = ltx_file(2, post, pages.len() as u32 + 1, &more);
        let target = receive(&engine, "db", &next).unwrap();
        wait::until_or(
            || format!("the failure: {} {:?} {}", db.pos(), db.state(), db.apply_backlog()),
            || matches!(db.state(), DbState::Failed(_)).then_some(()),
        );
        assert_eq!(db.pos(), pos);
        drop(watching);
        if leads {
            engine.set_role(Role::Primary);
        }
        wait::until_true("the transaction", || db.pos() == target && db.state() == DbState::Ready);
        assert_eq!(fence::files(dir.path()), target.checksum);
        let mut again = Vec::new();
        db.snapshot(&mut again).unwrap();
        assert_eq!(ltx::verify(&again[..]).unwrap().1.post_apply, target.checksum);
        assert_eq!(target.txid, Txid(2));
        engine.close().unwrap();
    }
}

/// One page of the WAL goes to the database file.
fn checkpoint(db: &Db, page: &[u8]) {
    lock(db, LockSet::one(Lock::Ckpt), LockKind::Exclusive).unwrap();
    db.write_database(&file(db, FileKind::Database), 0, page).unwrap();
    unlock_all(db);
}

/// Its writer died before it synced the journal, which SQLite takes for none, and the next ones write a WAL.
#[test]
fn a_journal_that_never_began_takes_no_checkpoint_for_a_transaction() {
    for stops in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let engine = primary(dir.path());
        engine.mounted(Arc::new(NoCache), true);
        let (db, page) = fence::wal_database(&engine);
        let other = [&page[..PAGE - 1], &[1]].concat();
        file(&db, FileKind::Journal);
        let mut log = Mapped::new(&db);
        log.write(1, &page, fence::FRAME);
        log.index(1);
        log.write_lock();
        checkpoint(&db, &page);
        log.write(2, &other, fence::FRAME);
        log.index(2);
        log.write_lock();
        let pos = db.pos();
        match stops {
            true => engine.close().unwrap(),
            false => follow(&engine),
        }
        drop(log);
        assert_eq!((db.pos(), fence::files(dir.path())), (pos, pos.checksum), "stops: {stops}");
        if stops {
            drop((db, engine));
            let db = database(&primary(dir.path()), "db");
            assert_eq!((db.pos(), fence::files(dir.path())), (pos, pos.checksum));
        }
    }
}

#[test]
fn a_journal_that_never_began_lets_no_transaction_without_one_in() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    commit(&db, &image(3));
    let pos = db.pos();
    lock(&db, write_locks(), LockKind::Exclusive).unwrap();
    let journal = file(&db, FileKind::Journal);
    super::asked(|answer| db.write_journal(&journal, 0, &[0; 512], answer)).unwrap();
    unlock_all(&db);
    // With journal_mode=MEMORY.
    lock(&db, write_locks(), LockKind::Exclusive).unwrap();
    let written = db.write_database(&file(&db, FileKind::Database), 0, &image(4)[..PAGE]);
    assert_eq!(written, Err(Refusal::NoTransaction));
    unlock_all(&db);
    commit(&db, &image(5));
    assert_eq!((db.pos().txid, fence::files(dir.path())), (pos.txid.next(), db.pos().checksum));
    engine.close().unwrap();
}

/// The last connection with a persistent WAL and journal_size_limit leaves a wal-index that counts frames.
#[test]
fn an_empty_wal_holds_nothing_whatever_the_wal_index_says() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    engine.mounted(Arc::new(NoCache), true);
    let (db, page) = fence::wal_database(&engine);
    let mut log = Mapped::new(&db);
    log.write(1, &page, fence::FRAME);
    log.index(1);
    log.write_lock();
    let pos = db.pos();
    lock(&db, LockSet::one(Lock::Shared), LockKind::Exclusive).unwrap();
    db.write_database(&file(&db, FileKind::Database), 0, &page).unwrap();
    db.truncate_wal(&file(&db, FileKind::Wal), 0).unwrap();
    unlock_all(&db);
    db.snapshot(&mut std::io::sink()).unwrap();
    assert!(engine.stop_writes(Duration::ZERO).unfinished.is_empty());
    assert_eq!((db.pos(), db.state()), (pos, DbState::Ready));
    engine.close().unwrap();
}
