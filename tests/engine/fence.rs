//! What a primary refuses whose lease is not confirmed, and what it does with a commit that cannot be
//! refused any more.

use std::sync::mpsc::{self, TryRecvError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use litefs::boot_time::BootTime;
use litefs::engine::db::Refusal;
use litefs::engine::files::FileKind;
use litefs::engine::layout::DbDir;
use litefs::engine::locks::{Handle, LockKind, Owner};
use litefs::engine::{Db, Engine, Error, PageCache, Role};
use litefs::os;
use litefs::sqlite::lock_byte::{Lock, LockSet};
use litefs::sqlite::wal::{self, ByteOrder, Frame, Salts, WalCursor, WalHeader};
use ltx::{PageSize, Pgno};

use crate::support::image::Image;

use super::{
    CLIENT, PAGE, VIA, asked, begin, commit, database, file, image, lock, primary, unlock_all,
};

fn close_fence(engine: &Engine) {
    engine.shared().fence.confirm(BootTime::START);
}

fn open_fence(engine: &Engine) {
    engine.shared().fence.confirm(BootTime::now().after(Duration::from_secs(3600)));
}

#[test]
fn a_fenced_primary_begins_no_transaction() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    commit(&db, &image(1));
    close_fence(&engine);
    for byte in [Lock::Write, Lock::Reserved] {
        let refused = lock(&db, LockSet::one(byte), LockKind::Exclusive);
        assert_eq!(refused, Err(Refusal::WouldBlock), "{byte:?}");
    }
    assert_eq!(
        lock(&db, LockSet::one(Lock::Shared), LockKind::Shared),
        Ok(()),
        "a reader may read"
    );
    let source = dir.path().join("import");
    std::fs::write(&source, image(2)).unwrap();
    assert!(matches!(engine.import(db.name(), &source), Err(Error::NotPrimary)));
    assert_eq!(db.drop_database(), Err(Refusal::ReadOnly));
    unlock_all(&db);
    open_fence(&engine);
    commit(&db, &image(2));
}

#[test]
fn a_fenced_primary_lets_a_journal_roll_back_and_not_commit() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    let content = image(1);
    commit(&db, &content);
    let before = db.pos();
    begin(&db, &image(20));
    close_fence(&engine);
    assert_eq!(asked(|answer| db.remove_journal(answer)), Err(Refusal::ReadOnly));
    let database = file(&db, FileKind::Database);
    db.write_database(&database, 0, &content).unwrap();
    db.truncate_database(&database, content.len() as u64).unwrap();
    asked(|answer| db.remove_journal(answer)).unwrap();
    unlock_all(&db);
    assert_eq!(db.pos(), before);
}

/// A kernel that remembers what it was told to forget.
#[derive(Default)]
pub(super) struct Kernel(pub(super) Mutex<Vec<String>>);

impl PageCache for Kernel {
    fn pages_changed(&self, _ino: u64, offset: u64, len: u64) {
        self.0.lock().unwrap().push(format!("pages {offset} {len}"));
    }
    fn file_grown(&self, _ino: u64, _offset: u64, _bytes: &[u8]) {}
    fn file_changed(&self, _ino: u64) {}
    fn attr_changed(&self, _ino: u64) {}
    fn name_changed(&self, _name: &str) {}
    fn name_gone(&self, _name: &str) {}
    fn file_mistaken(&self, _ino: u64, name: &str) {
        self.0.lock().unwrap().push(name.to_owned());
    }
}

/// The lease runs out while the commit is on its way: while its LTX file is written it can still be
/// rolled back; while the journal is removed it cannot, and then nobody may find the journal again.
#[test]
fn a_commit_whose_lease_runs_out_on_its_way_is_refused_whole_or_counts() {
    for (label, counts) in [("chain:ltx", false), ("files:remove", true)] {
        let dir = tempfile::tempdir().unwrap();
        let engine = primary(dir.path());
        let kernel = Arc::new(Kernel::default());
        engine.mounted(kernel.clone(), true);
        let db = database(&engine, "db");
        let content = image(1);
        commit(&db, &content);
        let before = db.pos();
        begin(&db, &image(20));
        let of_hook = engine.clone();
        os::fault::meanwhile(label, move || close_fence(&of_hook));
        let refused = asked(|answer| db.remove_journal(answer));
        assert!(refused.is_err(), "{label}: acknowledged");
        let mistaken = kernel.0.lock().unwrap().clone();
        if counts {
            assert_eq!(db.pos().txid, before.txid.next());
            assert!(db.files().get(FileKind::Journal).is_none());
            assert_eq!(mistaken, ["db-journal"], "the kernel believes in the journal");
            // SQLite plays its journal back all the same.
            let database = file(&db, FileKind::Database);
            assert!(db.write_database(&database, 0, &content).is_err());
        } else {
            assert_eq!(db.pos(), before);
            assert_eq!(mistaken, Vec::<String>::new());
            let database = file(&db, FileKind::Database);
            db.write_database(&database, 0, &content).unwrap();
            db.truncate_database(&database, content.len() as u64).unwrap();
            asked(|answer| db.remove_journal(answer)).unwrap();
        }
        unlock_all(&db);
        let pages = Image::of_files(&DbDir::new(&dir.path().join("dbs/db"))).unwrap();
        assert_eq!(pages.checksum(), db.pos().checksum, "{label}");
    }
}

/// Bytes of a frame in these tests.
pub(super) const FRAME: usize = wal::FRAME_HEADER_SIZE + PAGE;

/// One transaction in a WAL that makes page 1 `page`, up to the release of its locks.
pub(super) fn begin_wal(db: &Db, page: &[u8]) {
    lock(db, LockSet::one(Lock::Write), LockKind::Exclusive).unwrap();
    let (order, salts, page_size) = (ByteOrder::NATIVE, Salts(1, 2), PageSize::new(4096).unwrap());
    let header = WalHeader { order, page_size, sequence: 0, salts };
    let mut bytes = header.encode().to_vec();
    let commit = Some(db.page_count());
    WalCursor::start(&header).encode(&Frame { pgno: Pgno(1), commit, page }, &mut bytes);
    let log = file(db, FileKind::Wal);
    let (head, frames) = bytes.split_at(wal::HEADER_SIZE);
    asked(|answer| db.write_wal(&log, VIA, 0, head, answer)).unwrap();
    asked(|answer| db.write_wal(&log, VIA, wal::HEADER_SIZE as u64, frames, answer)).unwrap();
}

/// A database in WAL mode, and a new image of its first page.
pub(super) fn wal_database(engine: &Engine) -> (std::sync::Arc<Db>, Vec<u8>) {
    let db = database(engine, "db");
    let mut content = image(1);
    content[18..20].fill(2);
    commit(&db, &content);
    let mut page = content[..PAGE].to_vec();
    page[27] += 1;
    (db, page)
}

#[test]
fn a_commit_that_was_late_waits_for_the_lease() {
    for leads in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let engine = primary(dir.path());
        let (db, page) = wal_database(&engine);
        let before = db.pos();
        begin_wal(&db, &page);
        close_fence(&engine);
        let (sender, answer) = mpsc::channel();
        db.unlock(Owner::client(CLIENT), LockSet::ALL, move || sender.send(()).unwrap());
        assert_eq!(db.pos().txid, before.txid.next(), "the transaction is captured");
        assert_eq!(answer.try_recv(), Err(TryRecvError::Empty));
        match leads {
            true => open_fence(&engine),
            false => engine.set_role(Role::Unknown),
        }
        assert_eq!(answer.try_recv(), Ok(()), "primary: {leads}");
    }
}

#[test]
fn a_sync_of_the_wal_fails_under_a_writer_without_a_lease() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let (db, page) = wal_database(&engine);
    begin_wal(&db, &page);
    let log = file(&db, FileKind::Wal);
    close_fence(&engine);
    assert_eq!(db.sync_file(&log, VIA), Err(Refusal::Os(libc::EIO)));
    let late = asked(|answer| db.write_wal(&log, VIA, wal::HEADER_SIZE as u64, &[0; 9], answer));
    assert_eq!(late, Err(Refusal::ReadOnly));
    open_fence(&engine);
    assert_eq!(db.sync_file(&log, VIA), Ok(()));
}

/// What the files of the database hold.
pub(super) fn files(dir: &std::path::Path) -> ltx::Checksum {
    Image::of_files(&DbDir::new(&dir.join("dbs/db"))).unwrap().checksum()
}

/// SQLite rolls back and leaves the frames behind. Who builds the wal-index anew takes every valid frame
/// for committed: nothing may be left of them.
#[test]
fn a_commit_that_is_refused_at_its_sync_leaves_no_valid_frame() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let kernel = Arc::new(Kernel::default());
    engine.mounted(kernel.clone(), false);
    let (db, page) = wal_database(&engine);
    let before = db.pos();
    begin_wal(&db, &page);
    let log = file(&db, FileKind::Wal);
    close_fence(&engine);
    assert_eq!(db.sync_file(&log, VIA), Err(Refusal::Os(libc::EIO)));
    let (sender, answer) = mpsc::channel();
    db.unlock(Owner::client(CLIENT), LockSet::ALL, move || sender.send(()).unwrap());
    answer.recv_timeout(Duration::from_secs(20)).expect("an answer, when the kernel has been told");
    assert_eq!(*kernel.0.lock().unwrap(), ["pages 32 24"]);
    assert_eq!(db.pos(), before, "it was refused");
    assert_eq!(files(dir.path()), before.checksum);
    open_fence(&engine);
    // The same frames again.
    begin_wal(&db, &page);
    assert_eq!(db.sync_file(&log, VIA), Ok(()));
    unlock_all(&db);
    assert_eq!(db.pos().txid, before.txid.next());
    assert_eq!(files(dir.path()), db.pos().checksum);
}

/// A checkpoint of another connection is refused its sync: that says nothing about the writer.
#[test]
fn a_sync_of_somebody_else_refuses_no_commit() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let (db, page) = wal_database(&engine);
    let before = db.pos();
    begin_wal(&db, &page);
    let log = file(&db, FileKind::Wal);
    let label = "files:sync".to_owned();
    os::fault::arm_here(os::fault::Fault { label, after: 0, errno: libc::EIO });
    assert_eq!(db.sync_file(&log, Handle(99)), Err(Refusal::Os(libc::EIO)));
    unlock_all(&db);
    assert_eq!(db.pos().txid, before.txid.next());
    assert_eq!(files(dir.path()), db.pos().checksum);
}

/// Without passthrough nobody knows whether SQLite counts what an application wrote that died then. The
/// next one says so: it goes on behind it or over it, or takes the log away.
#[test]
fn what_a_dead_writer_left_is_what_sqlite_makes_of_it() {
    for kept in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let engine = primary(dir.path());
        let (db, page) = wal_database(&engine);
        let before = db.pos();
        begin_wal(&db, &page);
        db.flush(Owner::client(CLIENT), LockSet::ALL);
        assert_eq!(db.pos().txid, before.txid.next(), "it counts for now");
        // The last connection has checkpointed what it knows of, and removes the log.
        lock(&db, LockSet::one(Lock::Shared), LockKind::Exclusive).unwrap();
        let database = file(&db, FileKind::Database);
        if kept {
            db.write_database(&database, 0, &page).unwrap();
        }
        db.remove_wal().unwrap();
        unlock_all(&db);
        let expected = before.txid.0 + if kept { 1 } else { 2 };
        assert_eq!(db.pos().txid.0, expected, "kept: {kept}");
        assert_eq!(files(dir.path()), db.pos().checksum, "kept: {kept}");
        assert_eq!(db.pos().checksum == before.checksum, !kept);
    }
}

#[test]
fn paused_writes_begin_no_transaction_and_wait_for_the_last_one() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    commit(&db, &image(1));
    begin(&db, &image(2));
    assert_eq!(engine.stop_writes(Duration::ZERO).unfinished, [db.name().clone()]);
    asked(|answer| db.remove_journal(answer)).unwrap();
    unlock_all(&db);
    assert_eq!(engine.stop_writes(Duration::from_secs(20)).unfinished, []);
    for byte in [Lock::Write, Lock::Reserved] {
        let refused = lock(&db, LockSet::one(byte), LockKind::Exclusive);
        assert_eq!(refused, Err(Refusal::WouldBlock), "{byte:?}");
    }
    engine.resume_writes();
    commit(&db, &image(3));
}
