//! Replacing the WAL and the wal-index while everybody is locked out.
//!
//! Clients that have the wal-index mapped go on with it, so it is not removed but overwritten: an
//! empty log, under new salts, so that the next writer begins a new WAL. Without passthrough the
//! pages that clients map belong to the mount: dropping them makes the kernel write its old ones
//! back, and those writes are swallowed meanwhile ([`super::Inbox::is_rewriting_index`]).

use std::sync::atomic::Ordering;

use ltx::{PageSize, Pgno};

use super::exclusive::Stale;

use crate::engine::capture::Change;
use crate::engine::db::Db;
use crate::engine::error::Result;
use crate::engine::files::FileKind;
use crate::engine::unsynced;
use crate::os;
use crate::sqlite::wal::{ByteOrder, Salts, WalChecksum, WalHeader};
use crate::sqlite::wal_index::{
    CKPT_AT, CheckpointInfo, HEADER_COPY_SIZE, HEADER_SIZE, IndexHeader,
};

impl Db {
    /// Moves what the WAL holds into the database file and empties it, durably. Everybody is locked
    /// out, and the chain holds all of it.
    pub(super) fn retire_wal(&self, change: &mut Change, stale: &mut Stale) -> Result<()> {
        let in_use = change.wal.frame() > 0 || change.strays.is_some();
        let Some(page_size) = change.page_size.filter(|_| in_use) else {
            self.forget_strays(change);
            return Ok(());
        };
        self.forget_strays_of(change, stale)?;
        if let Some(database) = self.files.get(FileKind::Database) {
            stale.files.push(database.ino);
        }
        self.checkpoint_fully(change)?;
        self.empty_wal(change, page_size, change.pages(), stale)
    }

    /// Empties the WAL, whose content is in the database file, and gives readers an empty index over
    /// a database of `pages` pages. The WAL keeps a header: SQLite takes an empty file for none, and
    /// page 1 may say that there is none.
    ///
    /// The index goes first: without it nobody has a use for the frames, so a step that fails leaves a
    /// state that can be read, and that this can be called for again. Until then the frames count as
    /// captured.
    pub(super) fn empty_wal(
        &self,
        change: &mut Change,
        page_size: PageSize,
        pages: u32,
        stale: &mut Stale,
    ) -> Result<()> {
        let index = self.next_index(page_size, pages)?;
        self.write_empty_index(&index, stale)?;
        if let Some(wal) = self.files.get(FileKind::Wal) {
            let empty = WalHeader {
                order: index.order,
                page_size: index.page_size,
                sequence: 0,
                salts: index.salts,
            };
            stale.files.push(wal.ino);
            os::truncate("apply:wal", &wal.file, 0)
                .and_then(|()| os::write_at("apply:wal", &wal.file, &empty.encode_log(), 0))
                .and_then(|()| os::sync("apply:wal", &wal.file))
                .map_err(self.files.error("truncate wal", FileKind::Wal))?;
        }
        change.wal.clear();
        self.forget_strays(change);
        Ok(())
    }

    fn write_empty_index(&self, index: &IndexHeader, stale: &mut Stale) -> Result<()> {
        let Some(shm) = self.files.get(FileKind::Shm) else { return Ok(()) };
        if !self.shared.is_passthrough() {
            // Until the kernel has dropped its pages.
            self.inbox.rewriting_index.store(true, Ordering::SeqCst);
            stale.files.push(shm.ino);
        }
        let copy = index.encode();
        let mut bytes = [0; HEADER_SIZE];
        bytes[..HEADER_COPY_SIZE].copy_from_slice(&copy);
        bytes[HEADER_COPY_SIZE..CKPT_AT].copy_from_slice(&copy);
        bytes[CKPT_AT..].copy_from_slice(&CheckpointInfo::EMPTY.encode());
        os::write_at("apply:index", &shm.file, &bytes, 0)
            .map_err(self.files.error("write wal-index", FileKind::Shm))
    }

    /// The header of an empty wal-index over a database of `pages` pages, different from the present
    /// one.
    fn next_index(&self, page_size: PageSize, pages: u32) -> Result<IndexHeader> {
        let mut old = [0; HEADER_COPY_SIZE];
        if let Some(shm) = self.files.get(FileKind::Shm) {
            os::read_up_to("read:index", &shm.file, &mut old, 0)
                .map_err(self.files.error("read wal-index", FileKind::Shm))?;
        }
        let before = IndexHeader::parse(&old);
        let random = super::random_u32();
        Ok(IndexHeader {
            change: before.map_or(1, |header| header.change.wrapping_add(1)),
            order: before.map_or(ByteOrder::NATIVE, |header| header.order),
            page_size,
            mx_frame: 0,
            pages,
            frame_checksum: WalChecksum(0, 0),
            salts: before.map_or(Salts(random, random), |header| header.salts.next(random)),
        })
    }

    /// Removes the WAL and the wal-index of a database that is in rollback mode now. The names go from the
    /// kernel's cache before anybody else gets a lock: SQLite takes a WAL that is there for the journal mode,
    /// and makes it anew if it is not, which nobody but the applier fills on a replica.
    pub(super) fn remove_wal_files(&self, change: &mut Change, stale: &mut Stale) -> Result<()> {
        change.wal.clear();
        self.forget_strays(change);
        let had = [self.files.remove(FileKind::Wal)?, self.files.remove(FileKind::Shm)?];
        if had != [false, false] {
            self.chain.forget_recent();
            let name = |kind: FileKind| format!("{}{}", self.name, kind.suffix());
            stale.names.extend([FileKind::Wal, FileKind::Shm].map(name));
        }
        Ok(())
    }

    fn forget_strays(&self, change: &mut Change) {
        change.strays = None;
        self.has_strays.store(false, Ordering::SeqCst);
    }

    /// Copies what the WAL holds into the database file, durably. Everybody is locked out, and the
    /// chain holds all of it. The WAL stays as it is.
    ///
    /// As with every checkpoint it is durable first. Else a power loss could leave its beginning beside
    /// pages of its end, which at the next start would look like new transactions on top of them.
    pub(in crate::engine) fn checkpoint_fully(&self, change: &mut Change) -> Result<()> {
        let (Some(wal), Some(database)) =
            (self.files.get(FileKind::Wal), self.files.get(FileKind::Database))
        else {
            return Ok(());
        };
        let frame = change.wal.frame();
        let Some(map) = self.wal_map(&wal.file, Some(frame))?.filter(|_| frame > 0) else {
            return Ok(());
        };
        os::sync("checkpoint:wal", &wal.file)
            .map_err(self.files.error("sync wal", FileKind::Wal))?;
        let page_size = map.cursor.page_size();
        let mut page = vec![0; page_size.bytes()];
        for (pgno, offset) in map.pages.range(..=Pgno(map.commit)) {
            os::read_exact_at("read:checkpoint", &wal.file, &mut page, *offset)
                .map_err(self.files.error("read wal", FileKind::Wal))?;
            os::write_at("checkpoint:database", &database.file, &page, page_size.offset(*pgno))
                .map_err(self.files.error("write database", FileKind::Database))?;
        }
        os::truncate("checkpoint:database", &database.file, page_size.offset(Pgno(map.commit + 1)))
            .and_then(|()| unsynced::sync("checkpoint:database", &database.file))
            .map_err(self.files.error("sync database", FileKind::Database))
    }
}
