//! Ending a rollback journal whose client died, as the next client would: its former pages are played
//! back, and what differs even then is a transaction (SQLite journals no free pages).
//!
//! A journal of a transaction over several databases that has committed is not played back: what the
//! database file holds is the transaction.

use std::path::Path;
use std::time::Duration;

use super::Turn;
use super::exclusive::Stale;
use crate::engine::capture::Change;
use crate::engine::capture::journal::JournalState;
use crate::engine::db::{Db, Refusal};
use crate::engine::error::{Error, Result};
use crate::engine::files::FileKind;
use crate::engine::layout::DataDir;
use crate::engine::unsynced;
use crate::os;
use crate::sqlite::journal::{JournalReader, super_journal};

impl Db {
    /// Whether a client left a journal behind that the next one would play back.
    pub(in crate::engine) fn has_hot_journal(&self) -> bool {
        let mut change = self.change.lock().unwrap();
        self.forget_cold_journal(&mut change);
        change.journal.active && !self.has_writer() && !self.is_lost()
    }

    /// A journal whose writer died before it synced it begins with a zero and is none for SQLite (pager.c,
    /// `hasHotJournal`), which then ends it with its next one, or never. Nothing was written under it.
    pub(in crate::engine) fn forget_cold_journal(&self, change: &mut Change) {
        if !change.journal.active || !change.journal.dirty.is_empty() || self.is_reserved() {
            return;
        }
        let mut first = [0];
        let read = self
            .files
            .get(FileKind::Journal)
            .map_or(Ok(0), |journal| os::read_up_to("read:journal", &journal.file, &mut first, 0));
        if read.is_ok() && first == [0] {
            change.journal = JournalState::default();
        }
    }

    /// Ends a hot journal, waiting for readers `limit` long for each step.
    pub(in crate::engine) fn settle_journal(
        &self,
        _turn: &mut Turn,
        limit: Duration,
    ) -> Result<()> {
        let _locks = self.lock_everything(limit)?;
        let mut change = self.change.lock().unwrap();
        let mut stale = Stale::default();
        let settled = self.roll_back(&mut change, &mut stale);
        drop(change);
        self.drop_cached(stale);
        settled
    }

    /// As [`Db::settle_journal`], by who has everybody locked out.
    pub(super) fn roll_back(&self, change: &mut Change, stale: &mut Stale) -> Result<()> {
        let journal = self.files.get(FileKind::Journal).filter(|_| change.journal.active);
        let (Some(journal), Some(database)) = (journal, self.files.get(FileKind::Database)) else {
            return Ok(());
        };
        let path = self.files.path(FileKind::Journal);
        stale.files.extend([journal.ino, database.ino]);
        if !self.has_committed_elsewhere(&path)? {
            self.play_back(change, &path, &database.file)?;
        }
        self.end_hot_journal(change, journal).map_err(|refusal| self.not_ended(change, refusal))?;
        tracing::info!(db = %self.name, pos = %change.pos, "rolled back what a client left half-written");
        Ok(())
    }

    /// Whether the journal is one of a transaction over several databases that has committed.
    fn has_committed_elsewhere(&self, path: &Path) -> Result<bool> {
        let read =
            || super_journal(os::FileCursor::new("read:rollback", std::fs::File::open(path)?));
        let Some(name) = read().map_err(Error::io("read journal", path))? else {
            return Ok(false);
        };
        let name = String::from_utf8_lossy(&name);
        let name = Path::new(name.as_ref()).file_name().unwrap_or_default();
        Ok(!DataDir::new(&self.shared.data_dir).super_journals().join(name).exists())
    }

    fn play_back(&self, change: &Change, path: &Path, database: &std::fs::File) -> Result<()> {
        let error = || Error::io("read journal", path);
        let file = std::fs::File::open(path).map_err(error())?;
        let Some(mut journal) =
            JournalReader::open(os::FileCursor::new("read:rollback", file), change.page_size)
                .map_err(error())?
        else {
            return Ok(());
        };
        let header = *journal.header();
        let write = || Error::io("write database", path);
        while let Some(record) = journal.next_record().map_err(error())? {
            let offset = header.page_size.offset(record.pgno);
            os::write_at("rollback:database", database, record.page, offset).map_err(write())?;
        }
        let len = u64::from(header.database_pages) * u64::from(header.page_size.get());
        os::truncate("rollback:database", database, len)
            .and_then(|()| unsynced::sync("rollback:database", database))
            .map_err(write())
    }

    fn not_ended(&self, change: &Change, refusal: Refusal) -> Error {
        if refusal == Refusal::ReadOnly && !self.shared.is_writable() {
            let what = "a transaction that was rolled back has left other free pages";
            return Error::Diverged { db: self.name.clone(), pos: change.pos, what };
        }
        self.busy("its journal cannot be ended now")
    }
}
