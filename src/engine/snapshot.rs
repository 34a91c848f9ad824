//! The whole database, out (as an LTX snapshot or as SQLite's own file) and in (import).
//!
//! Out: what is read must not change meanwhile, and nobody waits longer than the disk takes. In WAL
//! mode CKPT and READ1 are held, so that no frame is moved or overwritten while readers and writers
//! go on; in rollback mode SHARED is held, which lets readers go on.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ltx::{Checksum, Encoder, Header, PageSize, Pgno, Pos, Txid};

use super::apply::{Received, Stale, random_u32};
use super::capture::Change;
use super::capture::resync::{WalMap, read_page};
use super::db::{Db, DbState, Guard, View};
use super::error::{Error, Result};
use super::files::FileKind;
use super::locks::{LockKind, Owner};
use crate::sqlite::header::{self, DatabaseHeader, HEADER_SIZE, JournalMode};
use crate::sqlite::lock_byte::{Lock, LockSet};
use crate::{limits, os};

/// A WAL that stays as it is, with the place of each page in it; none if it is empty.
type FrozenWal = Option<(Arc<File>, WalMap)>;

/// One state of a database that does not change while this lives.
struct Frozen<'a> {
    view: View,
    page_size: PageSize,
    database: Arc<File>,
    wal: FrozenWal,
    _locks: Guard<'a>,
}

impl Frozen<'_> {
    /// Calls `each` with every page but the lock page, ascending.
    fn pages(&self, mut each: impl FnMut(Pgno, &[u8]) -> Result<()>, path: &Path) -> Result<()> {
        let lock = self.page_size.lock_pgno();
        let mut page = vec![0; self.page_size.bytes()];
        for pgno in (1..=self.view.pages).map(Pgno) {
            if pgno == lock {
                continue;
            }
            self.read(pgno, &mut page).map_err(Error::io("read database", path))?;
            each(pgno, &page)?;
        }
        Ok(())
    }

    fn read(&self, pgno: Pgno, page: &mut [u8]) -> io::Result<()> {
        match &self.wal {
            Some((wal, map)) => read_page(map, wal, &self.database, self.page_size, pgno, page),
            None => {
                let offset = self.page_size.offset(pgno);
                os::read_zero_extended("read:snapshot", &self.database, page, offset)
            }
        }
    }
}

impl Db {
    /// Writes the database as one LTX file from transaction 1 to its present one; its position.
    /// A database that was dropped is a file without pages.
    pub fn snapshot(&self, out: &mut dyn Write) -> Result<Pos> {
        self.write_whole(Pos::ZERO, out)
    }

    /// Writes the database as one LTX file that follows on `base`, which must be before its present
    /// position, and does not need anything of it.
    pub(super) fn write_whole(&self, base: Pos, out: &mut dyn Write) -> Result<Pos> {
        let Some(frozen) = self.freeze()? else { return self.empty_snapshot(base, out) };
        let ltx = |source| self.ltx_error("write snapshot", source);
        let header = Header {
            page_size: frozen.page_size,
            commit: frozen.view.pages,
            ..self.whole_header(base, frozen.view.pos)
        };
        let mut encoder = Encoder::new(out, header).map_err(ltx)?;
        let mut sum = Checksum::EMPTY;
        let path = self.files.path(FileKind::Database);
        frozen.pages(
            |pgno, page| {
                sum = sum.toggle(encoder.page(pgno, page).map_err(ltx)?);
                Ok(())
            },
            &path,
        )?;
        if sum != frozen.view.pos.checksum {
            let text =
                format!("its pages have checksum {sum}, its position is {}", frozen.view.pos);
            return Err(self.corrupt("write snapshot", &text));
        }
        encoder.finish(sum).map_err(ltx)?;
        Ok(frozen.view.pos)
    }

    /// Writes the database as SQLite's own file, what the WAL holds included; its position.
    pub fn export(&self, out: &mut dyn Write) -> Result<Pos> {
        let path = self.files.path(FileKind::Database);
        let Some(frozen) = self.freeze()? else {
            return Err(Error::UnknownDatabase(self.name.to_string()));
        };
        let lock = frozen.page_size.lock_pgno();
        let mut write = |page: &[u8]| out.write_all(page).map_err(Error::io("write export", &path));
        let zeros = vec![0; frozen.page_size.bytes()];
        let mut sum = Checksum::EMPTY;
        frozen.pages(
            |pgno, page| {
                if pgno.0 == lock.0 + 1 {
                    write(&zeros)?;
                }
                sum = sum.toggle(ltx::page_checksum(pgno, page));
                write(page)
            },
            &path,
        )?;
        if frozen.view.pages == lock.0 {
            write(&zeros)?;
        }
        if sum != frozen.view.pos.checksum {
            let text =
                format!("its pages have checksum {sum}, its position is {}", frozen.view.pos);
            return Err(self.corrupt("export", &text));
        }
        Ok(frozen.view.pos)
    }

    /// Replaces the content by that of the SQLite file at `source`, which is healthy: one
    /// transaction with all of its pages. Open connections see it at their next transaction.
    ///
    /// Errors: this node is not the primary; the file is not a database; readers do not finish.
    pub fn import(&self, source: &Path) -> Result<Pos> {
        let file = File::open(source).map_err(Error::io("open import", source))?;
        let make = |change: &Change| {
            let spool = self.dir.ltx().join("import.ltx.tmp");
            os::remove_if_present("import:spool", &spool).map_err(Error::io("remove", &spool))?;
            self.encode_import(change, &file, source, spool)
        };
        self.replace(make, |_| Ok(None))
    }

    /// Replaces the content by that of a snapshot of the backup, if the database stands at `expected`; the
    /// position of the snapshot.
    /// Another transaction lets SQLite's counters go on from those of the former content, for the
    /// connections that are open.
    pub(super) fn restore(&self, received: Received, expected: Pos) -> Result<Pos> {
        if !received.header.is_snapshot() {
            return Err(self.corrupt("restore backup", "what the backup sends is no snapshot"));
        }
        let (counters, at) = (Cell::new(None), received.pos());
        let make = |change: &Change| {
            let (have, need) = (change.pos, expected);
            if have != need {
                return Err(Error::PositionMismatch { db: self.name.clone(), have, need });
            }
            if !have.is_zero() {
                counters.set(Some(self.next_counters(change)?));
            }
            Ok(received)
        };
        self.replace(make, |change| match counters.get() {
            Some(former) if change.pages() > 0 => self.encode_counters(change, former).map(Some),
            _ => Ok(None),
        })
        .map(|_| at)
    }

    /// A transaction that moves the counters of page 1 past what they are and `former`. All of the
    /// database is in its file.
    fn encode_counters(&self, change: &Change, former: (u32, u32)) -> Result<Received> {
        let ltx = |source| self.ltx_error("encode counters", source);
        let (Some(page_size), Some(database)) =
            (change.page_size, self.files.get(FileKind::Database))
        else {
            return Err(self.corrupt("restore backup", "the database has no file"));
        };
        let mut page = vec![0; page_size.bytes()];
        os::read_up_to("read:restore", &database.file, &mut page, 0)
            .map_err(self.files.error("read page 1", FileKind::Database))?;
        let found = DatabaseHeader::parse(&page)
            .map_err(|error| self.corrupt("read page 1", &error.to_string()))?;
        let past = |former: u32, found: u32| former.max(found.wrapping_add(1));
        let counter = past(former.0, found.change_counter);
        let cookie = past(former.1, found.schema_cookie);
        // Only a stale one is replaced: a log may count more pages than SQLite uses.
        let pages = found.page_count().unwrap_or(change.pages());
        header::set_counters(&mut page, counter, cookie, pages);
        let txid = change.pos.txid.next();
        let header = Header {
            page_size,
            commit: change.pages(),
            min_txid: txid,
            max_txid: txid,
            pre_apply: change.pos.checksum,
            ..self.snapshot_header(change.pos)
        };
        let mut encoder = Encoder::new(Vec::new(), header).map_err(ltx)?;
        let sum = encoder.page(Pgno(1), &page).map_err(ltx)?;
        let post = change.pos.checksum.toggle(change.sums.get(Pgno(1))).toggle(sum);
        let (bytes, trailer) = encoder.finish(post).map_err(ltx)?;
        Ok(Received::made(header, trailer, vec![(Pgno(1), sum)], bytes))
    }

    /// Applies what `make` makes, and then what `after` makes, with everybody locked out.
    fn replace(
        &self,
        make: impl FnOnce(&Change) -> Result<Received>,
        after: impl FnOnce(&Change) -> Result<Option<Received>>,
    ) -> Result<Pos> {
        self.refuse_import()?;
        let _turn = self.turn();
        if self.inbox.has_queue() {
            return Err(self.busy("what it received as a replica is not applied yet"));
        }
        let mut locks = self.lock_everything(limits::LOCK_WAIT)?;
        // Asked again under the locks, for which a change of the role waits.
        self.refuse_import()?;
        let mut change = self.change.lock().unwrap();
        if !self.is_lost() {
            match self.settle_wal(&mut change) {
                // What no other try captures either is in nobody's way, but kept. Connections may have seen
                // counters in it that we have not: those of the import are made as for a lost database.
                Err(error @ Error::Corrupt { .. }) => {
                    self.keep_files()?;
                    self.fail_for_good(&error);
                }
                settled => settled?,
            }
        }
        let received = make(&change)?;
        if !self.shared.may_commit() {
            return Err(Error::NotPrimary);
        }
        let mut stale = Stale::default();
        let received = Arc::new(received);
        let mut apply = |change: &mut Change, received: &Arc<Received>| {
            self.apply_locked(&mut locks, change, received, &mut stale)
        };
        let applied = apply(&mut change, &received).and_then(|()| match after(&change)? {
            Some(next) => apply(&mut change, &Arc::new(next)),
            None => Ok(()),
        });
        if let (Err(error), true) = (&applied, locks.is_left()) {
            // Everybody stays locked out; the chain has it, so a restart brings it to its end.
            self.fail_for_good(error);
        }
        let pos = change.pos;
        drop(received); // With its temporary file, whose name the next import uses.
        drop(change);
        self.drop_cached(stale);
        applied?;
        self.set_needs_snapshot(false);
        self.mend();
        match self.refuse_late_commit() {
            Ok(()) => Ok(pos),
            Err(_) => Err(Error::NotPrimary),
        }
    }

    fn refuse_import(&self) -> Result<()> {
        if self.is_lent() {
            return Err(self.busy("another node has its halt lock"));
        }
        if self.shared.may_begin() { Ok(()) } else { Err(Error::NotPrimary) }
    }

    /// The LTX file of an import. The counters of page 1 by which SQLite notices a change go on from
    /// those of the former content, so that no connection takes the pages or the schema that it
    /// remembers for current. Connections that have a WAL open stay in that mode, so page 1 must say it
    /// too.
    fn encode_import(
        &self,
        change: &Change,
        file: &File,
        source: &Path,
        spool: PathBuf,
    ) -> Result<Received> {
        let ltx = |source| self.ltx_error("encode import", source);
        let Some((found, len)) = self.read_header(file)? else {
            return Err(self.corrupt("import", "the file is empty"));
        };
        let commit = found.page_count_or_len(len).unwrap_or(0);
        let resized = change.page_size.is_some_and(|old| old != found.page_size);
        let txid = change.pos.txid.next();
        let header = Header {
            page_size: found.page_size,
            commit,
            min_txid: if resized { Txid(1) } else { txid },
            pre_apply: if resized { Checksum::NONE } else { change.pos.checksum },
            max_txid: txid,
            ..self.snapshot_header(change.pos)
        };
        let out = os::create_new("import:spool", &spool).map_err(Error::io("create", &spool))?;
        let writer =
            BufWriter::with_capacity(limits::IO_BUFFER, os::Labelled::new("import:spool", &out));
        let mut encoder = Encoder::new(writer, header).map_err(ltx)?;
        let mut post = Checksum::EMPTY;
        let mut sums = Vec::new();
        let mut page = vec![0; found.page_size.bytes()];
        let (counter, cookie) = self.next_counters(change)?;
        for pgno in (1..=commit).map(Pgno).filter(|pgno| *pgno != found.page_size.lock_pgno()) {
            let filled =
                os::read_up_to("read:import", file, &mut page, found.page_size.offset(pgno))
                    .map_err(Error::io("read import", source))?;
            if filled < page.len() {
                return Err(self.corrupt("import", "the file is shorter than its header says"));
            }
            if pgno == Pgno(1) {
                header::set_counters(&mut page, counter, cookie, commit);
                if change.mode == JournalMode::Wal && self.has_clients() {
                    header::set_wal(&mut page);
                }
            }
            let sum = encoder.page(pgno, &page).map_err(ltx)?;
            post = post.toggle(sum);
            sums.push((pgno, sum));
        }
        let (mut writer, trailer) = encoder.finish(post).map_err(ltx)?;
        writer.flush().map_err(Error::io("write import", &spool))?;
        drop(writer);
        let len = out.metadata().map_err(Error::io("stat", &spool))?.len();
        Ok(Received::spooled(header, trailer, sums, spool, out, len))
    }

    /// A change counter and a schema cookie that the database had never before: SQLite only counts
    /// them up. By chance where nothing tells of the former ones.
    fn next_counters(&self, change: &Change) -> Result<(u32, u32)> {
        if self.is_lost() || change.page_size.is_none() {
            return Ok((random_u32(), random_u32()));
        }
        let Some(header) = self.first_page(change.wal.frame())? else {
            return Ok((random_u32(), random_u32()));
        };
        Ok((header.change_counter.wrapping_add(1), header.schema_cookie.wrapping_add(1)))
    }

    /// The header of page 1, as it is with the WAL up to `frame`; none without a database file.
    pub(super) fn first_page(&self, frame: u32) -> Result<Option<DatabaseHeader>> {
        let Some(database) = self.files.get(FileKind::Database) else { return Ok(None) };
        let mut page = [0; HEADER_SIZE];
        let wal = self.files.get(FileKind::Wal).filter(|_| frame > 0);
        let map = wal.as_ref().map(|wal| self.wal_map(&wal.file, Some(frame)));
        let in_wal = map.transpose()?.flatten().and_then(|map| map.pages.get(&Pgno(1)).copied());
        let (kind, file, at) = match (&wal, in_wal) {
            (Some(wal), Some(at)) => (FileKind::Wal, wal, at),
            _ => (FileKind::Database, &database, 0),
        };
        os::read_up_to("read:snapshot", &file.file, &mut page, at)
            .map_err(self.files.error("read page 1", kind))?;
        DatabaseHeader::parse(&page)
            .map(Some)
            .map_err(|error| self.corrupt("read page 1", &error.to_string()))
    }

    /// The header of a snapshot of a database at `pos`, but for its size.
    fn snapshot_header(&self, pos: Pos) -> Header {
        Header {
            compression: self.shared.compression,
            page_size: PageSize::MIN,
            commit: 0,
            min_txid: Txid(1),
            max_txid: pos.txid,
            timestamp_ms: (self.shared.clock)(),
            pre_apply: Checksum::NONE,
            wal_offset: 0,
            wal_size: 0,
            wal_salt1: 0,
            wal_salt2: 0,
            node_id: self.shared.node_id,
        }
    }

    /// The header of a file of the whole database at `pos` that follows on `base`, but for its size.
    fn whole_header(&self, base: Pos, pos: Pos) -> Header {
        Header { min_txid: base.txid.next(), pre_apply: base.checksum, ..self.snapshot_header(pos) }
    }

    fn empty_snapshot(&self, base: Pos, out: &mut dyn Write) -> Result<Pos> {
        let ltx = |source| self.ltx_error("write snapshot", source);
        let pos = self.pos();
        if pos.is_zero() {
            return Err(Error::UnknownDatabase(self.name.to_string()));
        }
        let encoder = Encoder::new(out, self.whole_header(base, pos)).map_err(ltx)?;
        encoder.finish(Checksum::EMPTY).map_err(ltx)?;
        Ok(pos)
    }

    /// The database as it is now, kept so by locks; none if there is nothing in it.
    fn freeze(&self) -> Result<Option<Frozen<'_>>> {
        if let DbState::Failed(reason) = self.state() {
            return Err(Error::Failed { db: self.name.clone(), reason });
        }
        let frozen = self.freeze_now()?;
        // Under SHARED nobody writes to the file, so a journal without a writer is a hot one.
        if frozen.as_ref().is_none_or(|frozen| frozen.wal.is_some()) || !self.has_hot_journal() {
            return Ok(frozen);
        }
        drop(frozen);
        self.settle_journal(&mut self.turn(), limits::LOCK_WAIT)?;
        self.freeze_now()
    }

    fn freeze_now(&self) -> Result<Option<Frozen<'_>>> {
        self.hold(LockSet::one(Lock::Pending), LockKind::Shared)?;
        let shared = self.hold(LockSet::one(Lock::Shared), LockKind::Shared);
        self.release(Owner::READ, LockSet::one(Lock::Pending));
        shared?;
        let mut guard = self.guard(Owner::READ, LockSet::one(Lock::Shared));
        let view = self.view();
        let Some(page_size) = view.page_size.filter(|_| view.pages > 0) else { return Ok(None) };
        let Some(database) = self.files.get(FileKind::Database) else { return Ok(None) };
        let database = database.file.clone();
        if view.mode == JournalMode::Rollback {
            let view = self.view();
            return Ok(Some(Frozen { view, page_size, database, wal: None, _locks: guard }));
        }
        let (view, wal) = self.freeze_wal(&mut guard)?;
        Ok(Some(Frozen { view, page_size, database, wal, _locks: guard }))
    }

    /// Holds the WAL still: nobody moves or overwrites frames under CKPT and READ1. WRITE is held
    /// only while the position and the frames that belong to it are noted.
    fn freeze_wal(&self, guard: &mut Guard<'_>) -> Result<(View, FrozenWal)> {
        if self.is_followed() {
            // The one writer is our own applier, which moves nothing while it is pinned.
            guard.pin();
            let (view, frame) = self.note_position()?;
            return Ok((view, self.frozen_wal(frame)?));
        }
        let still = LockSet::one(Lock::Ckpt);
        self.hold(still, LockKind::Exclusive)?;
        guard.add(still);
        let mark = LockSet::one(Lock::Read1);
        self.hold(mark, LockKind::Shared)?;
        guard.add(mark);
        let write = LockSet::one(Lock::Write);
        self.hold(write, LockKind::Exclusive)?;
        let noted = self.note_position();
        self.release(Owner::READ, write);
        let (view, frame) = noted?;
        Ok((view, self.frozen_wal(frame)?))
    }

    /// The position, and the last frame of the WAL that belongs to it.
    fn note_position(&self) -> Result<(View, u32)> {
        let mut change = self.change.lock().unwrap();
        self.capture_finished(&mut change)?;
        Ok((change.view(), change.wal.frame()))
    }

    /// The WAL up to `frame`, which nobody moves or overwrites now.
    fn frozen_wal(&self, frame: u32) -> Result<FrozenWal> {
        let Some(wal) = self.files.get(FileKind::Wal).filter(|_| frame > 0) else {
            return Ok(None);
        };
        let map = self.wal_map(&wal.file, Some(frame))?;
        Ok(map.map(|map| (wal.file.clone(), map)))
    }

    fn hold(&self, set: LockSet, kind: LockKind) -> Result<()> {
        self.take(Owner::READ, set, kind, limits::LOCK_WAIT)
    }
}
