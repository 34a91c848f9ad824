//! Applications that die at the wrong moment, and programs that remove files without a lock.

use std::sync::Arc;

use litefs::engine::db::Refusal;
use litefs::engine::files::FileKind;
use litefs::engine::locks::LockKind;
use litefs::engine::{Db, LtxBytes, Next, Overlap};
use litefs::os;
use litefs::sqlite::lock_byte::{Lock, LockSet};
use litefs::sqlite::wal::{ByteOrder, Frame, Salts, WalCursor, WalHeader};
use litefs::sqlite::wal_index::IndexHeader;
use ltx::{PageSize, Pgno, Txid};

use super::{PAGE, VIA, asked, begin, commit, database, file, image, lock, primary, unlock_all};

use crate::support::no_cache::NoCache;

const SALTS: Salts = Salts(1, 2);

/// Says in the wal-index that the log is committed up to `cursor`.
fn publish(db: &Db, pages: u32, cursor: &WalCursor) {
    let header = IndexHeader {
        change: cursor.frame(),
        order: ByteOrder::NATIVE,
        page_size: PageSize::new(PAGE as u32).unwrap(),
        mx_frame: cursor.frame(),
        pages,
        frame_checksum: cursor.checksum(),
        salts: SALTS,
    };
    let copy = header.encode();
    let shm = file(db, FileKind::Shm);
    os::write_at("test", &shm.file, &[copy, copy].concat(), 0).unwrap();
}

/// `docs/differences.md`, 10: "`mxFrame` of the wal-index says what is committed."
#[test]
fn a_commit_frame_that_the_wal_index_does_not_know_is_no_transaction() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    engine.mounted(Arc::new(NoCache), true);
    let db = database(&engine, "db");
    let mut content = image(3);
    content[18..20].fill(2); // WAL mode.
    commit(&db, &content);
    let pages = db.page_count();
    let header = WalHeader {
        order: ByteOrder::NATIVE,
        page_size: PageSize::new(PAGE as u32).unwrap(),
        sequence: 0,
        salts: SALTS,
    };
    let page = |byte: u8| {
        let mut page = content[..PAGE].to_vec();
        page[PAGE - 1] = byte;
        page
    };
    let log = file(&db, FileKind::Wal);
    asked(|answer| db.write_wal(&log, VIA, 0, &header.encode(), answer)).unwrap();
    let mut cursor = WalCursor::start(&header);
    // Two applications die one after the other behind their commit frame; a third one does not.
    for (byte, lives) in [(1, true), (2, false), (3, false), (4, true)] {
        lock(&db, LockSet::one(Lock::Write), LockKind::Exclusive).unwrap();
        let (mut next, mut bytes) = (cursor, Vec::new());
        let frame = Frame { pgno: Pgno(1), commit: Some(pages), page: &page(byte) };
        next.encode(&frame, &mut bytes);
        asked(|answer| db.write_wal(&log, VIA, cursor.offset(), &bytes, answer)).unwrap();
        let before = db.pos().txid;
        if lives {
            publish(&db, pages, &next);
            cursor = next;
        }
        unlock_all(&db);
        let expected = if lives { before.next() } else { before };
        assert_eq!(db.pos().txid, expected, "frame {byte}");
    }
    assert_eq!(db.pos().txid, Txid(3));
    engine.close().unwrap();
    let found = std::fs::read(dir.path().join("dbs/db/database")).unwrap();
    assert_eq!(found[PAGE - 1], 4);
}

/// `docs/differences.md`, 13: "A journal that covers written pages is ended only under a write lock; a
/// drop needs every lock."
#[test]
fn nobody_ends_a_journal_or_drops_a_database_under_who_uses_it() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    let content = image(3);
    commit(&db, &content);
    begin(&db, &image(4));
    assert_eq!(db.drop_database(), Err(Refusal::Busy));
    unlock_all(&db); // The application died.
    assert_eq!(asked(|answer| db.remove_journal(answer)), Err(Refusal::Busy));
    let journal = file(&db, FileKind::Journal);
    assert_eq!(asked(|answer| db.truncate_journal(&journal, 0, answer)), Err(Refusal::Busy));
    assert_eq!(db.pos().txid, Txid(1));
    lock(&db, LockSet::one(Lock::Shared), LockKind::Shared).unwrap();
    assert_eq!(db.drop_database(), Err(Refusal::Busy), "somebody reads");
}

/// `docs/differences.md`, 25: "Under a journal any write counts for the pages it touches; the file may be
/// longer than the database".
#[test]
fn parts_of_pages_and_growth_by_truncation_are_captured() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    let content = image(10);
    commit(&db, &content);
    let pages = db.page_count();
    let before = db.pos();
    begin(&db, &content);
    let database = file(&db, FileKind::Database);
    // Two pages, neither of them whole; then room for later, as SQLITE_FCNTL_CHUNK_SIZE asks for it.
    db.write_database(&database, 3 * PAGE as u64 - 50, &[7; 100]).unwrap();
    db.truncate_database(&database, (content.len() + 64 * PAGE) as u64).unwrap();
    asked(|answer| db.remove_journal(answer)).unwrap();
    unlock_all(&db);
    assert_eq!(db.pos().txid, before.txid.next());
    assert_eq!(db.page_count(), pages, "the header says how large the database is");
    let path = database.file.clone();
    let mut sum = ltx::Checksum::EMPTY;
    for pgno in 1..=pages {
        let mut page = [0; PAGE];
        os::read_up_to("read:test", &path, &mut page, u64::from(pgno - 1) * PAGE as u64).unwrap();
        sum = sum.toggle(ltx::page_checksum(Pgno(pgno), &page));
    }
    assert_eq!(sum, db.pos().checksum);
}

/// `docs/differences.md`, 33: "Recent small transactions are encoded once for all replicas."
#[test]
fn a_recent_transaction_is_encoded_once_for_all_replicas() {
    let dir = tempfile::tempdir().unwrap();
    let engine = primary(dir.path());
    let db = database(&engine, "db");
    commit(&db, &image(1));
    let pos = db.pos();
    let _replica = engine.subscribe(Box::new(|| ()));
    commit(&db, &image(2));
    let bytes = || match db.next_after(pos, Overlap::Refused) {
        Next::Ltx { bytes: LtxBytes::Memory(bytes), .. } => bytes,
        _ => panic!("not in memory"),
    };
    assert!(Arc::ptr_eq(&bytes(), &bytes()));
}
