//! What connections that are open remember of transactions that are gone.
//!
//! SQLite keeps the schema as long as the schema cookie is what it was, and without a WAL it keeps pages
//! as long as the change counter is. Both are only counted up. Where transactions of this node give way
//! to those of another one, the same numbers may stand for something else, now or some transactions later.
//! A connection cannot be told of that; so what it has open is made useless: its files get other inodes,
//! locks on the old ones are refused, and the old wal-index has a version that SQLite does not know.
//! Whoever opens the database anew is not concerned, also in the same process.
//!
//! That is done only if numbers can meet. Most often they cannot: a cookie that did not move stands for
//! the schema of both histories, and with a WAL the change counter means nothing.

use std::fs::File;

use ltx::{PageSize, Pgno};

use super::Received;
use super::exclusive::Stale;
use crate::engine::capture::Change;
use crate::engine::db::Db;
use crate::engine::error::{Result, chain_text};
use crate::engine::files::FileKind;
use crate::os;
use crate::sqlite::header::{DatabaseHeader, HEADER_SIZE, JournalMode};
use crate::sqlite::schema::{self, Link};
use crate::sqlite::wal_index::IndexHeader;

impl Db {
    /// Turns out who has the database open, if it may take what it remembers for what a snapshot of
    /// another history holds. Everybody is locked out, and the database file has all of the database.
    pub(super) fn forget_for(
        &self,
        change: &mut Change,
        received: &Received,
        stale: &mut Stale,
    ) -> Result<()> {
        if change.pages() == 0 && !self.is_lost() {
            return Ok(());
        }
        let differs = self.differs(change, received).unwrap_or_else(|error| {
            tracing::debug!(db = %self.name, error = chain_text(&error), "compare schemas");
            false
        });
        if differs { Ok(()) } else { self.turn_out(change, stale) }
    }

    /// Turns out who has the database open, if late transactions in the WAL, which go now, changed the
    /// schema. Everybody is locked out.
    pub(super) fn forget_strays_of(&self, change: &mut Change, stale: &mut Stale) -> Result<()> {
        let Some(strays) = &change.strays else { return Ok(()) };
        let cookie = |frame| Some(self.first_page(frame).ok()??.schema_cookie);
        match (cookie(strays.wal.frame()), cookie(change.wal.frame())) {
            (Some(late), Some(ours)) if late == ours => Ok(()),
            _ => self.turn_out(change, stale),
        }
    }

    /// Whether SQLite will always see the one from the other, or need not.
    fn differs(&self, change: &Change, received: &Received) -> Result<bool> {
        let (Some(page_size), Some(database)) =
            (change.page_size, self.files.get(FileKind::Database))
        else {
            return Ok(false);
        };
        let mut ours = vec![0; page_size.bytes()];
        os::read_up_to("read:remembered", &database.file, &mut ours, 0)
            .map_err(self.files.error("read page 1", FileKind::Database))?;
        let mut theirs = vec![0; received.header.page_size.bytes()];
        let ltx = |source| self.ltx_error("read received ltx file", source);
        if received.open().map_err(ltx)?.next_page(&mut theirs).map_err(ltx)? != Some(Pgno(1)) {
            return Ok(false);
        }
        let parse = |page: &[u8]| DatabaseHeader::parse(page).ok();
        let (Some(our), Some(their)) = (parse(&ours), parse(&theirs)) else { return Ok(false) };
        let both_wal = [our, their].iter().all(|header| header.journal_mode == JournalMode::Wal);
        let counted = if both_wal { None } else { Some(our.change_counter) };
        if counted.max(change.counted).is_some_and(|counted| their.change_counter <= counted) {
            return Ok(false);
        }
        if their.schema_cookie != our.schema_cookie {
            return Ok(their.schema_cookie > our.schema_cookie);
        }
        if our.page_size != their.page_size || ours[HEADER_SIZE..] != theirs[HEADER_SIZE..] {
            return Ok(false);
        }
        self.has_same_schema(change, received, &database.file, &ours)
    }

    /// Whether all other pages of the schema table are the same; page 1 is.
    fn has_same_schema(
        &self,
        change: &Change,
        received: &Received,
        database: &File,
        page_1: &[u8],
    ) -> Result<bool> {
        let page_size = received.header.page_size;
        let Some(usable) = schema::usable(page_1) else { return Ok(false) };
        let Some(mut todo) = schema::links(Link::Tree(Pgno(1)), page_1, usable) else {
            return Ok(false);
        };
        let mut page = vec![0; PageSize::bytes(page_size)];
        let mut left = change.pages();
        while let Some(link) = todo.pop() {
            let pgno = link.pgno();
            let theirs = received.sums.binary_search_by_key(&pgno, |(pgno, _)| *pgno);
            let same = theirs.is_ok_and(|at| received.sums[at].1 == change.sums.get(pgno));
            if !same || left == 0 {
                return Ok(false);
            }
            left -= 1;
            os::read_zero_extended("read:remembered", database, &mut page, page_size.offset(pgno))
                .map_err(self.files.error("read database", FileKind::Database))?;
            let Some(links) = schema::links(link, &page, usable) else { return Ok(false) };
            todo.extend(links);
        }
        Ok(true)
    }

    /// Makes everything that anybody has open of the database useless. What the files hold stays, but
    /// for the wal-index, which must be made anew. Everybody is locked out.
    fn turn_out(&self, change: &mut Change, stale: &mut Stale) -> Result<()> {
        let shm = self.files.get(FileKind::Shm);
        self.files.remove(FileKind::Shm)?;
        if let Some(shm) = shm {
            shm.turn_out();
            stale.files.push(shm.ino);
            let unknown = os::write_at("turn-out:index", &shm.file, &IndexHeader::unknown(), 0);
            if let Err(error) = unknown {
                // They get no lock all the same, only after more attempts.
                tracing::warn!(db = %self.name, %error, "end the former wal-index");
            }
        }
        for kind in [FileKind::Database, FileKind::Journal, FileKind::Wal] {
            stale.files.extend(self.files.renew(kind));
        }
        self.forget_clients();
        change.counted = None;
        self.shared.names_changed(self.name.as_str());
        tracing::warn!(
            db = %self.name, pos = %change.pos,
            "connections that are open may remember a schema of transactions that are gone: they get errors \
             until the application opens the database again"
        );
        Ok(())
    }
}
