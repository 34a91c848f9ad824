//! The writer of a replica's WAL against SQLite itself: connections that read what it writes, under
//! real locks.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::fcntl::{FcntlArg, fcntl};
use rusqlite::Connection;
use tempfile::TempDir;

use super::*;
use crate::sqlite::test_rng::Rng;

/// One transaction of the source database.
#[derive(Clone)]
struct Transaction {
    commit: u32,
    pages: BTreeMap<u32, Vec<u8>>,
    /// What [`digest`] says after it.
    digest: String,
}

impl Transaction {
    fn pages(&self) -> impl Iterator<Item = (Pgno, &[u8])> {
        self.pages.iter().map(|(&pgno, page)| (Pgno(pgno), &page[..]))
    }
}

const DIGEST: &str = "SELECT count(*) || ' ' || total(id) || ' ' || total(length(v)) || ' ' ||
    total(unicode(substr(hex(v), 3, 1)) * id) FROM t";

fn digest(db: &Connection) -> String {
    db.query_row(DIGEST, [], |row| row.get(0)).unwrap()
}

#[track_caller]
fn check_integrity(db: &Connection) {
    let result: String = db.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(result, "ok");
}

/// A database that SQLite writes, and whose transactions are read off its WAL.
struct Source {
    dir: TempDir,
    db: Connection,
    page_size: PageSize,
    wal: File,
    cursor: Option<WalCursor>,
    /// The content of the database before the first transaction.
    base: Vec<u8>,
}

impl Source {
    fn new(page_size: u32) -> Source {
        let dir = tempfile::tempdir().unwrap();
        let db = Connection::open(dir.path().join("db")).unwrap();
        db.execute_batch(&format!(
            "PRAGMA page_size={page_size}; PRAGMA auto_vacuum=INCREMENTAL;
             PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF; PRAGMA wal_autocheckpoint=0;
             CREATE TABLE t(id INTEGER PRIMARY KEY, v); CREATE INDEX i ON t(v);
             PRAGMA wal_checkpoint(TRUNCATE);"
        ))
        .unwrap();
        let base = std::fs::read(dir.path().join("db")).unwrap();
        let wal = File::open(dir.path().join("db-wal")).unwrap();
        let page_size = PageSize::new(page_size).unwrap();
        Source { dir, db, page_size, wal, cursor: None, base }
    }

    /// Executes statements as one transaction and returns what it wrote.
    fn execute(&mut self, sql: &str) -> Transaction {
        self.db.execute_batch(&format!("BEGIN; {sql}; COMMIT;")).unwrap();
        self.capture()
    }

    fn capture(&mut self) -> Transaction {
        let mut header = [0; HEADER_SIZE];
        self.wal.read_exact_at(&mut header, 0).unwrap();
        let header = WalHeader::parse(&header).unwrap();
        let cursor = self.cursor.get_or_insert_with(|| WalCursor::start(&header));
        let mut frame = vec![0; cursor.frame_size()];
        let mut pages = BTreeMap::new();
        loop {
            self.wal.read_exact_at(&mut frame, cursor.offset()).unwrap();
            let Frame { pgno, commit, page } = cursor.verify(&frame).unwrap();
            pages.insert(pgno.0, page.to_vec());
            if let Some(commit) = commit {
                return Transaction { commit, pages, digest: digest(&self.db) };
            }
        }
    }

    fn insert(&mut self, rows: u32, size: u32) -> Transaction {
        self.execute(&format!(
            "WITH RECURSIVE s(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM s WHERE i<{rows})
             INSERT INTO t(v) SELECT randomblob({size}) FROM s"
        ))
    }

    /// Some change, most of them small.
    fn change(&mut self, rng: &mut Rng) -> Transaction {
        let size = rng.below(3 * u64::from(self.page_size.get()).min(4096)) as u32 + 1;
        match rng.below(10) {
            0..5 => self.insert(rng.below(5) as u32 + 1, size),
            5..8 => self.execute(&format!(
                "INSERT INTO t(v) VALUES (1);
                 UPDATE t SET v=randomblob({size}) WHERE id % 7 = {}",
                rng.below(7)
            )),
            8 => self.execute(
                "DELETE FROM t WHERE id > (SELECT max(id)/2 FROM t);
                 INSERT INTO t(v) VALUES (randomblob(10)); PRAGMA incremental_vacuum;",
            ),
            _ => {
                let rows = rng.below(2000) as u32 / (self.page_size.get() / 512);
                self.insert(rows + 1, 400)
            }
        }
    }
}

/// What was announced to the caches of readers.
#[derive(Default)]
struct Announced {
    pages: Mutex<Vec<(u64, u64)>>,
    sizes: AtomicU32,
    growths: AtomicU32,
}

impl ReaderCache for Announced {
    fn pages_changed(&self, offset: u64, len: u64) {
        self.pages.lock().unwrap().push((offset, len));
    }

    fn size_changed(&self) {
        self.sizes.fetch_add(1, Ordering::Relaxed);
    }

    fn index_written(&self, _offset: u64, _len: u64) {}

    fn index_grown(&self) {
        self.growths.fetch_add(1, Ordering::Relaxed);
    }
}

/// A replica's files, with the locks that the engine holds on them.
struct Replica {
    dir: TempDir,
    writer: WalWriter,
    locks: FileLocks,
    cache: Announced,
}

/// The files of a database in `dir`, made if they are missing.
fn open_files(dir: &Path) -> WalFiles {
    let open = |name: &str| {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        Arc::new(options.open(dir.join(name)).unwrap())
    };
    WalFiles { database: open("db"), wal: open("db-wal"), shm: open("db-shm") }
}

fn random() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0x1234_5678);
    NEXT.fetch_add(0x9e37_79b9, Ordering::Relaxed)
}

impl Replica {
    /// A copy of the database as it was before the first transaction.
    fn of(source: &Source) -> Replica {
        let dir = tempfile::tempdir().unwrap();
        open_files(dir.path()).database.write_all_at(&source.base, 0).unwrap();
        let pages = source.base.len() / source.page_size.bytes();
        Replica::open(dir, source.page_size, pages as u32)
    }

    fn open(dir: TempDir, page_size: PageSize, pages: u32) -> Replica {
        let files = open_files(dir.path());
        let locks = FileLocks(files.clone());
        for lock in [Lock::Dms, Lock::Shared] {
            assert!(locks.set(lock, libc::F_RDLCK), "{lock} is free for sharers");
        }
        // Without it, a reader that meets a header in the making would rebuild the wal-index.
        assert!(locks.set(Lock::Write, libc::F_WRLCK), "nobody else writes");
        let writer = WalWriter::open_or_create(files, page_size, pages, random).unwrap();
        Replica { dir, writer, locks, cache: Announced::default() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("db")
    }

    fn reader(&self) -> Connection {
        let db = Connection::open(self.path()).unwrap();
        db.busy_timeout(std::time::Duration::from_secs(10)).unwrap();
        db
    }

    fn append(&mut self, transaction: &Transaction) {
        self.writer.append(transaction.commit, transaction.pages()).unwrap();
    }

    fn publish(&mut self) {
        self.writer.publish(&mut self.locks, &self.cache).unwrap();
    }

    fn apply(&mut self, transaction: &Transaction) {
        self.append(transaction);
        self.publish();
    }

    fn checkpoint(&mut self) -> Progress {
        self.writer.checkpoint(&mut self.locks, &self.cache).unwrap()
    }

    fn restart(&mut self) -> Restart {
        self.writer.restart(&mut self.locks, &self.cache).unwrap()
    }

    /// Gives the files up, for SQLite to go on with.
    fn release(self) -> TempDir {
        for lock in [Lock::Dms, Lock::Shared, Lock::Write] {
            assert!(self.locks.set(lock, libc::F_UNLCK));
        }
        self.dir
    }
}

/// SQLite's locks, taken on the files as another open file description.
struct FileLocks(WalFiles);

impl FileLocks {
    fn set(&self, lock: Lock, kind: i32) -> bool {
        let file = if lock == Lock::Shared { &self.0.database } else { &self.0.shm };
        let (start, end) = lock.range();
        let range = libc::flock {
            l_type: kind as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: start as i64,
            l_len: (end - start + 1) as i64,
            l_pid: 0,
        };
        fcntl(&**file, FcntlArg::F_OFD_SETLK(&range)).is_ok()
    }
}

impl CheckpointLocks for FileLocks {
    fn try_lock(&mut self, set: LockSet) -> bool {
        let mut taken = LockSet::EMPTY;
        for lock in set.iter() {
            if !self.set(lock, libc::F_WRLCK) {
                self.unlock(taken);
                return false;
            }
            taken = taken.with(lock);
        }
        true
    }

    fn unlock(&mut self, set: LockSet) {
        for lock in set.iter() {
            assert!(self.set(lock, libc::F_UNLCK));
        }
    }
}

#[test]
fn an_open_reader_keeps_its_snapshot_and_a_new_one_sees_the_new_state() {
    for page_size in [512, 4096, 65536] {
        let mut source = Source::new(page_size);
        let mut replica = Replica::of(&source);
        let first = source.insert(20, 700);
        replica.apply(&first);
        let old = replica.reader();
        old.execute_batch("BEGIN").unwrap();
        assert_eq!(digest(&old), first.digest);
        let new = replica.reader();
        for _ in 0..50 {
            let transaction = source.insert(3, 500);
            let before = digest(&new);
            replica.append(&transaction);
            assert_eq!(digest(&new), before, "what is not published is not seen");
            replica.publish();
            assert_eq!(digest(&new), transaction.digest);
            assert_eq!(digest(&old), first.digest);
        }
        check_integrity(&old);
        check_integrity(&new);
        old.execute_batch("COMMIT").unwrap();
        assert_eq!(digest(&old), digest(&source.db));
    }
}

#[test]
fn several_transactions_become_visible_at_once() {
    let mut source = Source::new(4096);
    let mut replica = Replica::of(&source);
    let reader = replica.reader();
    let before = digest(&reader);
    let batch: Vec<Transaction> = (0..10).map(|_| source.insert(2, 100)).collect();
    for transaction in &batch {
        replica.append(transaction);
        assert_eq!(digest(&reader), before);
    }
    replica.publish();
    assert_eq!(digest(&reader), batch[9].digest);
    // Each has its own commit frame: SQLite's recovery finds all of them.
    let commits = commits(&replica.writer.files.wal, source.page_size);
    assert_eq!(commits, batch.iter().map(|one| one.commit).collect::<Vec<_>>());
}

/// The sizes in pages of the commit frames that follow from the start of a log.
fn commits(wal: &Arc<File>, page_size: PageSize) -> Vec<u32> {
    let Some(header) = read_log_header(wal, page_size).unwrap() else { return Vec::new() };
    let log = os::FileCursor::at("read:apply-wal", wal.clone(), HEADER_SIZE as u64);
    let mut reader = FrameReader::new(log, WalCursor::start(&header));
    let mut commits = Vec::new();
    while let Ok(frame) = reader.next_frame().unwrap() {
        commits.extend(frame.commit);
    }
    commits
}

#[test]
fn a_checkpoint_stops_at_the_oldest_reader() {
    let mut source = Source::new(4096);
    let mut replica = Replica::of(&source);
    replica.apply(&source.insert(20, 700));
    let old = replica.reader();
    old.execute_batch("BEGIN").unwrap();
    let snapshot = digest(&old);
    let mark = replica.writer.progress().frames;
    for _ in 0..20 {
        replica.apply(&source.insert(5, 700));
    }
    let progress = replica.checkpoint();
    assert_eq!(progress.backfilled, mark);
    assert!(!progress.is_complete());
    assert_eq!(replica.restart(), Restart::Blocked);
    assert_eq!(digest(&old), snapshot);
    check_integrity(&old);
    let new = replica.reader();
    assert_eq!(digest(&new), digest(&source.db));
    check_integrity(&new);
    assert_eq!(replica.cache.sizes.load(Ordering::Relaxed), 1, "pages past the former end");

    old.execute_batch("COMMIT").unwrap();
    assert!(replica.checkpoint().is_complete());
    assert_eq!(replica.cache.sizes.load(Ordering::Relaxed), 2);
    assert_eq!(digest(&new), digest(&source.db));
    check_integrity(&new);
}

#[test]
fn the_log_starts_over_when_nobody_reads_from_it() {
    let mut source = Source::new(4096);
    let mut replica = Replica::of(&source);
    let reader = replica.reader();
    let mut lens = Vec::new();
    for _ in 0..5 {
        for _ in 0..20 {
            let transaction = source.insert(2, 2000);
            replica.apply(&transaction);
            assert_eq!(digest(&reader), transaction.digest);
        }
        lens.push(replica.writer.files.wal.metadata().unwrap().len());
        assert!(replica.checkpoint().is_complete());
        reader.execute_batch("BEGIN").unwrap();
        let snapshot = digest(&reader);
        // That reader reads the database file alone, so the log may start over.
        assert_eq!(replica.restart(), Restart::Done);
        replica.apply(&source.insert(1, 100));
        assert_eq!(digest(&reader), snapshot);
        // Nothing may be put into the database file under it.
        assert_eq!(replica.checkpoint().backfilled, 0);
        check_integrity(&reader);
        reader.execute_batch("COMMIT").unwrap();
        assert_eq!(digest(&reader), digest(&source.db));
    }
    assert!(lens[4] < 2 * lens[0], "the log is written over: {lens:?}");
}

#[test]
fn a_reader_of_the_log_keeps_it_from_starting_over() {
    let mut source = Source::new(4096);
    let mut replica = Replica::of(&source);
    replica.apply(&source.insert(5, 500));
    let reader = replica.reader();
    reader.execute_batch("BEGIN").unwrap();
    let snapshot = digest(&reader);
    assert!(replica.checkpoint().is_complete());
    assert_eq!(replica.restart(), Restart::Blocked);
    replica.apply(&source.insert(5, 500));
    assert_eq!(digest(&reader), snapshot);
    reader.execute_batch("COMMIT").unwrap();
    assert!(replica.checkpoint().is_complete());
    assert_eq!(replica.restart(), Restart::Done);
}

#[test]
fn sqlite_goes_on_with_what_was_written() {
    for finish in ["in the log", "checkpointed", "restarted"] {
        let mut source = Source::new(1024);
        let mut replica = Replica::of(&source);
        for _ in 0..30 {
            replica.apply(&source.insert(10, 300));
        }
        if finish != "in the log" {
            assert!(replica.checkpoint().is_complete());
        }
        if finish == "restarted" {
            assert_eq!(replica.restart(), Restart::Done);
        }
        let open = replica.reader();
        assert_eq!(digest(&open), digest(&source.db), "{finish}");
        let dir = replica.release();
        let db = Connection::open(dir.path().join("db")).unwrap();
        db.execute_batch("INSERT INTO t(v) VALUES ('written by sqlite'); DELETE FROM t WHERE id<9")
            .unwrap();
        source.execute("INSERT INTO t(v) VALUES ('written by sqlite'); DELETE FROM t WHERE id<9");
        assert_eq!(digest(&db), digest(&source.db), "{finish}");
        assert_eq!(digest(&open), digest(&source.db), "{finish}");
        check_integrity(&db);
        drop(open);
        db.close().unwrap();
        let db = Connection::open(dir.path().join("db")).unwrap();
        assert_eq!(digest(&db), digest(&source.db), "{finish}");
        check_integrity(&db);
    }
}

#[test]
fn a_log_of_sqlite_is_taken_over_and_handed_back() {
    let mut source = Source::new(4096);
    for _ in 0..10 {
        source.insert(10, 900);
    }
    let dir = tempfile::tempdir().unwrap();
    copy(&source, dir.path());
    // A client has the files open all the time, and made the wal-index.
    let client = Connection::open(dir.path().join("db")).unwrap();
    client.execute_batch("PRAGMA wal_autocheckpoint=0").unwrap();
    assert_eq!(digest(&client), digest(&source.db));
    let mut replica = Replica::open(dir, source.page_size, 0);
    assert!(replica.writer.progress().frames > 0);
    for _ in 0..10 {
        let transaction = source.insert(5, 900);
        replica.apply(&transaction);
        assert_eq!(digest(&client), transaction.digest);
    }
    assert!(replica.checkpoint().is_complete());
    let (page_size, dir) = (source.page_size, replica.release());
    client.execute_batch("UPDATE t SET v=1 WHERE id=3").unwrap();
    source.execute("UPDATE t SET v=1 WHERE id=3");
    let mut replica = Replica::open(dir, page_size, 0);
    replica.apply(&source.insert(5, 900));
    assert_eq!(digest(&client), digest(&source.db));
    check_integrity(&client);
}

/// Copies database and log of a source that is in use.
fn copy(source: &Source, to: &Path) {
    let files = open_files(to);
    for (name, file) in [("db", files.database), ("db-wal", files.wal)] {
        let bytes = std::fs::read(source.dir.path().join(name)).unwrap();
        file.write_all_at(&bytes, 0).unwrap();
    }
}

#[test]
fn a_wal_index_is_made_from_the_log() {
    let mut source = Source::new(512);
    for _ in 0..40 {
        source.insert(40, 900);
    }
    let dir = tempfile::tempdir().unwrap();
    copy(&source, dir.path());
    let mut replica = Replica::open(dir, source.page_size, 0);
    let cursor = source.cursor.unwrap();
    assert!(cursor.frame() > 4062, "the test wants two regions");
    assert_eq!(replica.writer.progress().frames, cursor.frame());
    let reader = replica.reader();
    assert_eq!(digest(&reader), digest(&source.db));
    check_integrity(&reader);
    replica.apply(&source.insert(3, 100));
    assert_eq!(digest(&reader), digest(&source.db));
}

#[test]
fn what_was_taken_back_never_was() {
    let mut source = Source::new(1024);
    let mut replica = Replica::of(&source);
    // Once at the start of the log, once after published frames.
    for round in 0..2 {
        let good = source.insert(10, 300);
        let bad = Transaction { commit: good.commit, ..source.insert(900, 900) };
        replica.append(&bad);
        replica.append(&bad);
        replica.writer.rollback_unpublished().unwrap();
        assert_eq!(commits(&replica.writer.files.wal, source.page_size).len(), 2 * round);
        replica.append(&good);
        for (pgno, page) in bad.pages() {
            replica.writer.append_page(pgno, page).unwrap();
        }
        replica.writer.rollback_transaction().unwrap();
        replica.publish();
        assert_eq!(digest(&replica.reader()), good.digest);
        let commits = commits(&replica.writer.files.wal, source.page_size);
        assert_eq!(commits.len(), 2 * round + 1);
        replica.apply(&bad_but_whole(&mut source, &bad));
        assert_eq!(digest(&replica.reader()), digest(&source.db));
        check_integrity(&replica.reader());
    }
}

/// The same transaction with the size that it really had.
fn bad_but_whole(source: &mut Source, bad: &Transaction) -> Transaction {
    let pages: u32 = source.db.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
    Transaction { commit: pages, ..bad.clone() }
}

#[test]
fn a_shrunken_database_shrinks_its_file() {
    let mut source = Source::new(4096);
    let mut replica = Replica::of(&source);
    replica.apply(&source.insert(500, 2000));
    assert!(replica.checkpoint().is_complete());
    let reader = replica.reader();
    reader.execute_batch("BEGIN").unwrap();
    let snapshot = digest(&reader);
    source.db.execute_batch("DELETE FROM t WHERE id>10").unwrap();
    let delete = source.capture();
    replica.apply(&delete);
    source.db.execute_batch("VACUUM").unwrap();
    let vacuum = source.capture();
    assert!(vacuum.commit * 4 < delete.commit);
    replica.apply(&vacuum);
    assert_eq!(replica.writer.pages(), vacuum.commit);
    replica.checkpoint();
    assert_eq!(digest(&reader), snapshot);
    check_integrity(&reader);
    reader.execute_batch("COMMIT").unwrap();
    assert_eq!(digest(&reader), vacuum.digest);
    assert!(replica.checkpoint().is_complete());
    let len = replica.writer.files.database.metadata().unwrap().len();
    assert_eq!(len, u64::from(vacuum.commit) * 4096);
    assert_eq!(digest(&reader), vacuum.digest);
    check_integrity(&reader);
}

#[test]
fn a_commit_without_pages_can_change_the_size_alone() {
    let mut source = Source::new(4096);
    let mut replica = Replica::of(&source);
    let transaction = source.insert(50, 900);
    replica.apply(&transaction);
    let frames = replica.writer.progress().frames;
    replica.writer.append(transaction.commit, []).unwrap();
    replica.publish();
    assert_eq!(replica.writer.progress().frames, frames);
    replica.writer.append(transaction.commit + 3, []).unwrap();
    replica.publish();
    assert_eq!(replica.writer.progress().frames, frames + 1);
    let (header, _) = replica.writer.mirror.read_header().unwrap().unwrap();
    assert_eq!(header.pages, transaction.commit + 3);
    assert_eq!(digest(&replica.reader()), transaction.digest);
}

#[test]
fn pages_around_the_lock_page_land_where_they_belong() {
    let page_size = PageSize::MAX;
    let dir = tempfile::tempdir().unwrap();
    let mut replica = Replica::open(dir, page_size, 1);
    let lock = page_size.lock_pgno().0;
    assert_eq!(lock, 16385);
    let page = |fill: u8| vec![fill; page_size.bytes()];
    let pages = [(lock - 1, page(1)), (lock + 1, page(2)), (lock + 2, page(3))];
    let frames = pages.iter().map(|(pgno, page)| (Pgno(*pgno), &page[..]));
    replica.writer.append(lock + 2, frames).unwrap();
    let refused = replica.writer.append_page(Pgno(lock), &page(9));
    assert!(matches!(refused, Err(Error::Page { pgno: Pgno(16385) })));
    replica.publish();
    assert!(replica.checkpoint().is_complete());
    let database = &replica.writer.files.database;
    assert_eq!(database.metadata().unwrap().len(), u64::from(lock + 2) * 65536);
    let announced = replica.cache.pages.lock().unwrap().clone();
    assert_eq!(announced, [((1 << 30) - 65536, 65536), ((1 << 30) + 65536, 2 * 65536)]);
    let mut read = page(9);
    for (pgno, expected) in [(lock - 1, 1), (lock, 0), (lock + 1, 2), (lock + 2, 3), (7, 0)] {
        database.read_exact_at(&mut read, page_size.offset(Pgno(pgno))).unwrap();
        assert!(read == page(expected), "page {pgno}");
        replica.writer.read_page(Pgno(pgno), &mut read).unwrap();
        assert!(read == page(expected), "page {pgno}");
    }
}

#[test]
fn pages_that_no_log_can_hold_are_refused() {
    let source = Source::new(4096);
    let mut replica = Replica::of(&source);
    assert!(replica.writer.append_page(Pgno(0), &[0; 4096]).is_err());
    assert!(replica.writer.append_page(Pgno(1), &[0; 512]).is_err());
}

/// A reader in the middle of a transaction, and what it must see.
struct Snapshot {
    db: Connection,
    digest: String,
}

/// Random transactions, readers, checkpoints, restarts and roll-backs; every reader always sees its
/// own state, and every page is the source's.
fn follow_a_source(page_size: u32, rng: &mut Rng) {
    let mut source = Source::new(page_size);
    let mut replica = Replica::of(&source);
    let mut pages: BTreeMap<u32, Vec<u8>> =
        (1..).zip(source.base.chunks(page_size as usize).map(<[u8]>::to_vec)).collect();
    let mut published = digest(&source.db);
    let mut appended = published.clone();
    let mut readers: Vec<Snapshot> = Vec::new();
    for step in 0..150 {
        // What follows a log that started over is looked at whatever chance says.
        let start_over = step == 75;
        if start_over {
            readers.clear();
        }
        match if start_over { 11 } else { rng.below(12) } {
            0..6 => {
                let transaction = source.change(rng);
                if rng.below(8) == 0 {
                    let before = transaction.pages().take(2);
                    for (pgno, page) in before {
                        replica.writer.append_page(pgno, page).unwrap();
                    }
                    replica.writer.rollback_transaction().unwrap();
                }
                replica.append(&transaction);
                pages.extend(transaction.pages.clone());
                pages.retain(|&pgno, _| pgno <= transaction.commit);
                appended.clone_from(&transaction.digest);
            }
            6..8 => {
                replica.publish();
                published.clone_from(&appended);
            }
            8 if readers.len() < 6 => {
                let db = replica.reader();
                db.execute_batch("BEGIN").unwrap();
                assert_eq!(digest(&db), published);
                readers.push(Snapshot { db, digest: published.clone() });
            }
            9 if !readers.is_empty() => {
                let reader = readers.swap_remove(rng.below(readers.len() as u64) as usize);
                assert_eq!(digest(&reader.db), reader.digest);
                check_integrity(&reader.db);
                reader.db.execute_batch("COMMIT").unwrap();
                assert_eq!(digest(&reader.db), published);
            }
            10 => {
                replica.checkpoint();
            }
            11 => {
                if rng.below(2) == 0 {
                    readers.clear();
                }
                replica.publish();
                published.clone_from(&appended);
                replica.checkpoint();
                let restart = replica.restart();
                assert!(restart == Restart::Done || !readers.is_empty(), "{restart:?}");
                let count: u32 =
                    source.db.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
                assert_eq!(replica.writer.pages(), count);
                compare(&replica.writer, &pages);
            }
            _ => {}
        }
        if let Some(reader) = readers.last() {
            assert_eq!(digest(&reader.db), reader.digest);
        }
    }
    readers.clear();
    replica.publish();
    assert!(replica.checkpoint().is_complete());
    assert_eq!(replica.restart(), Restart::Done);
    compare(&replica.writer, &pages);
    check_integrity(&replica.reader());
    assert_eq!(digest(&replica.reader()), digest(&source.db));
}

#[track_caller]
fn compare(writer: &WalWriter, pages: &BTreeMap<u32, Vec<u8>>) {
    let mut read = vec![0; writer.page_size.bytes()];
    for (&pgno, page) in pages {
        writer.read_page(Pgno(pgno), &mut read).unwrap();
        assert!(read == *page, "page {pgno}");
    }
}

#[test]
fn random_transactions_are_followed_page_by_page() {
    let mut rng = Rng::from_env();
    for page_size in [512, 1024, 4096, 65536] {
        follow_a_source(page_size, &mut rng);
    }
}

/// Runs the test `name` again in a process of its own, with the environment variable `key` set.
fn spawn_test(name: &str, key: &str, value: &Path) -> std::process::Child {
    let name = format!("engine::apply::wal::tests::{name}");
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args([&name, "--exact"]).env(key, value);
    child.stdout(std::process::Stdio::piped()).spawn().unwrap()
}

#[track_caller]
fn check_passed(child: std::process::Child) {
    let output = child.wait_with_output().unwrap();
    let report = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && report.contains("1 passed"), "{report}");
}

/// Readers in other threads and other processes never see a mixture, never go back, and are never
/// refused.
#[test]
fn concurrent_readers_see_one_transaction_after_the_other() {
    const READER: &str = "LITEFS_TEST_READER";
    if let Some(dir) = std::env::var_os(READER) {
        return read_until_the_end(Path::new(&dir));
    }
    let mut rng = Rng::from_env();
    let mut source = Source::new(1024);
    let transactions: Vec<Transaction> = (0..120).map(|_| source.change(&mut rng)).collect();
    let mut replica = Replica::of(&source);
    replica.apply(&transactions[0]);
    let dir = replica.dir.path().to_owned();
    let digests: Vec<&str> = transactions.iter().map(|one| &one.digest[..]).collect();
    os::write_atomic("test", &dir.join("digests"), digests.join("\n").as_bytes()).unwrap();
    let name = "concurrent_readers_see_one_transaction_after_the_other";
    let processes = [(); 2].map(|()| spawn_test(name, READER, &dir));
    std::thread::scope(|scope| {
        scope.spawn(|| read_until_the_end(&dir));
        for (i, transaction) in transactions.iter().enumerate().skip(1) {
            replica.append(transaction);
            if i % 3 != 0 {
                replica.publish();
            }
            if i % 10 == 0 {
                replica.checkpoint();
                replica.restart();
            }
        }
        replica.publish();
        os::write_atomic("test", &dir.join("done"), b"").unwrap();
    });
    processes.into_iter().for_each(check_passed);
    assert!(replica.checkpoint().is_complete());
    assert_eq!(digest(&replica.reader()), transactions[119].digest);
}

/// Reads the database in `dir` until there is a file `done`, and once more.
fn read_until_the_end(dir: &Path) {
    let digests = std::fs::read_to_string(dir.join("digests")).unwrap();
    let digests: Vec<&str> = digests.lines().collect();
    let db = Connection::open(dir.join("db")).unwrap();
    db.busy_timeout(std::time::Duration::from_secs(10)).unwrap();
    let mut seen = 0;
    loop {
        let done = dir.join("done").exists();
        db.execute_batch("BEGIN").unwrap();
        let now = digest(&db);
        let found = digests[seen..].iter().position(|digest| **digest == *now);
        seen += found.unwrap_or_else(|| panic!("{now} is no state after {seen}"));
        check_integrity(&db);
        assert_eq!(digest(&db), now);
        db.execute_batch("COMMIT").unwrap();
        if done {
            assert_eq!(seen, digests.len() - 1);
            return;
        }
    }
}

/// Every call that changes a file fails once, each in a run of its own. What was taken back is tried
/// again; readers and SQLite's own recovery see whole transactions throughout.
///
/// Faults are of the whole process, so this happens in one of its own.
#[test]
fn every_file_call_may_fail_once() {
    const CHILD: &str = "LITEFS_TEST_FAULT_CHILD";
    if std::env::var_os(CHILD).is_none() {
        return check_passed(spawn_test("every_file_call_may_fail_once", CHILD, Path::new("1")));
    }
    let mut source = Source::new(512);
    let transactions: Vec<Transaction> = (0..4).map(|i| source.insert(10 + 20 * i, 300)).collect();
    let mut failed = 0;
    while run_with_fault(&source, &transactions, failed) == Fired::Yes {
        failed += 1;
    }
    assert!(failed > 40, "{failed} calls");
}

#[derive(PartialEq, Eq)]
enum Fired {
    Yes,
    No,
}

fn run_with_fault(source: &Source, transactions: &[Transaction], after: u32) -> Fired {
    let mut replica = Replica::of(source);
    let reader = replica.reader();
    let label = "apply:".to_owned();
    os::fault::arm(os::fault::Fault { label, after, errno: libc::ENOSPC });
    for transaction in transactions {
        let before = digest(&reader);
        while replica.try_apply(transaction).is_err() {
            replica.writer.rollback_unpublished().unwrap();
            assert_eq!(digest(&reader), before);
            assert_eq!(digest_after_a_crash(&replica), before);
        }
        assert_eq!(digest(&reader), transaction.digest);
        reader.execute_batch("BEGIN").unwrap();
        assert_eq!(digest(&reader), transaction.digest);
        replica.retry(|writer, locks, cache| writer.checkpoint(locks, cache).map(drop));
        assert_eq!(digest_after_a_crash(&replica), transaction.digest);
        reader.execute_batch("COMMIT").unwrap();
        replica.retry(|writer, locks, cache| {
            let restart = writer.restart(locks, cache);
            assert_eq!(digest(&reader), transaction.digest);
            restart.map(|restart| assert_eq!(restart, Restart::Done))
        });
        check_integrity(&reader);
        assert_eq!(digest_after_a_crash(&replica), transaction.digest);
    }
    if os::fault::disarm() { Fired::No } else { Fired::Yes }
}

impl Replica {
    fn try_apply(&mut self, transaction: &Transaction) -> Result<(), Error> {
        let (first, rest): (Vec<_>, Vec<_>) =
            transaction.pages().partition(|(pgno, _)| pgno.0 % 2 == 0);
        for (pgno, page) in first {
            self.writer.append_page(pgno, page)?;
        }
        self.writer.append(transaction.commit, rest)?;
        self.writer.publish(&mut self.locks, &self.cache)
    }

    /// Does something again and again until it succeeds.
    fn retry(
        &mut self,
        step: impl Fn(&mut WalWriter, &mut FileLocks, &Announced) -> Result<(), Error>,
    ) {
        while step(&mut self.writer, &mut self.locks, &self.cache).is_err() {}
    }
}

/// What SQLite recovers from copies of database and log, as after a crash.
fn digest_after_a_crash(replica: &Replica) -> String {
    let dir = tempfile::tempdir().unwrap();
    let copies = open_files(dir.path());
    let WalFiles { database, wal, .. } = &replica.writer.files;
    for (from, to) in [(database, &copies.database), (wal, &copies.wal)] {
        let mut bytes = vec![0; from.metadata().unwrap().len() as usize];
        from.read_exact_at(&mut bytes, 0).unwrap();
        to.write_all_at(&bytes, 0).unwrap();
    }
    let db = Connection::open(dir.path().join("db")).unwrap();
    check_integrity(&db);
    digest(&db)
}
