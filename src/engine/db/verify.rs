//! Comparing the whole database with its checksums; and the ends of its life: dropped, closed.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use ltx::{Pgno, Txid};

use super::Db;
use crate::engine::capture::Change;
use crate::engine::capture::resync::read_page;
use crate::engine::checksum::{self, Saved};
use crate::engine::error::{Error, Result, chain_text};
use crate::engine::files::FileKind;
use crate::engine::transaction::{Draft, Transaction, WalSpan};
use crate::engine::unsynced;
use crate::os;

impl Db {
    /// With `strict-verify`: the whole database must have the checksum of the position.
    pub(in crate::engine) fn verify_if_strict(&self, change: &mut Change) -> Result<()> {
        if self.shared.strict_verify { self.verify_all(change) } else { Ok(()) }
    }

    /// Compares every page with its checksum.
    pub(in crate::engine) fn verify_all(&self, change: &Change) -> Result<()> {
        let Some(database) = self.files.get(FileKind::Database) else { return Ok(()) };
        let Some(page_size) = change.page_size else { return Ok(()) };
        let wal = self.files.get(FileKind::Wal);
        let map = match &wal {
            Some(wal) if change.wal.frame() > 0 => {
                self.wal_map(&wal.file, Some(change.wal.frame()))?
            }
            _ => None,
        };
        let mut image = vec![0; page_size.bytes()];
        let lock = page_size.lock_pgno();
        for pgno in (1..=change.pages()).map(Pgno).filter(|pgno| *pgno != lock) {
            let read = match (&map, &wal) {
                (Some(map), Some(wal)) => {
                    read_page(map, &wal.file, &database.file, page_size, pgno, &mut image)
                }
                _ => os::read_zero_extended(
                    "read:verify",
                    &database.file,
                    &mut image,
                    page_size.offset(pgno),
                ),
            };
            read.map_err(self.files.error("read page", FileKind::Database))?;
            if ltx::page_checksum(pgno, &image) != change.sums.get(pgno) {
                let text = format!("page {pgno} is not what {} says", change.pos);
                return Err(self.corrupt("verify database", &text));
            }
        }
        Ok(())
    }

    /// The transaction that leaves nothing.
    pub(super) fn deletion(&self, change: &Change, database: &Arc<File>) -> Transaction {
        change.transaction(Draft {
            page_size: change.page_size.expect("a database with pages has a page size"),
            commit: 0,
            pages: Vec::new(),
            source: database.clone(),
            timestamp_ms: (self.shared.clock)(),
            node_id: self.shared.node_id,
            wal: WalSpan::default(),
        })
    }

    /// Removes LTX files that are older than `retention`, as [`Chain::expired`] says. What they explain
    /// is made durable before: after a power loss nothing else could.
    ///
    /// [`Chain::expired`]: crate::engine::chain::Chain::expired
    pub fn retain(&self, retention: Duration, keep_from: Option<Txid>) -> Result<usize> {
        // Few commits are never synced for their number. Where that fails, what is durable may go.
        let synced = self.chain.sync_overdue(retention);
        let old = self.chain.expired(retention, keep_from);
        synced?;
        if old.is_empty() {
            return Ok(0);
        }
        let database = self.files.get(FileKind::Database);
        let marked = database.as_ref().map(|database| unsynced::is_marked(&database.file));
        if marked.transpose().map_err(self.files.error("stat", FileKind::Database))? == Some(true) {
            let reason =
                "a sync of its file failed: no ltx file goes until a restart writes it again";
            return Err(Error::Failed { db: self.name.clone(), reason: reason.to_owned() });
        }
        for kind in [FileKind::Wal, FileKind::Database] {
            if let Some(backing) = self.files.get(kind) {
                os::sync("retain:sync", &backing.file)
                    .inspect_err(|_| database.iter().for_each(|one| unsynced::mark(&one.file)))
                    .map_err(self.files.error("sync", kind))?;
            }
        }
        self.files.sync_names()?;
        self.chain.remove(&old)
    }

    /// The node stops: everything captured is durable in the chain, the WAL is in the database file,
    /// and the page checksums are saved, so that the next start has nothing to compute. Unless an
    /// application is in the middle of a transaction: then the next start does all that.
    pub(in crate::engine) fn close(&self) -> Result<()> {
        self.take_back(None, "the node stops");
        self.close_borrowing();
        self.stop_applier();
        if self.has_hot_journal()
            && let Err(error) = self.settle_journal(&mut self.turn(), Duration::ZERO)
        {
            // The next start rolls it back.
            tracing::warn!(db = %self.name, error = chain_text(&error), "roll back at the end");
        }
        if self.is_lost() {
            // What could not be brought to one state stays as it is for the next start.
            return Ok(());
        }
        let mut turn = self.turn();
        let mut change = self.change.lock().unwrap();
        self.settle_wal(&mut change)?;
        let woken = self.let_go(&mut turn, &mut change);
        let closed = self.close_files(&mut change);
        drop(change);
        self.wake(woken);
        closed
    }

    /// Everything is in the database file, if no application is in the way.
    fn close_files(&self, change: &mut Change) -> Result<()> {
        if self.is_written() {
            // What is committed when nobody is asked any more stands in the WAL for the next start.
            tracing::warn!(db = %self.name, "an application holds its write lock at the end: the wal stays");
            return Ok(());
        }
        self.checkpoint_fully(change)?;
        change.wal.clear();
        self.files.remove(FileKind::Wal)?;
        self.files.remove(FileKind::Shm)?;
        // With a journal, the file is not what they say.
        if change.journal.active { Ok(()) } else { self.save_checksums(change) }
    }

    /// Saves the page checksums. Nothing is committed any more.
    fn save_checksums(&self, change: &mut Change) -> Result<()> {
        let (Some(page_size), Some(database)) =
            (change.page_size, self.files.get(FileKind::Database))
        else {
            return Ok(());
        };
        // What is applied to a rollback-mode database is not synced; after a power loss nothing would
        // tell that the pages are older than their checksums.
        unsynced::sync("close:database", &database.file)
            .map_err(self.files.error("sync database", FileKind::Database))?;
        let saved = Saved { page_size, pos: change.pos, sums: std::mem::take(&mut change.sums) };
        let path = self.dir.checksums();
        checksum::save(&path, &database.file, &saved).map_err(Error::io("save checksums", &path))
    }
}
