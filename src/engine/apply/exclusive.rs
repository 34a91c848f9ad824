//! Applying under the locks that SQLite would take: rollback-journal databases, snapshots,
//! deletions, and a change of the journal mode.
//!
//! PENDING is taken first, so that a stream of readers cannot starve us; what is queued is applied
//! together, and who was locked out meanwhile gets a turn before the next time, so that we cannot
//! starve readers. The LTX file is durable before the first page is written; a crash in between is
//! mended by recovery, which applies the chain. The kernel's cached pages are current before the
//! locks go.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ltx::{Checksum, Header, Pgno, Txid};

use super::follow::{Hold, keep_hold};
use super::{Body, Received, Turn};
use crate::engine::capture::Change;
use crate::engine::capture::journal::JournalState;
use crate::engine::chain::Replaced;
use crate::engine::checksum::PageSums;
use crate::engine::db::{Db, Guard};
use crate::engine::error::{Error, Result};
use crate::engine::files::FileKind;
use crate::engine::locks::{LockKind, Owner};
use crate::engine::lost_found;
use crate::engine::transaction::{Draft, PageRef, Transaction, WalSpan};
use crate::engine::unsynced;
use crate::sqlite::header::{DatabaseHeader, JournalMode};
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
    /// Names that went.
    pub(super) names: Vec<String>,
}

impl Db {
    /// Applies the first of `batch`, and what else can be applied soon, with everybody else locked
    /// out; how many. Waits for readers `limit` long for each step.
    pub(super) fn apply_exclusively(
        &self,
        turn: &mut Turn,
        batch: &[Arc<Received>],
        limit: Duration,
    ) -> Result<usize> {
        let woken = self.let_go(turn, &mut self.change.lock().unwrap());
        self.wake(woken);
        self.inbox.give_way();
        let mut locks = self.lock_out_everybody(limit)?;
        let mut change = self.change.lock().unwrap();
        let mut stale = Stale::default();
        let settled = self.settle_before(&mut change, &batch[0], &mut stale);
        let applied =
            settled.and_then(|()| self.apply_run(&mut locks, &mut change, batch, &mut stale));
        let hold = match &applied {
            // One that fails is tried again at once.
            Ok(_) => self.hold_blindly(turn, &mut change, &mut stale).unwrap_or(Hold::NotTaken),
            Err(_) => Hold::NotTaken,
        };
        // The kernel may have to finish a request of a worker that waits for the right to change.
        drop(change);
        self.drop_cached(stale);
        keep_hold(locks, hold);
        applied
    }

    /// Applies the first of `batch`, and those after it that go into a rollback-mode database too,
    /// for [`limits::EXCLUSIVE_HOLD`]. Those before one that fails are applied.
    fn apply_run(
        &self,
        locks: &mut Guard<'_>,
        change: &mut Change,
        batch: &[Arc<Received>],
        stale: &mut Stale,
    ) -> Result<usize> {
        let begin = Instant::now();
        let mut applied = 0;
        for received in batch {
            match self.apply_locked(locks, change, received, stale) {
                Ok(()) => {
                    applied += 1;
                    if received.header.is_snapshot() {
                        // Nothing is left of what was lost.
                        self.mend();
                    }
                }
                // It comes again as the first one, unless it is applied and found wrong.
                Err(_) if applied > 0 && change.pos != received.pos() => break,
                Err(error) => return Err(error),
            }
            if change.mode == JournalMode::Wal || begin.elapsed() > limits::EXCLUSIVE_HOLD {
                break;
            }
        }
        Ok(applied)
    }

    /// [`Db::lock_everything`] for the applier. A queue that grows meanwhile is no fault of its own.
    pub(super) fn lock_out_everybody(&self, limit: Duration) -> Result<Guard<'_>> {
        self.inbox.waits_for_readers.store(true, Ordering::SeqCst);
        let locks = self.lock_everything(limit);
        self.inbox.waits_for_readers.store(false, Ordering::SeqCst);
        locks
    }

    /// The files hold the position that the LTX file may follow on.
    fn settle_before(
        &self,
        change: &mut Change,
        received: &Received,
        stale: &mut Stale,
    ) -> Result<()> {
        if self.is_lost() {
            return Ok(());
        }
        self.settle_wal(change)?;
        // Of what comes with all pages nothing is left of before.
        if received.header.is_snapshot() { Ok(()) } else { self.roll_back(change, stale) }
    }

    /// Empties a WAL with frames that were set aside, as soon as nobody reads them.
    pub(super) fn discard_strays(&self, turn: &mut Turn, limit: Duration) -> Result<()> {
        let woken = self.let_go(turn, &mut self.change.lock().unwrap());
        self.wake(woken);
        let _locks = self.lock_everything(limit)?;
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
    /// fails half-way the locks stay with [`Owner::APPLY`], so that nobody sees that, until another
    /// attempt or a restart.
    pub(in crate::engine) fn apply_locked(
        &self,
        locks: &mut Guard<'_>,
        change: &mut Change,
        received: &Arc<Received>,
        stale: &mut Stale,
    ) -> Result<()> {
        self.check_outcome(change, received)?;
        if self.is_lost() {
            // Perhaps nothing could be opened, and can be now.
            self.files.find()?;
            self.chain.list_again()?;
        }
        // Before the LTX file is there, so that a WAL found beside it is never older than it.
        self.retire_wal(change, stale)?;
        let replaced = self.replaces(change, received)?;
        // An import or a restore on the primary sees to SQLite's counters itself.
        if received.header.is_snapshot() && !self.shared.is_writable() {
            self.forget_for(change, received, stale)?;
        }
        if replaced == Replaced::Keep && !self.shared.is_writable() {
            self.forget_backed()?;
        }
        self.store(change, received, replaced)?;
        if received.header.is_snapshot() {
            self.replaced(change.pos);
        }
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
        let known = if header.is_snapshot() { 0 } else { change.pages() };
        let grown = header.commit.saturating_sub(known) as usize;
        if grown.saturating_sub(received.sums.len()) > limits::UNSENT_PAGES_MAX {
            return Err(diverged("the transaction lacks pages by which the database grows"));
        }
        if received.foretell(change) != post {
            return Err(diverged("the transaction does not lead to its checksum"));
        }
        Ok(())
    }

    /// The database for the applier alone, waiting for readers to go, `limit` long for each step.
    ///
    /// A connection that has the WAL open holds SHARED for as long as it is open, also when it reads
    /// nothing: what tells of its reads are READ0 to READ4. So in WAL mode those are taken, and
    /// SHARED and DMS are only shared.
    pub(in crate::engine) fn lock_everything(&self, limit: Duration) -> Result<Guard<'_>> {
        loop {
            let mode = self.view().mode;
            let guard = self.lock_everything_in(mode, limit)?;
            if self.view().mode == mode {
                return Ok(guard);
            }
        }
    }

    fn lock_everything_in(&self, mode: JournalMode, limit: Duration) -> Result<Guard<'_>> {
        let dms = LockSet::one(Lock::Dms);
        let (shared, exclusive) = match mode {
            JournalMode::Rollback => (LockSet::EMPTY, [LockSet::DATABASE, LockSet::SHM]),
            JournalMode::Wal => {
                (dms.with(Lock::Shared), [LockSet::EMPTY, LockSet::SHM.without(dms)])
            }
        };
        let mut guard = self.guard(Owner::APPLY, LockSet::EMPTY);
        let mut take = |set, kind| -> Result<()> {
            self.take(Owner::APPLY, set, kind, limit)?;
            guard.add(set);
            Ok(())
        };
        take(LockSet::one(Lock::Pending), LockKind::Exclusive)?;
        take(shared, LockKind::Shared)?;
        for set in exclusive {
            take(set, LockKind::Exclusive)?;
        }
        self.inbox.set_left(false);
        Ok(guard)
    }

    /// What becomes of the chain in whose place the LTX file comes, if it is a snapshot.
    fn replaces(&self, change: &Change, received: &Received) -> Result<Replaced> {
        let Some(txid) = received.snapshot_of() else { return Ok(Replaced::Remove) };
        // A page size that a replica changed under a HALT lock; it is the next transaction.
        if self.is_lent() {
            return Ok(Replaced::Remove);
        }
        let keeps = (change.pos.txid >= txid && change.pos != received.pos())
            || self.is_lost()
            || self.is_contradicted()
            || (!change.pos.is_zero() && !self.shared.is_same_line())
            || self.chain.has_own(&self.shared.own_nodes)?;
        Ok(if keeps { Replaced::Keep } else { Replaced::Remove })
    }

    /// Puts the LTX file into the chain, durable.
    fn store(&self, change: &Change, received: &Arc<Received>, replaced: Replaced) -> Result<()> {
        let header = &received.header;
        let stored = self.chain.contains(header.max_txid);
        let path = match &received.body {
            // An earlier attempt got this far.
            Body::Memory(_) if stored && !header.is_snapshot() => return Ok(()),
            Body::Spool(path, ..) if stored && !path.exists() => return Ok(()),
            Body::Spool(path, file, _) => {
                os::sync("receive:spool", file).map_err(Error::io("sync ltx file", path))?;
                // An earlier attempt may have given it its name.
                let named = self.dir.ltx_file(header.min_txid, header.max_txid);
                if path.exists() { path.clone() } else { named }
            }
            Body::Memory(bytes) => self.chain.write_temporary(bytes)?,
        };
        if replaced == Replaced::Keep {
            tracing::warn!(
                db = %self.name, pos = %change.pos, snapshot = %received.pos(),
                "snapshot replaces transactions that the primary may not have: kept in lost+found"
            );
            if self.is_lost() {
                self.keep_files()?;
            } else if change.pages() > 0 && !self.chain.contains(Txid(1)) {
                // Its files begin somewhere in the middle: what they go on from is only here.
                self.keep_state(change)?;
            }
        }
        self.chain.adopt(path, header.min_txid, header.max_txid, replaced)
    }

    /// Copies SQLite's files, of which no LTX file says what they are, to `lost+found/`.
    pub(in crate::engine) fn keep_files(&self) -> Result<()> {
        for kind in [FileKind::Database, FileKind::Wal, FileKind::Journal] {
            let Some(backing) = self.files.get(kind) else { continue };
            let path = self.files.path(kind);
            let len = backing.file.metadata().map_err(Error::io("stat", &path))?.len();
            if len > 0 {
                lost_found::copy(&self.dir, &path)?;
            }
        }
        Ok(())
    }

    /// Writes the state as a snapshot to `lost+found/`. All of it is in the database file.
    fn keep_state(&self, change: &Change) -> Result<()> {
        let path = self.files.path(FileKind::Database);
        let (Some(page_size), Some(database)) =
            (change.page_size, self.files.get(FileKind::Database))
        else {
            return Ok(());
        };
        let pages = (1..=change.pages()).map(Pgno).filter(|pgno| *pgno != page_size.lock_pgno());
        let pages = pages.map(|pgno| PageRef {
            pgno,
            sum: change.sums.get(pgno),
            offset: page_size.offset(pgno),
        });
        let draft = Draft {
            page_size,
            commit: change.pages(),
            pages: pages.collect(),
            source: database.file.clone(),
            timestamp_ms: change.timestamp_ms,
            node_id: self.shared.node_id,
            wal: WalSpan::default(),
        };
        let ends = [Checksum::NONE, change.pos.checksum];
        let mut state = Transaction::new(change.pos.txid, ends, draft);
        state.make_snapshot();
        match self.chain.write_aside(&state) {
            Err(Error::Ltx { source: ltx::Error::Read(_), .. }) => {
                Ok(lost_found::copy(&self.dir, &path)?)
            }
            written => written.map(drop),
        }
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
            if change.mode == JournalMode::Rollback {
                change.counted = change.counted.max(Some(found.change_counter));
            }
            let found = found.journal_mode;
            // SQLite takes a WAL that is there for the journal mode, whatever page 1 says. So who has
            // it open goes on with it, until nobody has.
            let mode = match change.mode {
                JournalMode::Wal if self.has_clients() => JournalMode::Wal,
                _ => found,
            };
            match mode {
                JournalMode::Wal => {
                    // What is committed next stands in the WAL alone, on top of these pages.
                    self.sync_pages(header)?;
                    self.empty_wal(change, header.page_size, header.commit, stale)?;
                }
                JournalMode::Rollback => self.remove_wal_files(change, stale)?,
            }
            mode
        };
        if header.is_snapshot() && mode == JournalMode::Rollback {
            // The chain before it is gone: only the file and the snapshot are left.
            self.sync_pages(header)?;
        }
        if header.is_snapshot() || header.commit == 0 {
            change.sums = PageSums::default();
        }
        change.mode = mode;
        Ok(())
    }

    /// Makes the pages of an LTX file durable.
    fn sync_pages(&self, header: &Header) -> Result<()> {
        let Some(database) = self.files.get(FileKind::Database) else { return Ok(()) };
        unsynced::sync("apply:database", &database.file)
            .map_err(self.files.error("sync database", FileKind::Database))?;
        if header.is_snapshot() {
            unsynced::unmark(&database.file)
                .map_err(self.files.error("unmark database", FileKind::Database))?;
        }
        Ok(())
    }

    /// Makes a journal that a client left half-way count for nothing: its former pages must not be
    /// played back over new ones. It is cut and not removed, for others may have it open.
    fn void_journal(&self, change: &mut Change, stale: &mut Stale) -> Result<()> {
        if let Some(journal) = self.files.get(FileKind::Journal) {
            os::truncate("apply:journal", &journal.file, 0)
                .and_then(|()| os::sync("apply:journal", &journal.file))
                .map_err(self.files.error("cut journal", FileKind::Journal))?;
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
        os::truncate("apply:wal", &wal.file, 0)
            .and_then(|()| os::sync("apply:wal", &wal.file))
            .map_err(self.files.error("truncate wal", FileKind::Wal))
    }

    /// Writes the pages to the database file and drops what the kernel cached of them; what
    /// its header says now.
    fn write_database_pages(
        &self,
        received: &Received,
        stale: &mut Stale,
    ) -> Result<DatabaseHeader> {
        let header = &received.header;
        if self.files.get(FileKind::Database).is_none() {
            self.shared.names_changed(self.name.as_str());
        }
        let database = self.files.get_or_create(FileKind::Database)?;
        if header.is_snapshot() || stale.ranges.len() + received.sums.len() > RANGES_MAX {
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
                .map_err(self.files.error("write database", FileKind::Database))?;
        }
        let len = header.page_size.offset(Pgno(header.commit + 1));
        os::truncate("apply:database", &database.file, len)
            .map_err(self.files.error("truncate database", FileKind::Database))?;
        if received.sums.is_empty() {
            // Only shorter.
            stale.files.push(database.ino);
        }
        let found = self.read_header(&database.file)?;
        let (header, _) = found.ok_or_else(|| self.corrupt("write database", "it is empty"))?;
        Ok(header)
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
            for name in stale.names {
                cache.name_gone(&name);
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
        self.announce_applied(change, header.page_size);
        self.note_lag(header);
    }

    /// Notes how long a transaction took from its commit to here.
    pub(super) fn note_lag(&self, header: &Header) {
        let lag = self.shared.since(header.timestamp_ms).max(0);
        self.counters.lag_ms.store(lag as u64, Ordering::Relaxed);
    }
}
