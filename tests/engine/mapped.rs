//! A log of which the engine sees the wal-index, as with passthrough.

use std::os::unix::fs::FileExt as _;

use litefs::engine::Db;
use litefs::engine::files::FileKind;
use litefs::engine::locks::LockKind;
use litefs::sqlite::lock_byte::{Lock, LockSet};
use litefs::sqlite::wal::{ByteOrder, Frame, Salts, WalCursor, WalHeader};
use litefs::sqlite::wal_index::IndexHeader;
use ltx::{PageSize, Pgno};

use super::{PAGE, file, lock, unlock_all};

/// A log of commits to page 1 that an application writes past the engine, and its wal-index.
pub(super) struct Mapped<'a> {
    db: &'a Db,
    /// Frame 0, then one after each frame.
    cursors: Vec<WalCursor>,
}

impl Mapped<'_> {
    pub(super) fn new(db: &Db) -> Mapped<'_> {
        let (order, salts, page_size) =
            (ByteOrder::NATIVE, Salts(1, 2), PageSize::new(PAGE as u32).unwrap());
        let header = WalHeader { order, page_size, sequence: 0, salts };
        file(db, FileKind::Wal).file.write_all_at(&header.encode(), 0).unwrap();
        file(db, FileKind::Shm);
        Mapped { db, cursors: vec![WalCursor::start(&header)] }
    }

    /// Writes the `len` first bytes of frame `frame`.
    pub(super) fn write(&mut self, frame: usize, page: &[u8], len: usize) {
        self.cursors.truncate(frame);
        let (mut cursor, mut bytes) = (self.cursors[frame - 1], Vec::new());
        let (offset, commit) = (cursor.offset(), Some(self.db.page_count()));
        cursor.encode(&Frame { pgno: Pgno(1), commit, page }, &mut bytes);
        file(self.db, FileKind::Wal).file.write_all_at(&bytes[..len], offset).unwrap();
        self.cursors.push(cursor);
    }

    /// What clients take for committed.
    pub(super) fn index(&self, mx_frame: usize) {
        let cursor = &self.cursors[mx_frame];
        let header = IndexHeader {
            change: 1,
            order: ByteOrder::NATIVE,
            page_size: cursor.page_size(),
            mx_frame: cursor.frame(),
            pages: self.db.page_count(),
            frame_checksum: cursor.checksum(),
            salts: cursor.salts(),
        };
        file(self.db, FileKind::Shm).file.write_all_at(&header.encode().repeat(2), 0).unwrap();
    }

    /// Takes the right to write and gives it up.
    pub(super) fn write_lock(&self) {
        lock(self.db, LockSet::one(Lock::Write), LockKind::Exclusive).unwrap();
        unlock_all(self.db);
    }
}
