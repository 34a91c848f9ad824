//! When neither the frames nor a journal can tell what changed: every page is compared with its
//! checksum, and the difference becomes one transaction.
//!
//! That happens after locking_mode=EXCLUSIVE, after a client died in a way that made SQLite overwrite
//! frames that were captured already, and after a failed capture.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use ltx::{PageSize, Pgno};

use super::wal::End;
use super::{Change, Sink};
use crate::engine::db::Db;
use crate::engine::error::{Error, Result};
use crate::engine::files::FileKind;
use crate::engine::transaction::{Draft, PageRef, WalSpan};
use crate::os;
use crate::sqlite::wal::{self, WalCursor};

/// The newest image of each page in a WAL, and where the WAL ends.
pub(in crate::engine) struct WalMap {
    /// Page to the offset of its image in the WAL, in bytes.
    pub pages: BTreeMap<Pgno, u64>,
    /// Size of the database in pages after the last commit.
    pub commit: u32,
    /// After the last committed frame.
    pub cursor: WalCursor,
}

impl Db {
    /// Compares all pages, those of the WAL up to `end`, with their checksums and takes the difference, if there is one.
    pub(super) fn resync_wal(
        &self,
        change: &mut Change,
        wal: &Arc<File>,
        end: End,
        sink: Sink,
    ) -> Result<()> {
        tracing::warn!(db = %self.name, "compare every page: the wal changed in a way that cannot be followed");
        let last = match end {
            End::Frame(last) => Some(last),
            End::LastCommit => None,
        };
        let Some(map) = self.wal_map(wal, last)? else {
            return Err(self.corrupt("compare pages", "the wal has no valid header"));
        };
        if last.is_some_and(|last| last != map.cursor.frame()) {
            let text = format!("the wal is valid to frame {} only", map.cursor.frame());
            return Err(self.corrupt("compare pages", &text));
        }
        let cursor = map.cursor;
        self.take_difference(change, map, wal, sink)?;
        change.wal.resume(cursor);
        Ok(())
    }

    /// As if the WAL, which has a header, held nothing. What is captured of it stays so: if it cannot go after
    /// all, its frames are no new ones.
    pub(super) fn resync_file(
        &self,
        change: &mut Change,
        wal: &Arc<File>,
        sink: Sink,
    ) -> Result<()> {
        tracing::warn!(db = %self.name, "compare every page: an application died in the middle of a commit");
        let Some(map) = self.wal_map(wal, Some(0))? else {
            return Err(self.corrupt("compare pages", "the wal has no valid header"));
        };
        self.take_difference(change, map, wal, sink)
    }

    fn take_difference(
        &self,
        change: &mut Change,
        mut map: WalMap,
        wal: &Arc<File>,
        sink: Sink,
    ) -> Result<()> {
        let page_size = map.cursor.page_size();
        if change.page_size.is_some_and(|known| known != page_size) {
            return Err(self.corrupt("compare pages", "the wal's page size is not the database's"));
        }
        let Some(database) = self.files.get(FileKind::Database) else {
            return Err(self.corrupt("compare pages", "the database file is missing"));
        };
        if map.cursor.frame() == 0 {
            let header = self.read_header(&database.file)?;
            map.commit =
                header.and_then(|(header, len)| header.page_count_or_len(len)).unwrap_or(0);
        }
        let spool = Arc::new(self.spool_file()?);
        let pages = self.spool_changed(change, &map, wal, &database.file, &spool)?;
        if pages.is_empty() && map.commit == change.pages() {
            change.needs_resync = false;
            return Ok(());
        }
        let transaction = change.transaction(Draft {
            page_size,
            commit: map.commit,
            pages,
            source: spool,
            timestamp_ms: (self.shared.clock)(),
            node_id: self.shared.node_id,
            wal: WalSpan::default(),
        });
        self.take_transaction(change, transaction, sink)?;
        change.needs_resync = false;
        Ok(())
    }

    /// Copies the images that differ into `spool`, since they come from two files.
    fn spool_changed(
        &self,
        change: &Change,
        map: &WalMap,
        wal: &File,
        database: &File,
        spool: &File,
    ) -> Result<Vec<PageRef>> {
        let page_size = map.cursor.page_size();
        let mut image = vec![0; page_size.bytes()];
        let mut pages = Vec::new();
        for pgno in (1..=map.commit).map(Pgno).filter(|pgno| *pgno != page_size.lock_pgno()) {
            read_page(map, wal, database, page_size, pgno, &mut image)
                .map_err(self.files.error("read page", FileKind::Database))?;
            let sum = ltx::page_checksum(pgno, &image);
            if change.sums.get(pgno) != sum {
                let offset = (pages.len() * page_size.bytes()) as u64;
                os::write_at("resync:spool", spool, &image, offset)
                    .map_err(Error::io("write spool file", self.dir.path()))?;
                pages.push(PageRef { pgno, sum, offset });
            }
        }
        Ok(pages)
    }

    /// The newest image of each page in the committed part of the WAL, up to frame `last` if given;
    /// none if the WAL has no valid header.
    pub(in crate::engine) fn wal_map(
        &self,
        wal: &File,
        last: Option<u32>,
    ) -> Result<Option<WalMap>> {
        let mut bytes = [0; wal::HEADER_SIZE];
        let read = os::read_up_to("read:resync", wal, &mut bytes, 0)
            .map_err(self.files.error("read wal", FileKind::Wal))?;
        let Some(header) =
            (read == bytes.len()).then(|| wal::WalHeader::parse(&bytes).ok()).flatten()
        else {
            return Ok(None);
        };
        let mut cursor = WalCursor::start(&header);
        let mut map = WalMap { pages: BTreeMap::new(), commit: 0, cursor };
        let mut bytes = vec![0; cursor.frame_size()];
        let mut pending = Vec::new();
        while last.is_none_or(|last| cursor.frame() < last) {
            let offset = cursor.offset();
            let read = os::read_up_to("read:resync", wal, &mut bytes, offset)
                .map_err(self.files.error("read wal", FileKind::Wal))?;
            // Behind a short read stands the frame before, and SQLite fills a sector with copies of that.
            let Ok(frame) = cursor.verify(&bytes[..read]) else { break };
            pending.push((frame.pgno, offset + wal::FRAME_HEADER_SIZE as u64));
            if let Some(commit) = frame.commit {
                map.pages.extend(pending.drain(..));
                (map.commit, map.cursor) = (commit, cursor);
            }
        }
        Ok(Some(map))
    }
}

/// The newest image of a page: of the WAL, or of the database file, where it ends zeros.
pub(in crate::engine) fn read_page(
    map: &WalMap,
    wal: &File,
    database: &File,
    page_size: PageSize,
    pgno: Pgno,
    image: &mut [u8],
) -> std::io::Result<()> {
    let (file, offset) = match map.pages.get(&pgno) {
        Some(offset) => (wal, *offset),
        None => (database, page_size.offset(pgno)),
    };
    os::read_zero_extended("read:page", file, image, offset)
}
