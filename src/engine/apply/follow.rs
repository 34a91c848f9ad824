//! A replica's hold on a WAL database: it is the one writer, and no client ever resets the wal-index.
//!
//! While a node follows, the applier holds SHARED on the database file, WRITE, CKPT, and DMS shared.
//! So a client can read and nothing else: it cannot write, checkpoint, or remove the WAL when it
//! closes. Transactions are appended in batches and published at once; the WAL is checkpointed when
//! it has grown, as far as readers allow, and starts over when nobody reads from it.
//!
//! The hold belongs to whoever has the turn ([`Turn`]). A checkpoint drops pages from the kernel's
//! cache, which can take as long as a read that a FUSE worker serves: it is made with the turn alone,
//! for which no worker waits.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use ltx::{PageSize, Pgno};

use super::wal::{CheckpointLocks, ReaderCache, Restart, WalFiles, WalWriter};
use super::{Received, Turn, random_u32};
use crate::engine::capture::Change;
use crate::engine::db::Db;
use crate::engine::error::{Error, Result, chain_text};
use crate::engine::files::FileKind;
use crate::engine::locks::{LockKind, Owner};
use crate::engine::transaction::{PageRef, Parts, Transaction, WalSpan};
use crate::limits;
use crate::sqlite::header::JournalMode;
use crate::sqlite::lock_byte::{Lock, LockSet};
use crate::sqlite::wal::{FRAME_HEADER_SIZE, frame_offset};

/// Held shared while following.
pub(in crate::engine) const SHARED: LockSet = LockSet::one(Lock::Shared).with(Lock::Dms);
/// Held exclusively while following.
pub(in crate::engine) const EXCLUSIVE: LockSet = LockSet::one(Lock::Write).with(Lock::Ckpt);

/// The replica's hold on a WAL database.
pub struct Follower {
    /// Whose locks they are.
    owner: Owner,
    writer: WalWriter,
    wal: Arc<std::fs::File>,
    /// Inode numbers of the database file and the wal-index.
    inos: (u64, u64),
}

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
            if !self.inbox.has_queue() && !self.is_lent() {
                self.let_go(turn, &mut self.change.lock().unwrap());
                // What a primary has is right, unless it is nothing.
                self.set_needs_snapshot(self.is_lost());
            }
            return Ok(());
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
        self.may_write() && !self.inbox.has_queue()
    }

    /// Takes hold of a WAL database that this node may not write itself, or not yet; nothing to do for
    /// others.
    pub(super) fn follow(&self, turn: &mut Turn, limit: Duration) -> Result<()> {
        let view = self.view();
        let (Some(page_size), JournalMode::Wal) = (view.page_size, view.mode) else {
            return Ok(());
        };
        // Of a lost database the applier holds the locks already, so that nobody sees it.
        let unwanted = self.is_clients() || self.is_lost() || !self.shared.is_passthrough();
        if unwanted || self.is_followed() {
            return Ok(());
        }
        self.take(Owner::APPLY, SHARED, LockKind::Shared, limit)?;
        let mut guard = self.guard(Owner::APPLY, SHARED);
        self.take(Owner::APPLY, EXCLUSIVE, LockKind::Exclusive, limit)?;
        guard.add(EXCLUSIVE);
        let mut change = self.change.lock().unwrap();
        if self.is_clients() {
            // The node became primary meanwhile; it lets go of what it finds only once.
            return Ok(());
        }
        self.capture_frames(&mut change)?;
        if self.has_strays() {
            return Ok(());
        }
        self.hold_wal(turn, &mut change, Owner::APPLY, page_size)?;
        guard.keep();
        Ok(())
    }

    /// Becomes the one writer of the WAL; `owner` has the locks.
    pub(in crate::engine) fn hold_wal(
        &self,
        turn: &mut Turn,
        change: &mut Change,
        owner: Owner,
        page_size: PageSize,
    ) -> Result<()> {
        let follower = self.open_follower(owner, page_size, change.pages())?;
        change.wal.resume(follower.writer.cursor());
        turn.follower = Some(follower);
        self.inbox.followed.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn open_follower(&self, owner: Owner, page_size: PageSize, pages: u32) -> Result<Follower> {
        let existed = self.files.get(FileKind::Shm).is_some();
        let database = self.files.get_or_create(FileKind::Database)?;
        let wal = self.files.get_or_create(FileKind::Wal)?;
        let shm = self.files.get_or_create(FileKind::Shm)?;
        let files = WalFiles {
            database: database.file.clone(),
            wal: wal.file.clone(),
            shm: shm.file.clone(),
        };
        let writer = WalWriter::open_or_create(files, page_size, pages, random_u32)
            .map_err(|source| self.wal_error("open wal", source))?;
        if !existed {
            self.shared.names_changed(self.name.as_str());
        }
        Ok(Follower { owner, writer, wal: wal.file.clone(), inos: (database.ino, shm.ino) })
    }

    /// Lets go: from now on the clients write the WAL themselves, or nobody does.
    pub(in crate::engine) fn let_go(&self, turn: &mut Turn, change: &mut Change) {
        if let Some(owner) = self.leave_wal(turn, change) {
            self.release(owner, SHARED.iter().chain(EXCLUSIVE.iter()).collect());
        }
    }

    /// As [`Db::let_go`], but the locks stay with their owner.
    pub(in crate::engine) fn leave_wal(
        &self,
        turn: &mut Turn,
        change: &mut Change,
    ) -> Option<Owner> {
        let follower = turn.follower.take()?;
        change.wal.resume(follower.writer.cursor());
        self.inbox.followed.store(false, Ordering::SeqCst);
        Some(follower.owner)
    }

    /// Whether a transaction can be appended to the WAL. One of a rollback journal can as long as
    /// clients have the WAL open, which they do not leave.
    pub(in crate::engine) fn fits_wal(&self, change: &Change, received: &Received) -> bool {
        let header = &received.header;
        self.is_followed()
            && !header.is_snapshot()
            && header.commit > 0
            && change.page_size == Some(header.page_size)
            && (received.mode.is_none_or(|mode| mode == JournalMode::Wal) || self.has_clients())
    }

    /// Appends transactions to the WAL and makes them visible at once. Those before one that fails
    /// are applied; how many.
    pub(in crate::engine) fn apply_to_wal(
        &self,
        turn: &mut Turn,
        change: &mut Change,
        batch: &[Arc<Received>],
    ) -> Result<usize> {
        let follower = turn.follower.as_mut().expect("only a followed database fits");
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
        let cache = FollowerCache { db: self, inos: follower.inos };
        if let Err(source) = follower.writer.publish(&cache) {
            // The checksums have moved on already; a snapshot sets everything right again.
            let error = self.wal_error("publish wal frames", source);
            let taken_back = follower.writer.rollback_unpublished();
            taken_back.map_err(|source| self.wal_error("take back wal frames", source))?;
            tracing::error!(db = %self.name, error = chain_text(&error), "apply transaction");
            let what = "the wal-index could not be written";
            return Err(Error::Diverged { db: self.name.clone(), pos: change.pos, what });
        }
        change.wal.resume(follower.writer.cursor());
        for (transaction, received) in &applied {
            self.chain.push(transaction.clone());
            self.note_lag(&received.header);
        }
        if let Some((_, last)) = applied.last() {
            self.shared.writer.queued(&self.chain);
            self.announce_applied(change, &last.header);
        }
        match failure {
            Some(error) if applied.is_empty() => return Err(error),
            _ => {}
        }
        self.verify_if_strict(change)?;
        Ok(applied.len())
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
            Parts {
                txid: header.max_txid,
                pre: change.pos.checksum,
                post: received.trailer.post_apply,
                page_size: header.page_size,
                commit: header.commit,
                pages: pages.collect(),
                source: follower.wal.clone(),
                timestamp_ms: header.timestamp_ms,
                node_id: header.node_id,
                wal: WalSpan::default(),
            },
            change.pos.txid.next(),
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
    pub(in crate::engine) fn keep_wal_short(&self, turn: &mut Turn) -> Result<()> {
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
        let mut locks = ApplierLocks(self, follower.owner);
        let cache = FollowerCache { db: self, inos: follower.inos };
        let wal = |source| self.wal_error("checkpoint wal", source);
        let progress = follower.writer.checkpoint(&mut locks, &cache).map_err(wal)?;
        let mut change = self.change.lock().unwrap();
        if progress.is_complete()
            && !self.inbox.is_pinned()
            && follower.writer.restart(&mut locks).map_err(wal)? == Restart::Done
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

/// The READ locks, for who has the others.
struct ApplierLocks<'a>(&'a Db, Owner);

impl CheckpointLocks for ApplierLocks<'_> {
    fn try_lock(&mut self, set: LockSet) -> bool {
        self.0.try_take(self.1, set, LockKind::Exclusive)
    }

    fn unlock(&mut self, set: LockSet) {
        self.0.release(self.1, set);
    }
}

/// What clients have cached of the files of a followed database.
struct FollowerCache<'a> {
    db: &'a Db,
    /// Inode numbers of the database file and the wal-index.
    inos: (u64, u64),
}

impl ReaderCache for FollowerCache<'_> {
    fn pages_changed(&self, offset: u64, len: u64) {
        if let Some(cache) = self.db.shared.page_cache() {
            cache.pages_changed(self.inos.0, offset, len);
        }
    }

    fn size_changed(&self) {
        if let Some(cache) = self.db.shared.page_cache() {
            cache.attr_changed(self.inos.0);
        }
    }

    fn index_grown(&self) {
        if let Some(cache) = self.db.shared.page_cache() {
            cache.attr_changed(self.inos.1);
        }
    }
}
