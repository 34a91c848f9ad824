//! Undoing a transaction whose writer died with half of it in the database file, as SQLite's next
//! reader would: the journal has the former pages.

use std::fs::File;

use ltx::Pgno;

use super::exclusive::Stale;
use crate::engine::capture::Change;
use crate::engine::capture::journal::JournalState;
use crate::engine::db::Db;
use crate::engine::error::{Error, Result};
use crate::engine::files::FileKind;
use crate::os;
use crate::sqlite::journal::{JournalReader, super_journal};

impl Db {
    /// Plays a journal back that was left, and empties it. The caller holds all locks, gives up the
    /// right to change, and then drops what is `stale` in the kernel's caches, also after an error.
    ///
    /// Errors: the pages are not those of the position afterwards; the transaction was one over
    /// several databases, of which SQLite has to find out whether it was committed.
    pub(in crate::engine) fn undo_journal(
        &self,
        change: &mut Change,
        stale: &mut Stale,
    ) -> Result<()> {
        let path = self.files.path(FileKind::Journal);
        let read = || Error::io("read journal", &path);
        let (Some(journal), Some(database)) =
            (self.files.get(FileKind::Journal), self.files.get(FileKind::Database))
        else {
            return Ok(());
        };
        let reader = JournalReader::open(File::open(&path).map_err(read())?, change.page_size);
        let Some(mut reader) = reader.map_err(read())? else { return Ok(()) };
        if super_journal(File::open(&path).map_err(read())?).map_err(read())?.is_some() {
            let what = "a transaction over several databases was left: open it on this node";
            return Err(Error::Busy { db: self.name.clone(), what });
        }
        stale.files.extend([journal.ino, database.ino]);
        let header = *reader.header();
        let write = || Error::io("write database", &path);
        while let Some(record) = reader.next_record().map_err(read())? {
            let offset = header.page_size.offset(record.pgno);
            os::write_at("undo:database", &database.file, record.page, offset).map_err(write())?;
        }
        let len = header.page_size.offset(Pgno(header.database_pages + 1));
        os::truncate("undo:database", &database.file, len)
            .and_then(|()| os::sync("undo:database", &database.file))
            .map_err(write())?;
        self.check_undone(change, &database.file)?;
        os::truncate("undo:journal", &journal.file, 0)
            .and_then(|()| os::sync("undo:journal", &journal.file))
            .map_err(Error::io("cut journal", &path))?;
        change.journal = JournalState::default();
        tracing::info!(db = %self.name, pos = %change.pos, "undid a transaction whose writer died");
        Ok(())
    }

    /// The pages that the transaction wrote are those of the position again.
    fn check_undone(&self, change: &Change, database: &File) -> Result<()> {
        let Some(page_size) = change.page_size else { return Ok(()) };
        let mut page = vec![0; page_size.bytes()];
        for &pgno in change.journal.dirty.iter().filter(|pgno| pgno.0 <= change.pages()) {
            let filled = os::read_up_to(database, &mut page, page_size.offset(pgno))
                .map_err(Error::io("read database", &self.files.path(FileKind::Database)))?;
            page[filled..].fill(0);
            if pgno != page_size.lock_pgno()
                && ltx::page_checksum(pgno, &page) != change.sums.get(pgno)
            {
                let what = "what a journal held is not what was committed";
                return Err(Error::Diverged { db: self.name.clone(), pos: change.pos, what });
            }
        }
        Ok(())
    }
}
