//! Applying under the locks that SQLite would take: rollback-journal databases, snapshots,
//! deletions, a change of the journal mode, and WAL databases whose wal-index we cannot see.
//!
//! PENDING is taken first, so that a stream of readers cannot starve us. The LTX file is durable
//! before the first page is written; a crash in between is mended by recovery, which applies the
//! chain. The kernel's cached pages are current before the locks go.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ltx::{Header, Pgno};

use super::{Body, Received, Turn};
use crate::engine::capture::Change;
use crate::engine::capture::journal::JournalState;
use crate::engine::chain::Replaced;
use crate::engine::checksum::PageSums;
use crate::engine::db::{Db, Guard};
use crate::engine::error::{Error, Result};
use crate::engine::files::FileKind;
use crate::engine::locks::{LockKind, Owner};
use crate::sqlite::header::JournalMode;
use crate::sqlite::lock_byte::{Lock, LockSet};
use crate::{limits, os};

/// More ranges than this, and all cached pages of the file are dropped at once.
const RANGES_MAX: usize = 256;

/// What the kernel must no longer take for current.
#[derive(Debug, Default)]
pub(in crate::engine) struct Stale {
    /// Ranges of the database file that changed: inode number, offset and length in bytes.
    ranges: Vec<(u64, u64, u64)>,
    /// Files of which everything changed.
    pub(super) files: Vec<u64>,
}

impl Db {
    /// Applies one LTX file with everybody else locked out.
    pub(super) fn apply_exclusively(
        &self,
        turn: &mut Turn,
        received: &Arc<Received>,
    ) -> Result<()> {
        self.let_go(turn, &mut self.change.lock().unwrap());
        self.inbox.waits_for_readers.store(true, Ordering::SeqCst);
        let locks = self.lock_everything(Owner::APPLY, limits::LOCK_WAIT);
        self.inbox.waits_for_readers.store(false, Ordering::SeqCst);
        self.apply_alone(&mut locks?, received)
    }

    /// Applies one LTX file; all `locks` of the database are held.
    pub(in crate::engine) fn apply_alone(
        &self,
        locks: &mut Guard<'_>,
        received: &Arc<Received>,
    ) -> Result<()> {
        let mut change = self.change.lock().unwrap();
        if !self.is_lost() {
            self.settle_wal(&mut change)?;
        }
        let mut stale = Stale::default();
        let applied = self.apply_locked(locks, &mut change, received, &mut stale);
        // The kernel may have to finish a request of a worker that waits for the right to change.
        drop(change);
        self.drop_cached(stale);
        applied
    }

    /// Empties a WAL with frames that were set aside, as soon as nobody reads them.
    pub(super) fn discard_strays(&self, turn: &mut Turn, limit: Duration) -> Result<()> {
        self.let_go(turn, &mut self.change.lock().unwrap());
        let _locks = self.lock_everything(Owner::APPLY, limit)?;
        let mut change = self.change.lock().unwrap();
        self.settle_wal(&mut change)?;
        let mut stale = Stale::default();
        let discarded = self.retire_wal(&mut change, &mut stale);
        drop(change);
        self.drop_cached(stale);
        discarded
    }

    /// Applies one LTX file; the caller holds all `locks` of the database, gives up the right to
    /// change, and then drops what is `stale` in the kernel's caches, also after an error. If it
    /// fails half-way the locks stay with their owner, so that nobody sees that, until another
    /// attempt or a restart.
    pub(in crate::engine) fn apply_locked(
        &self,
        locks: &mut Guard<'_>,
        change: &mut Change,
        received: &Arc<Received>,
        stale: &mut Stale,
    ) -> Result<()> {
        self.check_outcome(change, received)?;
        // Before the LTX file is there, so that a WAL found beside it is never older than it.
        self.retire_wal(change, stale)?;
        self.store(change, received)?;
        self.write_pages(change, received, stale).inspect_err(|_| locks.leave())?;
        self.finish_apply(change, received);
        self.verify_if_strict(change)
    }

    /// The database would have the checksum that the file promises, and the file follows.
    pub(in crate::engine) fn check_outcome(
        &self,
        change: &Change,
        received: &Received,
    ) -> Result<()> {
        let (header, post) = (&received.header, received.trailer.post_apply);
        let continues = header.pre_pos() == change.pos;
        let inside = header.pre_pos().txid < change.pos.txid && change.pos.txid < header.max_txid;
        let diverged = |what| Error::Diverged { db: self.name.clone(), pos: change.pos, what };
        if !header.is_snapshot() {
            if !continues && !inside {
                return Err(diverged("the transaction does not follow on the position"));
            }
            if change.page_size.is_some_and(|size| size != header.page_size) {
                return Err(diverged("the transaction has another page size"));
            }
        }
        if received.foretell(change) != post {
            return Err(diverged("the transaction does not lead to its checksum"));
        }
        Ok(())
    }

    /// The database for `owner` alone, waiting for readers to go, `limit` long for each step. What it
    /// held before is not in the guard.
    ///
    /// A connection that has the WAL open holds SHARED for as long as it is open, also when it reads
    /// nothing: what tells of its reads are READ0 to READ4. So in WAL mode those are taken, and
    /// SHARED and DMS are only shared.
    pub(in crate::engine) fn lock_everything(
        &self,
        owner: Owner,
        limit: Duration,
    ) -> Result<Guard<'_>> {
        loop {
            let mode = self.view().mode;
            let guard = self.lock_everything_in(owner, mode, limit)?;
            if self.view().mode == mode {
                return Ok(guard);
            }
        }
    }

    fn lock_everything_in(
        &self,
        owner: Owner,
        mode: JournalMode,
        limit: Duration,
    ) -> Result<Guard<'_>> {
        let dms = LockSet::one(Lock::Dms);
        let (shared, exclusive) = match mode {
            JournalMode::Rollback => (LockSet::EMPTY, [LockSet::DATABASE, LockSet::SHM]),
            JournalMode::Wal => {
                (dms.with(Lock::Shared), [LockSet::EMPTY, LockSet::SHM.without(dms)])
            }
        };
        let held = self.held_by(owner);
        let mut guard = self.guard(owner, LockSet::EMPTY);
        let mut take = |set: LockSet, kind| -> Result<()> {
            self.take(owner, set, kind, limit)?;
            guard.add(set.without(held));
            Ok(())
        };
        take(LockSet::one(Lock::Pending), LockKind::Exclusive)?;
        take(shared, LockKind::Shared)?;
        for set in exclusive {
            take(set, LockKind::Exclusive)?;
        }
        Ok(guard)
    }

    /// Puts the LTX file into the chain, durable.
    fn store(&self, change: &Change, received: &Arc<Received>) -> Result<()> {
        let header = &received.header;
        let stored = self.chain.contains(header.max_txid);
        let path = match &received.body {
            // An earlier attempt got this far.
            Body::Memory(_) if stored && !header.is_snapshot() => return Ok(()),
            Body::Spool(path, ..) if stored && !path.exists() => return Ok(()),
            Body::Spool(path, file, _) => {
                os::sync("receive:spool", file).map_err(Error::io("sync ltx file", path))?;
                path.clone()
            }
            Body::Memory(bytes) => self.chain.write_temporary(bytes)?,
        };
        let replaced = match received.snapshot_of() {
            // A page size that a replica changed under a HALT lock; it is the next transaction.
            Some(_) if self.shared.is_writable() && header.node_id != self.shared.node_id => {
                Replaced::Remove
            }
            Some(txid)
                if change.pos.txid >= txid
                    || self.is_lost()
                    || self.chain.has_own(&self.shared.own_nodes)? =>
            {
                tracing::warn!(
                    db = %self.name, pos = %change.pos, snapshot = %received.pos(),
                    "snapshot replaces transactions that the primary may not have: kept in lost+found"
                );
                Replaced::Keep
            }
            _ => Replaced::Remove,
        };
        self.chain.adopt(path, header.min_txid, header.max_txid, replaced)
    }

    fn write_pages(
        &self,
        change: &mut Change,
        received: &Received,
        stale: &mut Stale,
    ) -> Result<()> {
        let header = &received.header;
        self.void_journal(change, stale)?;
        if self.is_lost() {
            self.void_wal()?;
        }
        let mode = if header.commit == 0 {
            self.remove_files()?;
            // Who still has the files open goes on with them alone.
            self.forget_clients();
            change.wal.clear();
            self.shared.names_changed(self.name.as_str());
            JournalMode::Rollback
        } else {
            let found = self.write_database_pages(received, stale)?;
            // SQLite takes a WAL that is there for the journal mode, whatever page 1 says. So who has
            // it open goes on with it, until nobody has.
            let mode = match change.mode {
                JournalMode::Wal if self.has_clients() => JournalMode::Wal,
                _ => found,
            };
            match mode {
                JournalMode::Wal => {
                    self.empty_wal(change, header.page_size, header.commit, stale)?;
                }
                JournalMode::Rollback => self.remove_wal_files(change)?,
            }
            mode
        };
        if header.is_snapshot() || header.commit == 0 {
            change.sums = PageSums::default();
        }
        change.mode = mode;
        Ok(())
    }

    /// Makes a journal that a client left half-way count for nothing: its former pages must not be
    /// played back over new ones. It is cut and not removed, for others may have it open.
    fn void_journal(&self, change: &mut Change, stale: &mut Stale) -> Result<()> {
        if !change.journal.dirty.is_empty() && !self.is_lost() {
            self.undo_journal(change, stale)?;
        }
        if let Some(journal) = self.files.get(FileKind::Journal) {
            let path = self.files.path(FileKind::Journal);
            os::truncate("apply:journal", &journal.file, 0)
                .and_then(|()| os::sync("apply:journal", &journal.file))
                .map_err(Error::io("cut journal", &path))?;
            stale.files.push(journal.ino);
            stale.files.extend(self.files.get(FileKind::Database).map(|database| database.ino));
        }
        change.journal = JournalState::default();
        Ok(())
    }

    /// Makes the WAL of a lost database count for nothing, for good, before a snapshot is written:
    /// after a crash half-way its frames would look newer than the snapshot.
    fn void_wal(&self) -> Result<()> {
        let Some(wal) = self.files.get(FileKind::Wal) else { return Ok(()) };
        let path = self.files.path(FileKind::Wal);
        os::truncate("apply:wal", &wal.file, 0)
            .and_then(|()| os::sync("apply:wal", &wal.file))
            .map_err(Error::io("truncate wal", &path))
    }

    /// Writes the pages to the database file and drops what the kernel cached of them; the journal
    /// mode that the file says now.
    fn write_database_pages(&self, received: &Received, stale: &mut Stale) -> Result<JournalMode> {
        let header = &received.header;
        if self.files.get(FileKind::Database).is_none() {
            self.shared.names_changed(self.name.as_str());
        }
        let database = self.files.get_or_create(FileKind::Database)?;
        let path = self.files.path(FileKind::Database);
        if header.is_snapshot() || received.sums.len() > RANGES_MAX {
            stale.files.push(database.ino);
        }
        let mut decoder =
            received.open().map_err(|e| self.ltx_error("read received ltx file", e))?;
        let mut page = vec![0; header.page_size.bytes()];
        loop {
            let next = decoder.next_page(&mut page);
            let Some(pgno) = next.map_err(|e| self.ltx_error("read received ltx file", e))? else {
                break;
            };
            let offset = header.page_size.offset(pgno);
            if stale.files.is_empty() {
                stale.ranges.push((database.ino, offset, page.len() as u64));
            }
            os::write_at("apply:database", &database.file, &page, offset)
                .map_err(Error::io("write database", &path))?;
        }
        let len = header.page_size.offset(Pgno(header.commit + 1));
        os::truncate("apply:database", &database.file, len)
            .map_err(Error::io("truncate database", &path))?;
        if header.is_snapshot() {
            // The chain before it is gone: only the file and the snapshot are left.
            os::sync("apply:database", &database.file)
                .map_err(Error::io("sync database", &path))?;
        }
        if received.sums.is_empty() {
            // Only shorter.
            stale.files.push(database.ino);
        }
        let found = self.read_header(&database.file)?;
        Ok(found.map_or(JournalMode::Rollback, |(header, _)| header.journal_mode))
    }

    /// Makes the kernel's caches current. Not with the right to change in hand.
    pub(in crate::engine) fn drop_cached(&self, stale: Stale) {
        if let Some(cache) = self.shared.page_cache() {
            for (ino, offset, len) in stale.ranges {
                cache.pages_changed(ino, offset, len);
            }
            for ino in stale.files {
                cache.file_changed(ino);
            }
        }
        self.inbox.rewriting_index.store(false, Ordering::SeqCst);
    }

    fn finish_apply(&self, change: &mut Change, received: &Received) {
        let header = &received.header;
        for (pgno, sum) in &received.sums {
            change.sums.set(*pgno, *sum);
        }
        change.sums.truncate(header.commit);
        change.page_size = (header.commit > 0).then_some(header.page_size);
        change.pos = received.pos();
        change.timestamp_ms = header.timestamp_ms;
        self.announce_applied(change, header);
        self.note_lag(header);
    }

    /// Notes how long a transaction took from its commit to here.
    pub(super) fn note_lag(&self, header: &Header) {
        let lag = (self.shared.clock)().saturating_sub(header.timestamp_ms).max(0);
        self.counters.lag_ms.store(lag as u64, Ordering::Relaxed);
    }
}
