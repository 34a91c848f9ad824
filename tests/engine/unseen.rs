//! A wal-index that is out of sight (no passthrough): which frames count for SQLite, its calls must tell, also
//! such as fail.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use litefs::engine::db::Patience;
use litefs::engine::db::{DbState, Refusal};
use litefs::engine::files::FileKind;
use litefs::engine::locks::{Handle, LockKind, Owner, Request};
use litefs::engine::{Db, Engine};
use litefs::os::fault;
use litefs::sqlite::lock_byte::{Lock, LockSet};
use litefs::sqlite::wal::{ByteOrder, Frame, Salts, WalCursor, WalHeader};
use ltx::{PageSize, Pgno};

use crate::support::wait;

use super::faults::fail;
use super::replica::Refusing;
use super::{CLIENT, PAGE, VIA, asked, fence, file, lock, primary};

const WRITE: LockSet = LockSet::one(Lock::Write);

/// A log of commits to page 1, as an application writes it.
struct Log<'a> {
    db: &'a Db,
    header: WalHeader,
    cursor: WalCursor,
}

impl Log<'_> {
    /// The log with these salts, of which nothing is written yet.
    fn new(db: &Db, salts: Salts) -> Log<'_> {
        let (order, page_size) = (ByteOrder::NATIVE, PageSize::new(PAGE as u32).unwrap());
        let header = WalHeader { order, page_size, sequence: 0, salts };
        Log { db, header, cursor: WalCursor::start(&header) }
    }

    fn write_header(&self) -> Result<(), Refusal> {
        let log = file(self.db, FileKind::Wal);
        asked(|answer| self.db.write_wal(&log, VIA, 0, &self.header.encode(), answer))
    }

    /// The frame of one commit behind the others.
    fn encode(&mut self, page: &[u8]) -> Vec<u8> {
        let (commit, mut bytes) = (Some(self.db.page_count()), Vec::new());
        self.cursor.encode(&Frame { pgno: Pgno(1), commit, page }, &mut bytes);
        bytes
    }

    fn write(&mut self, page: &[u8]) {
        let (log, offset) = (file(self.db, FileKind::Wal), self.cursor.offset());
        let bytes = self.encode(page);
        asked(|answer| self.db.write_wal(&log, VIA, offset, &bytes, answer)).unwrap();
    }

    /// One transaction, with the header if it is the first.
    fn commit(&mut self, page: &[u8]) {
        lock(self.db, WRITE, LockKind::Exclusive).unwrap();
        if self.cursor.frame() == 0 {
            self.write_header().unwrap();
        }
        self.write(page);
        unlock(self.db);
    }
}

/// Gives all locks up and waits for the answer, as a client does: frames that were refused are made invalid first.
fn unlock(db: &Db) {
    let (sender, answer) = mpsc::channel();
    db.unlock(Owner::client(CLIENT), LockSet::ALL, move || sender.send(()).unwrap());
    answer.recv_timeout(Duration::from_secs(20)).expect("an answer");
}

/// A database whose log has two commits, which are checkpointed, and images of its first page.
fn logged(engine: &Engine) -> (Arc<Db>, impl Fn(u8) -> Vec<u8>) {
    let (db, page) = fence::wal_database(engine);
    let page = move |byte| [&page[..PAGE - 1], &[byte]].concat();
    let mut log = Log::new(&db, Salts(1, 2));
    log.commit(&page(1));
    log.commit(&page(2));
    lock(&db, LockSet::one(Lock::Ckpt), LockKind::Exclusive).unwrap();
    db.write_database(&file(&db, FileKind::Database), 0, &page(2)).unwrap();
    unlock(&db);
    (db, page)
}

/// The files are the position, and writers are let in.
#[track_caller]
fn check_goes_on(dir: &Path, db: &Db) {
    wait::until_true("a write lock", || {
        db.state() == DbState::Ready && lock(db, WRITE, LockKind::Exclusive).is_ok()
    });
    unlock(db);
    assert_eq!(fence::files(dir), db.pos().checksum);
}

/// The call that starts the log over fails; SQLite goes on with the next log all the same.
#[test]
fn a_log_that_could_not_be_started_over_is_not_captured_again() {
    for label in ["wal:truncate", "wal:write"] {
        let dir = tempfile::tempdir().unwrap();
        let engine = primary(dir.path());
        let (db, page) = logged(&engine);
        let before = db.pos();
        let mut next = Log::new(&db, Salts(2, 7));
        lock(&db, WRITE, LockKind::Exclusive).unwrap();
        fail(label, 0);
        match label {
            "wal:truncate" => db.truncate_wal(&file(&db, FileKind::Wal), 0).unwrap_err(),
            _ => next.write_header().unwrap_err(),
        };
        unlock(&db);
        assert_eq!(db.pos(), before, "{label}");
        next.commit(&page(3));
        assert_eq!(db.pos().txid, before.txid.next(), "{label}");
        check_goes_on(dir.path(), &db);
    }
}

/// What a dead writer left was compared with the file, and then the log could not go.
#[test]
fn a_log_that_was_settled_and_could_not_go_is_not_captured_again() {
    for label in ["wal:truncate", "files:remove"] {
        let dir = tempfile::tempdir().unwrap();
        let engine = primary(dir.path());
        let (db, page) = fence::wal_database(&engine);
        let before = db.pos();
        fence::begin_wal(&db, &page);
        db.flush(Owner::client(CLIENT), LockSet::ALL);
        lock(&db, LockSet::one(Lock::Shared), LockKind::Exclusive).unwrap();
        fail(label, 0);
        match label {
            "wal:truncate" => db.truncate_wal(&file(&db, FileKind::Wal), 0).unwrap_err(),
            _ => db.remove_wal().unwrap_err(),
        };
        let settled = db.pos();
        assert_eq!(
            settled.checksum, before.checksum,
            "{label}: as the file, which has nothing of it"
        );
        db.remove_wal().unwrap();
        unlock(&db);
        assert_eq!(db.pos(), settled, "{label}");
        check_goes_on(dir.path(), &db);
    }
}

/// A commit is refused, and what it wrote cannot be made invalid either: whoever built a wal-index now would
/// take it for a commit.
#[test]
fn frames_that_were_refused_let_nobody_write_before_they_are_invalid() {
    for dies in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let engine = primary(dir.path());
        let kernel = Arc::new(fence::Kernel::default());
        engine.mounted(kernel.clone(), false);
        let (db, page) = fence::wal_database(&engine);
        let before = db.pos();
        fence::begin_wal(&db, &page);
        fail("files:sync", 0);
        db.sync_file(&file(&db, FileKind::Wal), VIA).unwrap_err();
        let watching = fault::watch(dir.path(), Arc::new(Refusing("wal:cut")));
        match dies {
            true => db.flush(Owner::client(CLIENT), LockSet::ALL),
            false => unlock(&db),
        }
        assert!(matches!(db.state(), DbState::Failed(_)), "dies: {dies}");
        for byte in [Lock::Write, Lock::Ckpt, Lock::Shared] {
            let refused = lock(&db, LockSet::one(byte), LockKind::Exclusive);
            assert_eq!(refused, Err(Refusal::WouldBlock), "{byte:?}, dies: {dies}");
        }
        assert_eq!(db.pos(), before);
        drop(watching);
        check_goes_on(dir.path(), &db);
        assert_eq!(*kernel.0.lock().unwrap(), ["pages 32 24"], "dies: {dies}");
        assert_eq!(db.pos(), before);
        Log::new(&db, Salts(1, 2)).commit(&page);
        assert_eq!(db.pos().txid, before.txid.next());
        check_goes_on(dir.path(), &db);
    }
}

/// The sync of a checkpoint through the file of the last writer fails: that says nothing about its commits.
#[test]
fn a_sync_after_the_commit_refuses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let (db, page) = fence::wal_database(&engine);
    let before = db.pos();
    fence::begin_wal(&db, &page);
    let watching = fault::watch(dir.path(), Arc::new(Refusing("read:wal")));
    unlock(&db);
    assert!(matches!(db.state(), DbState::Failed(_)));
    fail("files:sync", 0);
    db.sync_file(&file(&db, FileKind::Wal), VIA).unwrap_err();
    assert_eq!(lock(&db, LockSet::one(Lock::Ckpt), LockKind::Exclusive), Err(Refusal::WouldBlock));
    drop(watching);
    check_goes_on(dir.path(), &db);
    assert_eq!(db.pos().txid, before.txid.next());
}

/// Another client asks for a lock and gives it up again; whether it got it.
fn lock_and_unlock(db: &Db, byte: Lock) -> bool {
    let (owner, set) = (Owner::client(8), LockSet::one(byte));
    let request = Request { owner, via: Handle(8), set, kind: LockKind::Exclusive };
    let (sender, answer) = mpsc::channel();
    db.lock(request, Patience::None, Box::new(move |result| sender.send(result).unwrap()));
    let granted = answer.recv_timeout(Duration::from_secs(20)).expect("an answer").is_ok();
    db.unlock(owner, set, || ());
    granted
}

/// The last connection has checkpointed what it knows of, and removes the log.
fn close_log(db: &Db) {
    lock(db, LockSet::one(Lock::Shared), LockKind::Exclusive).unwrap();
    db.remove_wal().unwrap();
    unlock(db);
}

/// A commit is over when its writer gives WRITE up. Who makes a checkpoint meanwhile, or asks for the lock while
/// the database has failed, says nothing about it.
#[test]
fn a_commit_on_its_way_is_not_captured_for_another_client() {
    for dies in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let engine = primary(dir.path());
        let (db, page) = fence::wal_database(&engine);
        let before = db.pos();
        fence::begin_wal(&db, &page);
        assert!(lock_and_unlock(&db, Lock::Ckpt), "a checkpoint waits for no writer");
        assert_eq!(db.pos(), before, "dies: {dies}");
        match dies {
            true => db.flush(Owner::client(CLIENT), LockSet::ALL),
            false => {
                fail("files:sync", 0);
                db.sync_file(&file(&db, FileKind::Wal), VIA).unwrap_err();
                unlock(&db);
                assert_eq!(db.pos(), before);
            }
        }
        close_log(&db);
        check_goes_on(dir.path(), &db);
        assert_eq!(db.pos().checksum, before.checksum, "dies: {dies}");
    }
}

/// With a size limit for the log, a writer cuts off what it does not need before its commit is over.
#[test]
fn a_commit_that_cuts_the_log_to_its_limit_is_not_over() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let (db, page) = fence::wal_database(&engine);
    let before = db.pos();
    fence::begin_wal(&db, &page);
    let log = file(&db, FileKind::Wal);
    let len = log.file.metadata().unwrap().len();
    db.truncate_wal(&log, len).unwrap();
    assert_eq!(db.pos(), before);
    db.flush(Owner::client(CLIENT), LockSet::ALL);
    close_log(&db);
    check_goes_on(dir.path(), &db);
    assert_eq!(db.pos().checksum, before.checksum);
}

/// The node ends while an application is in a transaction: that is over when the next start looks at the log.
#[test]
fn an_end_captures_no_commit_on_its_way() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let (db, page) = fence::wal_database(&engine);
    let before = db.pos();
    fence::begin_wal(&db, &page);
    engine.close().unwrap();
    assert_eq!(db.pos(), before);
}

/// SQLite makes the wal-index longer when the frames of a large commit are written. If it is told that this failed,
/// it rolls back.
#[test]
fn a_commit_whose_wal_index_could_not_grow_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let (db, page) = fence::wal_database(&engine);
    let (before, shm) = (db.pos(), file(&db, FileKind::Shm));
    fence::begin_wal(&db, &page);
    fail("shm:write", 0);
    db.write_shm(&shm, Handle(99), 65535, &[0]).unwrap_err();
    unlock(&db);
    assert_eq!(db.pos().txid, before.txid.next(), "that was somebody else");
    let mut log = Log::new(&db, Salts(1, 2));
    log.encode(&page); // It stands there.
    lock(&db, WRITE, LockKind::Exclusive).unwrap();
    log.write(&page[..PAGE - 1].iter().copied().chain([9]).collect::<Vec<_>>());
    fail("shm:write", 0);
    db.write_shm(&shm, VIA, 65535, &[0]).unwrap_err();
    unlock(&db);
    assert_eq!(db.pos().txid, before.txid.next());
    check_goes_on(dir.path(), &db);
}

/// Who builds a wal-index has written no frames: those that it finds are not refused with it.
#[test]
fn a_wal_index_that_cannot_be_built_refuses_no_commit() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let (db, page) = fence::wal_database(&engine);
    let before = db.pos();
    fence::begin_wal(&db, &page);
    let watching = fault::watch(dir.path(), Arc::new(Refusing("read:wal")));
    unlock(&db);
    // The engine takes it for a moment, to try again.
    wait::until_true("a write lock", || lock(&db, WRITE, LockKind::Exclusive).is_ok());
    fail("shm:write", 0);
    db.write_shm(&file(&db, FileKind::Shm), VIA, 32767, &[0]).unwrap_err();
    drop(watching);
    unlock(&db);
    assert_eq!(db.pos().txid, before.txid.next());
    check_goes_on(dir.path(), &db);
}

/// A client may fail where nobody sees it, such as when it maps the wal-index. Then the next log, or none, tells.
#[test]
fn a_commit_that_failed_unseen_is_gone_when_the_log_is() {
    for removed in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let engine = primary(dir.path());
        let (db, page) = fence::wal_database(&engine);
        let before = db.pos();
        fence::begin_wal(&db, &page);
        unlock(&db);
        assert_eq!(db.pos().txid, before.txid.next(), "it counts for now");
        match removed {
            true => close_log(&db),
            false => {
                lock(&db, WRITE, LockKind::Exclusive).unwrap();
                Log::new(&db, Salts(5, 6)).write_header().unwrap();
                unlock(&db);
            }
        }
        check_goes_on(dir.path(), &db);
        assert_eq!(db.pos().checksum, before.checksum, "removed: {removed}");
    }
}

/// The next writer overwrites what failed unseen, at once: what the engine captured of it is written before.
#[test]
fn frames_that_are_captured_are_overwritten_when_their_ltx_file_is_written() {
    for frame in [0, 1] {
        let dir = tempfile::tempdir().unwrap();
        let engine = primary(dir.path());
        let (db, page) = fence::wal_database(&engine);
        let other = |byte| [&page[..PAGE - 1], &[byte]].concat();
        let mut log = Log::new(&db, Salts(1, 2));
        (0..frame).for_each(|n| log.commit(&other(n)));
        let mut again = Log { cursor: log.cursor, ..log };
        let watching = fault::watch(dir.path(), Arc::new(Refusing("chain:ltx")));
        log.commit(&other(7));
        lock(&db, WRITE, LockKind::Exclusive).unwrap();
        let (wal, offset) =
            (file(&db, FileKind::Wal), if frame == 0 { 0 } else { again.cursor.offset() });
        let bytes = [7; 32];
        asked(|answer| db.write_wal(&wal, VIA, offset, &bytes, answer)).unwrap_err();
        drop(watching);
        unlock(&db);
        wait::until_true("ltx files", || db.state() == DbState::Ready);
        again.commit(&other(8));
        check_goes_on(dir.path(), &db);
    }
}

/// An exclusive connection gives no lock up when it has committed: a sync that fails later does not refuse that.
#[test]
fn what_an_exclusive_connection_committed_outlives_a_failed_sync() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let (db, page) = fence::wal_database(&engine);
    let before = db.pos();
    let mut log = Log::new(&db, Salts(1, 2));
    file(&db, FileKind::Wal);
    lock(&db, LockSet::one(Lock::Shared), LockKind::Exclusive).unwrap();
    log.write_header().unwrap();
    log.write(&page);
    fail("files:sync", 0);
    db.sync_file(&file(&db, FileKind::Wal), VIA).unwrap_err();
    db.write_database(&file(&db, FileKind::Database), 0, &page).unwrap();
    db.remove_wal().unwrap();
    unlock(&db);
    assert_eq!(db.pos().txid, before.txid.next());
    check_goes_on(dir.path(), &db);
}
