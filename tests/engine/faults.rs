//! What must not get lost when a step fails or the process ends there.

use std::fs;
use std::path::Path;

use litefs::engine::db::{DbState, Refusal};
use litefs::engine::files::FileKind;
use litefs::engine::locks::LockKind;
use litefs::os::fault::{self, Fault};
use litefs::sqlite::lock_byte::{Lock, LockSet};
use litefs::sqlite::wal::{ByteOrder, Frame, Salts, WalCursor, WalHeader};
use ltx::{PageSize, Pgno, Txid};

use crate::support::wait;

use super::{
    PAGE, asked, begin, commit, contents, database, file, image, lock, primary, unlock_all,
};

/// Makes the next call with this label fail in this thread, after `after` that succeed.
fn fail(label: &str, after: u32) {
    fault::arm_here(Fault { label: label.to_owned(), after, errno: libc::EIO });
}

/// The log of one transaction that writes page 1.
fn wal(page_size: u32) -> Vec<u8> {
    let page_size = PageSize::new(page_size).unwrap();
    let (order, salts) = (ByteOrder::NATIVE, Salts(1, 2));
    let header = WalHeader { order, page_size, sequence: 0, salts };
    let mut bytes = header.encode().to_vec();
    let page = vec![7; page_size.bytes()];
    WalCursor::start(&header)
        .encode(&Frame { pgno: Pgno(1), commit: Some(1), page: &page }, &mut bytes);
    bytes
}

/// A node's directory with one database whose files are not known to be one state.
fn lost_database(dir: &Path) {
    let engine = primary(dir);
    commit(&database(&engine, "db"), &image(9));
    engine.close().unwrap();
    let db = dir.join("dbs/db");
    fs::write(db.join("database"), vec![b'x'; 2 * PAGE]).unwrap();
    fs::write(db.join("wal"), wal(4096)).unwrap();
    let newest = fs::read_dir(db.join("ltx")).unwrap().next().unwrap().unwrap().path();
    fs::write(newest, b"torn").unwrap();
}

#[test]
fn a_database_that_cannot_be_recovered_is_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    lost_database(dir.path());
    let before = contents(&dir.path().join("dbs/db"));
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    assert!(matches!(db.state(), DbState::Failed(_)));
    assert_eq!(lock(&db, LockSet::one(Lock::Write), LockKind::Exclusive), Err(Refusal::WouldBlock));
    // The last client to leave wants to checkpoint, and then to remove the log.
    lock(&db, LockSet::one(Lock::Shared), LockKind::Exclusive).unwrap();
    assert!(db.remove_wal().is_err());
    db.flush(litefs::engine::locks::Owner::client(super::CLIENT), LockSet::ALL);
    assert!(asked(|answer| db.drop_database(answer)).is_err());
    assert!(matches!(db.state(), DbState::Failed(_)));
    engine.close().unwrap();
    assert!(contents(&dir.path().join("dbs/db")) == before);
}

#[test]
fn an_import_takes_the_place_of_a_lost_database() {
    let dir = tempfile::tempdir().unwrap();
    lost_database(dir.path());
    let (engine, content) = (primary(dir.path()), image(5));
    let db = database(&engine, "db");
    let source = dir.path().join("import");
    fs::write(&source, &content).unwrap();
    let pos = db.import(&source).unwrap();
    assert_eq!(db.state(), DbState::Ready);
    engine.close().unwrap();
    let db = database(&primary(dir.path()), "db");
    assert_eq!((db.pos(), db.state()), (pos, DbState::Ready));
    assert!(fs::read(dir.path().join("dbs/db/database")).unwrap()[PAGE..] == content[PAGE..]);
}

#[test]
fn an_import_that_fails_half_way_is_seen_by_nobody_and_finished_by_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, content) = (primary(dir.path()), image(20));
    let db = database(&engine, "db");
    commit(&db, &image(3));
    let source = dir.path().join("import");
    fs::write(&source, &content).unwrap();
    fail("apply:database", 2);
    db.import(&source).unwrap_err();
    assert!(!fault::disarm_here(), "it failed where it should");
    assert!(matches!(db.state(), DbState::Failed(_)));
    assert_eq!(lock(&db, LockSet::one(Lock::Shared), LockKind::Shared), Err(Refusal::WouldBlock));
    engine.close().unwrap();
    let db = database(&primary(dir.path()), "db");
    assert_eq!((db.pos().txid, db.state()), (Txid(2), DbState::Ready));
    assert!(fs::read(dir.path().join("dbs/db/database")).unwrap()[PAGE..] == content[PAGE..]);
}

#[test]
fn an_import_that_failed_can_be_made_again_with_another_file() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, content) = (primary(dir.path()), image(8));
    let db = database(&engine, "db");
    commit(&db, &image(3));
    let source = dir.path().join("import");
    fs::write(&source, image(20)).unwrap();
    fail("apply:database", 2);
    db.import(&source).unwrap_err();
    fs::write(&source, &content).unwrap();
    let pos = db.import(&source).unwrap();
    lock(&db, LockSet::one(Lock::Shared), LockKind::Shared).unwrap();
    unlock_all(&db);
    engine.close().unwrap();
    assert_eq!(database(&primary(dir.path()), "db").pos(), pos);
    assert!(fs::read(dir.path().join("dbs/db/database")).unwrap()[PAGE..] == content[PAGE..]);
}

#[test]
fn an_import_leaves_no_journal_that_would_be_played_back_over_it() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    commit(&db, &image(3));
    begin(&db, &image(4));
    unlock_all(&db); // The client died.
    let source = dir.path().join("import");
    fs::write(&source, image(9)).unwrap();
    db.import(&source).unwrap();
    assert_eq!(fs::metadata(dir.path().join("dbs/db/journal")).unwrap().len(), 0);
}

#[test]
fn a_commit_that_fails_does_not_come_back_at_the_next_start() {
    // While the LTX file is made durable, and when the journal is to go.
    for label in ["chain:ltx", "chain:dir", "files:remove"] {
        for after in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let engine = primary(dir.path());
            let db = database(&engine, "db");
            commit(&db, &image(3));
            begin(&db, &image(4));
            fail(label, after);
            let failed = asked(|answer| db.remove_journal(answer)).is_err();
            fault::disarm_here();
            if !failed {
                assert!(after > 0, "{label} is never called");
                break;
            }
            assert_eq!(db.pos().txid, Txid(1), "{label} {after}");
            let left = fs::read_dir(dir.path().join("dbs/db/ltx")).unwrap().count();
            assert_eq!(left, 1, "{label} {after}");
        }
    }
}

#[test]
fn no_checkpoint_moves_frames_that_could_not_be_captured() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    commit(&db, &image(3));
    lock(&db, LockSet::one(Lock::Write), LockKind::Exclusive).unwrap();
    let log = file(&db, FileKind::Wal);
    asked(|answer| db.write_wal(&log, 0, &wal(512), answer)).unwrap(); // Of another page size.
    unlock_all(&db);
    assert!(matches!(db.state(), DbState::Failed(_)));
    assert_eq!(lock(&db, LockSet::one(Lock::Ckpt), LockKind::Exclusive), Err(Refusal::WouldBlock));
    let index = LockSet::one(Lock::Ckpt).with(Lock::Recover);
    assert_eq!(lock(&db, index, LockKind::Exclusive), Ok(()), "a new wal-index may help");
}

#[test]
fn writers_are_let_in_again_after_a_sync_that_failed_once() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    let content = image(3);
    lock(&db, super::write_locks(), LockKind::Exclusive).unwrap();
    let journal = file(&db, FileKind::Journal);
    db.write_journal(&journal, 0, &[1; 512]).unwrap(); // And not synced.
    db.write_database(&file(&db, FileKind::Database), 0, &content).unwrap();
    asked(|answer| db.remove_journal(answer)).unwrap();
    unlock_all(&db);
    fail("chain:ltx", 0);
    db.chain().sync().unwrap_err();
    let reserved = LockSet::one(Lock::Reserved);
    wait::until_true("a write lock", || lock(&db, reserved, LockKind::Exclusive).is_ok());
    assert_eq!(db.state(), DbState::Ready);
    assert!(db.chain().is_durable(Txid(1)));
}
