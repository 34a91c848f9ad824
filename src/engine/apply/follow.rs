//! A replica's hold on a WAL database: it is the one writer, and no client ever resets the wal-index.
//!
//! While a node follows, the applier holds SHARED on the database file, WRITE, CKPT, and DMS shared.
//! So a client can read and nothing else: it cannot write, checkpoint, or remove the WAL when it
//! closes. Transactions are appended in batches and published at once; the WAL is checkpointed when
//! it has grown, as far as readers allow, and starts over when nobody reads from it.
//!
//! Without passthrough the pages that clients have mapped belong to the mount. They are dropped after
//! each write, and clients write nothing into the wal-index: it is made anew with everybody locked
//! out, READ1 to READ4 are granted to nobody exclusively, and what the kernel writes back is ignored.
//!
//! The hold belongs to whoever has the turn ([`Turn`]). A checkpoint drops pages from the kernel's
//! cache, which can take as long as a read that a FUSE worker serves: it is made with the turn alone,
//! for which no worker waits.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use ltx::{PageSize, Pgno};

use super::exclusive::Stale;
use super::wal::{CheckpointLocks, ReaderCache, Restart, WalFiles, WalWriter};
use super::{Received, Turn, random_u32};
use crate::engine::capture::Change;
use crate::engine::db::{Db, Guard, View, Waiter};
use crate::engine::error::{Error, Result, chain_text};
use crate::engine::files::{Backing, FileKind};
use crate::engine::locks::{LockKind, Owner, Woken};
use crate::engine::shared::PageCache;
use crate::engine::transaction::{Draft, PageRef, Transaction, WalSpan};
use crate::sqlite::header::JournalMode;
use crate::sqlite::lock_byte::{Lock, LockSet};
use crate::sqlite::wal::{FRAME_HEADER_SIZE, frame_offset};
use crate::{limits, os};

/// Held shared while following.
const SHARED: LockSet = LockSet::one(Lock::Shared).with(Lock::Dms);
/// Held exclusively while following.
const EXCLUSIVE: LockSet = LockSet::one(Lock::Write).with(Lock::Ckpt);

/// The replica's hold on a WAL database.
pub struct Follower {
    writer: WalWriter,
    files: FollowedFiles,
}

/// The files of a followed database.
struct FollowedFiles {
    database: Arc<Backing>,
    wal: Arc<Backing>,
    shm: Arc<Backing>,
}

/// Whether the applier keeps its locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hold {
    Taken,
    NotTaken,
}

/// Releases the locks but those that a hold needs.
pub(super) fn keep_hold(guard: Guard<'_>, hold: Hold) {
    match hold {
        Hold::Taken => guard.keep(SHARED.union(EXCLUSIVE)),
        Hold::NotTaken => drop(guard),
    }
}

/// [`WalWriter::open_or_create`] or [`WalWriter::take_over`].
type OpenWriter = fn(WalFiles, PageSize, u32, fn() -> u32) -> Result<WalWriter, super::wal::Error>;

impl Db {
    /// Whether the WAL has transactions that came too late, which nobody must go on from.
    fn has_strays(&self) -> bool {
        self.has_strays.load(Ordering::SeqCst) && !self.is_lost()
    }

    /// Whether this node is the one writer of the database's WAL.
    pub(in crate::engine) fn is_followed(&self) -> bool {
        self.inbox.followed.load(Ordering::SeqCst)
    }

    /// The turn of who applies, imports, takes hold or lets go. Taken before the right to change.
    pub(in crate::engine) fn turn(&self) -> MutexGuard<'_, Turn> {
        self.inbox.turn.lock().unwrap()
    }

    /// Holds the WAL as long as this node may not write it itself, and keeps it short; lets it go when
    /// the node may, and all that was received is applied. Waits for locks `limit` long at most.
    pub(in crate::engine) fn settle_hold(&self, turn: &mut Turn, limit: Duration) -> Result<()> {
        if self.has_strays() {
            self.discard_strays(turn, limit)?;
        }
        if self.may_write() {
            if !self.is_behind() {
                let woken = self.let_go(turn, &mut self.change.lock().unwrap());
                self.wake(woken);
                // What a primary has is right, unless it is nothing.
                self.set_needs_snapshot(self.is_lost());
                self.forget_contradicted();
            }
            return Ok(());
        }
        if self.has_hot_journal() && !self.needs_snapshot() {
            self.settle_journal(turn, limit)?;
        }
        self.follow(turn, limit)?;
        if self.has_strays() {
            self.discard_strays(turn, limit)?;
            self.follow(turn, limit)?;
        }
        self.keep_wal_short(turn)
    }

    /// Whether the WAL is the clients' to write, with nothing to be applied before.
    fn is_clients(&self) -> bool {
        self.may_write() && (self.shared.is_writable() || !self.is_behind())
    }

    /// Takes hold of a WAL database that this node may not write itself, or not yet; nothing to do for
    /// others.
    pub(super) fn follow(&self, turn: &mut Turn, limit: Duration) -> Result<()> {
        let view = self.view();
        let (Some(page_size), JournalMode::Wal) = (view.page_size, view.mode) else {
            return Ok(());
        };
        // Of a lost database the applier holds the locks already, so that nobody sees it.
        let unwanted = self.is_clients() || self.is_lost() || self.shared.page_cache().is_none();
        if unwanted || self.is_followed() {
            return Ok(());
        }
        if !self.shared.is_passthrough() {
            return self.follow_blindly(turn, limit);
        }
        self.take(Owner::APPLY, SHARED, LockKind::Shared, limit)?;
        let mut guard = self.guard(Owner::APPLY, SHARED);
        self.take(Owner::APPLY, EXCLUSIVE, LockKind::Exclusive, limit)?;
        guard.add(EXCLUSIVE);
        let mut change = self.change.lock().unwrap();
        self.capture_finished(&mut change)?;
        let open = WalWriter::open_or_create;
        let hold = self.begin_following(turn, &mut change, page_size, open)?;
        // Who gets a lock now may want the right to change.
        drop(change);
        keep_hold(guard, hold);
        Ok(())
    }

    /// Takes hold of a database whose wal-index is out of sight, with everybody locked out.
    fn follow_blindly(&self, turn: &mut Turn, limit: Duration) -> Result<()> {
        let guard = self.lock_out_everybody(limit)?;
        let mut change = self.change.lock().unwrap();
        self.settle_wal(&mut change)?;
        let mut stale = Stale::default();
        let hold = self.hold_blindly(turn, &mut change, &mut stale);
        // The kernel may have to finish a request of a worker that waits for the right to change.
        drop(change);
        self.drop_cached(stale);
        hold.map(|hold| keep_hold(guard, hold))
    }

    /// Takes hold, if it can be, of a database whose wal-index is out of sight; the caller has locked
    /// everybody out and drops what is `stale`, also after an error.
    pub(super) fn hold_blindly(
        &self,
        turn: &mut Turn,
        change: &mut Change,
        stale: &mut Stale,
    ) -> Result<Hold> {
        let Some(page_size) = change.page_size.filter(|_| change.mode == JournalMode::Wal) else {
            return Ok(Hold::NotTaken);
        };
        if self.shared.is_passthrough() || self.shared.page_cache().is_none() {
            return Ok(Hold::NotTaken);
        }
        // If it is not taken, what clients have written into the wal-index must stay theirs.
        let hold = self.begin_following(turn, change, page_size, WalWriter::take_over)?;
        if hold == Hold::Taken {
            // Of what was a rollback-mode database they are held exclusively.
            self.try_take(Owner::APPLY, SHARED, LockKind::Shared);
            stale.files.extend(self.files.get(FileKind::Shm).map(|file| file.ino));
        }
        Ok(hold)
    }

    fn begin_following(
        &self,
        turn: &mut Turn,
        change: &mut Change,
        page_size: PageSize,
        open: OpenWriter,
    ) -> Result<Hold> {
        // The node may have become primary meanwhile; it lets go of what it finds only once.
        if self.is_clients() || self.has_strays() {
            return Ok(Hold::NotTaken);
        }
        if !self.shared.is_passthrough() {
            // Until the kernel has dropped its pages.
            self.inbox.rewriting_index.store(true, Ordering::SeqCst);
        }
        let follower = self.open_follower(page_size, change.pages(), open)?;
        change.wal.resume(follower.writer.cursor());
        turn.follower = Some(follower);
        self.inbox.followed.store(true, Ordering::SeqCst);
        Ok(Hold::Taken)
    }

    fn open_follower(&self, page_size: PageSize, pages: u32, open: OpenWriter) -> Result<Follower> {
        let existed = self.files.get(FileKind::Shm).is_some();
        let database = self.files.get_or_create(FileKind::Database)?;
        let wal = self.files.get_or_create(FileKind::Wal)?;
        let shm = self.files.get_or_create(FileKind::Shm)?;
        let files = WalFiles {
            database: database.file.clone(),
            wal: wal.file.clone(),
            shm: shm.file.clone(),
        };
        let writer = open(files, page_size, pages, random_u32)
            .map_err(|source| self.wal_error("open wal", source))?;
        if !existed {
            self.shared.names_changed(self.name.as_str());
        }
        Ok(Follower { writer, files: FollowedFiles { database, wal, shm } })
    }

    /// Lets go: from now on the clients write the WAL themselves, or nobody does. Those who get a lock by that want the
    /// right to change, so the caller gives it up before it wakes them.
    #[must_use = "a waiter wants its answer"]
    pub(in crate::engine) fn let_go(&self, turn: &mut Turn, change: &mut Change) -> Woken<Waiter> {
        let Some(mut follower) = turn.follower.take() else { return Woken::new() };
        if let Err(source) = follower.writer.begin_log() {
            let error = self.wal_error("begin wal", source);
            tracing::error!(db = %self.name, error = chain_text(&error), "let go of wal");
        }
        follower.writer.tell(&FollowerCache::new(self, &follower.files));
        change.wal.resume(follower.writer.cursor());
        self.inbox.followed.store(false, Ordering::SeqCst);
        self.locks.lock().unwrap().unlock(Owner::APPLY, SHARED.union(EXCLUSIVE))
    }

    /// Whether a transaction can be appended to the WAL. One of a rollback journal can as long as
    /// clients have the WAL open, which they do not leave.
    pub(super) fn fits_wal(&self, change: &Change, received: &Received) -> bool {
        let header = &received.header;
        self.is_followed()
            && !header.is_snapshot()
            && header.commit > 0
            && change.page_size == Some(header.page_size)
            && (received.mode.is_none_or(|mode| mode == JournalMode::Wal) || self.has_clients())
    }

    /// Appends transactions to the WAL and makes them visible at once. Those before one that fails
    /// are applied; how many.
    pub(super) fn apply_to_wal(
        &self,
        turn: &mut Turn,
        change: &mut Change,
        batch: &[Arc<Received>],
    ) -> Result<usize> {
        let follower = turn.follower.as_mut().expect("only a followed database fits");
        let before = change.view();
        let mut applied = Vec::new();
        let mut failure = None;
        for received in batch {
            match self.append(change, follower, received) {
                Ok(transaction) => applied.push((transaction, received)),
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        let cache = FollowerCache::new(self, &follower.files);
        if let Err(source) = follower.writer.publish(&mut ApplierLocks(self), &cache) {
            let taken_back = follower.writer.rollback_unpublished();
            let went_back = self.go_back(change, &before, &follower.writer, &applied);
            went_back.inspect_err(|error| self.fail_for_good(error))?;
            taken_back.map_err(|source| self.wal_error("take back wal frames", source))?;
            return Err(self.wal_error("publish wal frames", source));
        }
        change.wal.resume(follower.writer.cursor());
        for (transaction, received) in &applied {
            self.chain.push(transaction.clone());
            self.note_lag(&received.header);
        }
        if let Some((_, last)) = applied.last() {
            self.shared.writer.queued(&self.chain);
            self.announce_applied(change, last.header.page_size);
        }
        match failure {
            Some(error) if applied.is_empty() => return Err(error),
            _ => {}
        }
        self.verify_if_strict(change)?;
        Ok(applied.len())
    }

    /// Makes `change` again what it was `before` the transactions `applied`, whose frames were taken back.
    fn go_back(
        &self,
        change: &mut Change,
        before: &View,
        writer: &WalWriter,
        applied: &[(Arc<Transaction>, &Arc<Received>)],
    ) -> Result<()> {
        let written = applied.iter().flat_map(|(transaction, _)| &transaction.pages);
        let mut pages: BTreeSet<Pgno> = written.map(|page| page.pgno).collect();
        let least = applied.iter().map(|(transaction, _)| transaction.commit).min();
        pages.extend((least.unwrap_or(before.pages) + 1..=before.pages).map(Pgno));
        change.sums.truncate(before.pages);
        if let Some(page_size) = before.page_size {
            let mut image = vec![0; page_size.bytes()];
            let there = |pgno: &Pgno| pgno.0 <= before.pages && *pgno != page_size.lock_pgno();
            for pgno in pages.into_iter().filter(there) {
                let read = writer.read_page(pgno, &mut image);
                read.map_err(|source| self.wal_error("read wal", source))?;
                change.sums.set(pgno, ltx::page_checksum(pgno, &image));
            }
        }
        change.pos = before.pos;
        change.page_size = before.page_size;
        change.timestamp_ms = before.timestamp_ms;
        match change.sums.rolling() == before.pos.checksum {
            true => Ok(()),
            false => Err(self.corrupt("take back wal frames", "the pages are not those of before")),
        }
    }

    /// Appends one transaction; nobody sees it yet.
    fn append(
        &self,
        change: &mut Change,
        follower: &mut Follower,
        received: &Received,
    ) -> Result<Arc<Transaction>> {
        self.check_outcome(change, received)?;
        let writer = &mut follower.writer;
        if let Err(error) = self.append_pages(writer, received) {
            writer.rollback_transaction().map_err(|e| self.wal_error("take back wal frames", e))?;
            return Err(error);
        }
        let header = &received.header;
        let place = |pgno: Pgno| {
            let frame = writer.find(pgno).expect("the page was just appended");
            frame_offset(header.page_size, frame) + FRAME_HEADER_SIZE as u64
        };
        let pages =
            received.sums.iter().map(|&(pgno, sum)| PageRef { pgno, sum, offset: place(pgno) });
        let transaction = Transaction::range(
            [change.pos.txid.next(), header.max_txid],
            [change.pos.checksum, received.trailer.post_apply],
            Draft {
                page_size: header.page_size,
                commit: header.commit,
                pages: pages.collect(),
                source: follower.files.wal.file.clone(),
                timestamp_ms: header.timestamp_ms,
                node_id: header.node_id,
                wal: WalSpan::default(),
            },
        );
        change.advance(&transaction);
        Ok(Arc::new(transaction))
    }

    fn append_pages(&self, writer: &mut WalWriter, received: &Received) -> Result<()> {
        let ltx = |source| self.ltx_error("read received ltx file", source);
        let wal = |source| self.wal_error("append to wal", source);
        let mut decoder = received.open().map_err(ltx)?;
        let mut page = vec![0; received.header.page_size.bytes()];
        while let Some(pgno) = decoder.next_page(&mut page).map_err(ltx)? {
            writer.append_page(pgno, &page).map_err(wal)?;
        }
        writer.append_commit(received.header.commit).map_err(wal)
    }

    /// Checkpoints a WAL that has grown, as far as readers allow, and lets it start over when nobody
    /// reads from it. What is moved or overwritten is durable in the chain before. Not with the right
    /// to change in hand: the kernel is told what was moved.
    pub(super) fn keep_wal_short(&self, turn: &mut Turn) -> Result<()> {
        let Some(follower) = &mut turn.follower else { return Ok(()) };
        let progress = follower.writer.progress();
        let grown = progress.frames - progress.backfilled;
        let due = grown >= limits::CHECKPOINT_FRAMES;
        let may_restart = progress.is_complete() && progress.frames >= limits::CHECKPOINT_FRAMES;
        if !(due || may_restart) || self.is_pinned() {
            return Ok(());
        }
        // Who freezes the database from here on does it at the published frame, beyond which nothing
        // is moved: each page that changes in the database file is one that it reads from the WAL.
        self.chain.sync()?;
        let mut locks = ApplierLocks(self);
        let cache = FollowerCache::new(self, &follower.files);
        let wal = |source| self.wal_error("checkpoint wal", source);
        let progress = follower.writer.checkpoint(&mut locks, &cache).map_err(wal)?;
        let mut change = self.change.lock().unwrap();
        if progress.is_complete()
            && !self.inbox.is_pinned()
            && follower.writer.restart(&mut locks, &cache).map_err(wal)? == Restart::Done
        {
            change.wal.resume(follower.writer.cursor());
            tracing::debug!(db = %self.name, frames = progress.frames, "wal starts over");
        }
        Ok(())
    }

    /// Whether a state is frozen, perhaps one before the present. Who freezes one says so before it
    /// takes the right to change, and under that notes which.
    fn is_pinned(&self) -> bool {
        let _change = self.change.lock().unwrap();
        self.inbox.is_pinned()
    }

    fn wal_error(&self, what: &'static str, source: super::wal::Error) -> Error {
        Error::Wal { what, db: self.name.clone(), source }
    }
}

/// The READ locks, for the applier.
struct ApplierLocks<'a>(&'a Db);

impl CheckpointLocks for ApplierLocks<'_> {
    fn try_lock(&mut self, set: LockSet) -> bool {
        self.0.try_take(Owner::APPLY, set, LockKind::Exclusive)
    }

    fn unlock(&mut self, set: LockSet) {
        self.0.release(Owner::APPLY, set);
    }
}

/// What clients have cached of the files of a followed database. Called with the right to change:
/// no worker may wait for that on a followed database.
struct FollowerCache<'a> {
    cache: Option<&'a dyn PageCache>,
    /// The pages of the wal-index that clients see are not ours.
    blind: bool,
    files: &'a FollowedFiles,
}

impl<'a> FollowerCache<'a> {
    fn new(db: &'a Db, files: &'a FollowedFiles) -> FollowerCache<'a> {
        let blind = !db.shared.is_passthrough();
        FollowerCache { cache: db.shared.page_cache(), blind, files }
    }

    fn pages(&self, backing: &Backing, offset: u64, len: u64) {
        if let Some(cache) = self.cache {
            cache.pages_changed(backing.ino, offset, len);
        }
    }

    /// A reader that does not know how long a file is would find nothing, or zeros, at its end. Before
    /// pages are dropped: that has the kernel forget the size that it is being told.
    fn grown(&self, backing: &Backing) {
        let Some(cache) = self.cache else { return };
        let mut last = [0];
        let Some(offset) = backing.file.metadata().ok().and_then(|meta| meta.len().checked_sub(1))
        else {
            return;
        };
        if os::read_up_to("read:grown", &backing.file, &mut last, offset)
            .is_ok_and(|read| read == 1)
        {
            cache.file_grown(backing.ino, offset, &last);
        }
    }
}

impl ReaderCache for FollowerCache<'_> {
    fn pages_changed(&self, offset: u64, len: u64) {
        self.pages(&self.files.database, offset, len);
    }

    fn size_changed(&self) {
        self.grown(&self.files.database);
        if let Some(cache) = self.cache {
            cache.attr_changed(self.files.database.ino);
        }
    }

    fn index_written(&self, offset: u64, len: u64) {
        if self.blind {
            self.pages(&self.files.shm, offset, len);
        }
    }

    fn index_grown(&self) {
        if self.blind {
            self.grown(&self.files.shm);
        } else if let Some(cache) = self.cache {
            cache.attr_changed(self.files.shm.ino);
        }
    }
}
