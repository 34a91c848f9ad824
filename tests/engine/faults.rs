//! What must not get lost when a step fails or the process ends there.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use litefs::engine::Db;
use litefs::engine::db::{DbState, Refusal};
use litefs::engine::files::FileKind;
use litefs::engine::locks::LockKind;
use litefs::os::fault::{self, Call, Fault, Verdict, Watch};
use litefs::sqlite::lock_byte::{Lock, LockSet};
use litefs::sqlite::wal::{ByteOrder, Frame, Salts, WalCursor, WalHeader};
use ltx::{PageSize, Pgno, Txid};

use crate::support::local::copy;
use crate::support::no_cache::NoCache;
use crate::support::wait;

use super::mapped::Mapped;
use super::replica::Refusing;
use super::{
    PAGE, VIA, asked, begin, commit, contents, database, fence, file, image, lock, open, primary,
    unlock_all,
};

/// Makes the next call with this label fail in this thread, after `after` that succeed.
pub(super) fn fail(label: &str, after: u32) {
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
pub(super) fn lost_database(dir: &Path) {
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
    assert!(db.drop_database().is_err());
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
    for label in ["chain:ltx", "chain:sync", "chain:dir", "files:remove"] {
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

/// Writes of zeros end after some bytes, and then the disk is full.
struct TornEnd {
    bytes: AtomicUsize,
}

impl Watch for TornEnd {
    fn before(&self, label: &str, call: &Call<'_>) -> Verdict {
        match call {
            Call::Write(.., data) if label == "journal:write" && data.iter().all(|b| *b == 0) => {
                match self.bytes.swap(0, Ordering::SeqCst) {
                    0 => Verdict::Fail(libc::ENOSPC),
                    bytes => Verdict::Short(bytes),
                }
            }
            _ => Verdict::Go,
        }
    }

    fn after(&self, _: &str, _: &Call<'_>) {}
}

#[test]
fn a_journal_whose_header_is_zeroed_in_part_has_ended() {
    for bytes in [0, 1, 14] {
        let dir = tempfile::tempdir().unwrap();
        let engine = primary(dir.path());
        let db = database(&engine, "db");
        commit(&db, &image(3));
        begin(&db, &image(4));
        let torn = Arc::new(TornEnd { bytes: AtomicUsize::new(bytes) });
        let watching = fault::watch(dir.path(), torn);
        let journal = file(&db, FileKind::Journal);
        let ended = asked(|answer| db.write_journal(&journal, 0, &[0; 28], answer));
        drop(watching);
        assert_eq!(
            (ended.is_ok(), db.pos().txid.0),
            if bytes > 0 { (true, 2) } else { (false, 1) }
        );
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
    asked(|answer| db.write_wal(&log, VIA, 0, &wal(512), answer)).unwrap(); // Of another page size.
    unlock_all(&db);
    assert!(matches!(db.state(), DbState::Failed(_)));
    assert_eq!(lock(&db, LockSet::one(Lock::Ckpt), LockKind::Exclusive), Err(Refusal::WouldBlock));
    let index = LockSet::one(Lock::Ckpt).with(Lock::Recover);
    assert_eq!(lock(&db, index, LockKind::Exclusive), Ok(()), "a new wal-index may help");
}

/// The application may have nothing more to write, and the replicas wait for the commit.
#[test]
fn a_commit_that_could_not_be_captured_once_is_captured_without_another_client() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let (db, page) = fence::wal_database(&engine);
    fence::begin_wal(&db, &page);
    let watching = fault::watch(dir.path(), Arc::new(Refusing("read:wal")));
    unlock_all(&db);
    assert!(matches!(db.state(), DbState::Failed(_)));
    drop(watching);
    wait::until_true("the commit", || (db.pos().txid, db.state()) == (Txid(2), DbState::Ready));
    engine.close().unwrap();
}

/// When every page is compared after a failure, what stands in the log behind the last commit of the
/// wal-index is no commit: neither the one of an application that died before it said so there, nor half of
/// a copy of the last frame, with which SQLite fills a sector.
#[test]
fn a_comparison_of_all_pages_ends_where_the_wal_index_does() {
    for torn in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let engine = primary(dir.path());
        engine.mounted(Arc::new(NoCache), true);
        let (db, page) = fence::wal_database(&engine);
        let other = |byte| [&page[..PAGE - 1], &[byte]].concat();
        let mut log = Mapped::new(&db);
        log.write(1, &page, fence::FRAME);
        log.index(1);
        log.write_lock();
        log.write(2, &other(1), fence::FRAME);
        log.index(2);
        let committed = fence::files(dir.path());
        let watching = fault::watch(dir.path(), Arc::new(Refusing("read:wal")));
        log.write_lock();
        assert!(matches!(db.state(), DbState::Failed(_)));
        match torn {
            true => log.write(3, &other(1), fence::FRAME / 2),
            false => log.write(3, &other(2), fence::FRAME),
        }
        drop(watching);
        wait::until_true("the commit", || db.state() == DbState::Ready);
        assert_eq!((db.pos().txid, db.pos().checksum), (Txid(3), committed));
        log.write(3, &other(3), fence::FRAME);
        log.index(3);
        log.write_lock();
        assert_eq!((db.pos().txid, db.pos().checksum), (Txid(4), fence::files(dir.path())));
        engine.close().unwrap();
    }
}

#[test]
fn an_import_takes_the_place_of_a_log_that_cannot_be_captured() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, content) = (primary(dir.path()), image(5));
    let db = database(&engine, "db");
    commit(&db, &image(3));
    lock(&db, LockSet::one(Lock::Write), LockKind::Exclusive).unwrap();
    let (log, bytes) = (file(&db, FileKind::Wal), wal(512)); // Of another page size.
    asked(|answer| db.write_wal(&log, VIA, 0, &bytes, answer)).unwrap();
    unlock_all(&db);
    assert!(matches!(db.state(), DbState::Failed(_)));
    let source = dir.path().join("import");
    fs::write(&source, &content).unwrap();
    let pos = db.import(&source).unwrap();
    assert_eq!((pos.txid, db.state()), (Txid(2), DbState::Ready));
    assert!(fs::read(dir.path().join("dbs/db/lost+found/wal")).unwrap() == bytes);
    commit(&db, &image(7));
    engine.close().unwrap();
    let db = database(&primary(dir.path()), "db");
    assert_eq!((db.pos().txid, db.state()), (Txid(3), DbState::Ready));
}

/// Fails syncs with this label, and counts what is written again.
struct Unsynced {
    label: &'static str,
    written: AtomicUsize,
}

impl Unsynced {
    fn new(label: &'static str) -> Arc<Unsynced> {
        Arc::new(Unsynced { label, written: AtomicUsize::new(0) })
    }
}

impl Watch for Unsynced {
    fn before(&self, label: &str, call: &Call<'_>) -> Verdict {
        match call {
            Call::Sync(_) if label == self.label => Verdict::Fail(libc::EIO),
            _ => Verdict::Go,
        }
    }

    fn after(&self, label: &str, call: &Call<'_>) {
        if let (Call::Write(_, _, data), "unsynced:write") = (call, label) {
            self.written.fetch_add(data.len(), Ordering::SeqCst);
        }
    }
}

/// The kernel does not write again what it could not write, and a start reads it from the page cache.
fn check_written_again(dir: &Path) {
    let watch = Unsynced::new("");
    let len = fs::metadata(dir.join("dbs/db/database")).unwrap().len();
    let watching = fault::watch(dir, watch.clone());
    let engine = primary(dir);
    drop(watching);
    let db = database(&engine, "db");
    assert_eq!(watch.written.load(Ordering::SeqCst) as u64, len);
    commit(&db, &image(7));
    assert!(db.retain(Duration::ZERO, None).unwrap() > 0);
    engine.close().unwrap();
    let watching = fault::watch(dir, watch.clone());
    primary(dir).close().unwrap();
    drop(watching);
    assert_eq!(watch.written.load(Ordering::SeqCst) as u64, len, "once is enough");
}

#[test]
fn an_import_whose_sync_failed_is_written_again_by_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    commit(&db, &image(9));
    let source = dir.path().join("import");
    let mut content = image(3);
    content[18..20].fill(2); // In WAL mode: then it is synced.
    fs::write(&source, content).unwrap();
    let watching = fault::watch(dir.path(), Unsynced::new("apply:database"));
    db.import(&source).unwrap_err();
    drop(watching);
    engine.close().unwrap();
    check_written_again(dir.path());
}

#[test]
fn no_ltx_file_goes_after_a_sync_that_failed_until_the_file_is_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    commit(&db, &image(9));
    commit(&db, &image(3));
    let watching = fault::watch(dir.path(), Unsynced::new("retain:sync"));
    db.retain(Duration::ZERO, None).unwrap_err();
    drop(watching);
    let refused = db.retain(Duration::ZERO, None).unwrap_err();
    assert!(refused.to_string().contains("until a restart"), "{refused}");
    assert_eq!(db.chain().stats().count, 2);
    engine.close().unwrap();
    check_written_again(dir.path());
}

/// What an application syncs may be what a replica has written before, which SQLite does not write again.
#[test]
fn a_sync_of_an_application_that_failed_is_made_up_for_by_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    commit(&db, &image(9));
    let watching = fault::watch(dir.path(), Unsynced::new("files:sync"));
    db.sync_file(&file(&db, FileKind::Database), VIA).unwrap_err();
    drop(watching);
    engine.close().unwrap();
    check_written_again(dir.path());
}

/// The last sync of a node that ends, of a database with a journal and of one with a log.
#[test]
fn a_sync_that_failed_at_the_end_is_made_up_for_by_the_next_start() {
    for label in ["close:database", "checkpoint:database"] {
        let dir = tempfile::tempdir().unwrap();
        let engine = primary(dir.path());
        if label == "checkpoint:database" {
            let (db, page) = fence::wal_database(&engine);
            fence::begin_wal(&db, &page);
            unlock_all(&db);
        } else {
            commit(&database(&engine, "db"), &image(9));
        }
        let watching = fault::watch(dir.path(), Unsynced::new(label));
        engine.close().unwrap_err();
        drop(watching);
        drop(engine);
        check_written_again(dir.path());
    }
}

#[test]
fn writers_are_let_in_again_after_a_sync_that_failed_once() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    let content = image(3);
    lock(&db, super::write_locks(), LockKind::Exclusive).unwrap();
    let journal = file(&db, FileKind::Journal);
    asked(|answer| db.write_journal(&journal, 0, &[1; 512], answer)).unwrap(); // And not synced.
    db.write_database(&file(&db, FileKind::Database), 0, &content).unwrap();
    asked(|answer| db.remove_journal(answer)).unwrap();
    unlock_all(&db);
    fail("chain:sync", 0);
    db.chain().sync().unwrap_err();
    let reserved = LockSet::one(Lock::Reserved);
    wait::until_true("a write lock", || lock(&db, reserved, LockKind::Exclusive).is_ok());
    assert_eq!(db.state(), DbState::Ready);
    assert!(db.chain().is_durable(Txid(1)));
}

/// One transaction whose journal the application does not sync.
fn commit_unsynced(db: &Db, content: &[u8]) {
    lock(db, super::write_locks(), LockKind::Exclusive).unwrap();
    let journal = file(db, FileKind::Journal);
    asked(|answer| db.write_journal(&journal, 0, &[1; 512], answer)).unwrap();
    db.write_database(&file(db, FileKind::Database), 0, content).unwrap();
    asked(|answer| db.remove_journal(answer)).unwrap();
    unlock_all(db);
}

/// The LTX file of one transaction.
fn ltx_path(db: &Db, txid: u64) -> PathBuf {
    db.chain().dir().ltx_file(Txid(txid), Txid(txid))
}

fn is_whole(path: &Path) -> bool {
    ltx::verify(fs::File::open(path).unwrap()).is_ok()
}

/// After a failed sync Linux takes the pages for clean, and may drop them.
#[test]
fn a_file_whose_sync_failed_is_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    commit_unsynced(&db, &image(3));
    fail("chain:sync", 0);
    db.chain().sync().unwrap_err();
    let path = ltx_path(&db, 1);
    let len = fs::metadata(&path).unwrap().len();
    fs::write(&path, vec![0; len as usize]).unwrap();
    db.chain().sync().unwrap();
    assert!(db.chain().is_durable(Txid(1)) && is_whole(&path));
}

#[test]
fn a_file_whose_sync_failed_is_copied_or_set_aside_when_its_pages_have_changed() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    for rows in [3, 9, 4] {
        commit_unsynced(&db, &image(rows));
    }
    let paths = [1, 2, 3].map(|txid| ltx_path(&db, txid));
    fail("chain:sync", 0);
    db.chain().sync().unwrap_err();
    let inode = |path: &PathBuf| fs::metadata(path).unwrap().ino();
    let before = inode(&paths[0]);
    fs::write(&paths[1], "").unwrap();
    db.chain().sync().unwrap();
    assert!(inode(&paths[0]) != before, "it is another file");
    assert!(is_whole(&paths[0]) && is_whole(&paths[2]) && !paths[1].exists());
    assert_eq!(db.lost_found_count(), 1);
    engine.close().unwrap();
    let db = database(&primary(dir.path()), "db");
    assert_eq!((db.pos().txid, db.state()), (Txid(3), DbState::Ready));
}

/// What is to be found after a crash here: the state of the files and of the memory is one.
#[track_caller]
fn check_dropped_or_not(dir: &Path, db: &Db, failed: bool, what: &str) {
    let pos = db.pos();
    assert_eq!(pos.txid, Txid(if failed { 1 } else { 2 }), "{what}");
    assert_eq!(db.files().get(FileKind::Database).is_some(), failed, "{what}");
    let crashed = tempfile::tempdir().unwrap();
    copy(&dir.join("dbs"), &crashed.path().join("dbs"));
    let engine = primary(crashed.path());
    let again = database(&engine, "db");
    assert_eq!((again.pos(), again.state()), (pos, DbState::Ready), "{what}");
    assert_eq!(again.files().get(FileKind::Database).is_some(), failed, "{what}");
    engine.close().unwrap();
}

#[test]
fn a_drop_that_fails_anywhere_is_done_or_not_done() {
    for label in ["chain:ltx", "chain:sync", "chain:dir", "files:remove"] {
        for after in 0.. {
            let what = format!("{label} {after}");
            let dir = tempfile::tempdir().unwrap();
            let engine = primary(dir.path());
            let db = database(&engine, "db");
            commit(&db, &image(3));
            fail(label, after);
            let failed = db.drop_database().is_err();
            let fired = !fault::disarm_here();
            check_dropped_or_not(dir.path(), &db, failed, &what);
            if !failed {
                // It can be made again, whatever was left of it.
                file(&db, FileKind::Database);
                commit(&db, &image(5));
                assert_eq!(db.pos().txid, Txid(3), "{what}");
            }
            engine.close().unwrap();
            if !fired {
                assert!(after > 0, "{label} is never called");
                break;
            }
        }
    }
}

#[test]
fn what_could_not_be_taken_back_keeps_others_out_until_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    commit(&db, &image(3));
    fail("chain:sync", 0);
    fail("chain:withdraw", 0);
    db.drop_database().unwrap_err();
    assert!(!fault::disarm_here());
    assert!(matches!(db.state(), DbState::Failed(_)));
    let reserved = LockSet::one(Lock::Reserved);
    wait::until_true("a write lock", || lock(&db, reserved, LockKind::Exclusive).is_ok());
    unlock_all(&db);
    check_dropped_or_not(dir.path(), &db, true, "after the retry");
}

#[test]
fn one_bad_database_fails_alone() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    for name in ["good", "listless", "shapeless"] {
        commit(&database(&engine, name), &image(3));
    }
    engine.close().unwrap();
    let dbs = dir.path().join("dbs");
    fs::remove_dir_all(dbs.join("listless/ltx")).unwrap();
    fs::write(dbs.join("listless/ltx"), "no directory").unwrap();
    fs::remove_file(dbs.join("shapeless/database")).unwrap();
    fs::create_dir(dbs.join("shapeless/database")).unwrap();
    let before = contents(&dbs.join("listless"));
    let engine = primary(dir.path());
    assert_eq!(database(&engine, "good").state(), DbState::Ready);
    commit(&database(&engine, "good"), &image(4));
    for name in ["listless", "shapeless"] {
        let db = database(&engine, name);
        assert!(matches!(db.state(), DbState::Failed(_)), "{name}");
        assert!(db.create_file(FileKind::Database).is_err(), "{name}");
        assert_eq!(
            lock(&db, LockSet::one(Lock::Reserved), LockKind::Exclusive),
            Err(Refusal::WouldBlock)
        );
    }
    assert!(contents(&dbs.join("listless")) == before);
    // Once the cause is gone, an import takes its place.
    fs::remove_dir(dbs.join("shapeless/database")).unwrap();
    let source = dir.path().join("import");
    fs::write(&source, image(7)).unwrap();
    let pos = database(&engine, "shapeless").import(&source).unwrap();
    engine.close().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "shapeless");
    assert_eq!((db.pos(), db.state()), (pos, DbState::Ready));
}

#[test]
fn a_data_directory_in_use_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let refused = open(dir.path()).err().unwrap().to_string();
    assert!(refused.contains(&dir.path().display().to_string()), "{refused}");
    assert!(refused.contains("in use by another process"), "{refused}");
    engine.close().unwrap();
    open(dir.path()).unwrap();
}
