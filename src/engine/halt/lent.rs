//! The primary's side: a database whose writers are locked out for one other node, which writes it by
//! sending transactions.
//!
//! The loan is a lock owner like any other. In WAL mode it holds WRITE, and with passthrough the WAL
//! itself, as a replica's applier does: readers go on, and see each transaction. In rollback mode it
//! holds RESERVED, and waits for readers only while a transaction is applied. SHARED keeps everybody
//! from changing the journal mode.
//!
//! Invariants: there is at most one loan; it is made, used and ended by who has the turn, so it does not
//! end while a transaction is being applied under it; nothing of a transaction is stored before it is
//! known to fit the database and to lead to the checksum that it promises.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ltx::{Checksum, Header, Pgno, Pos, Txid};

use super::HaltId;
use crate::boot_time::BootTime;
use crate::engine::apply::{Received, Stale, Turn, WAL_EXCLUSIVE, WAL_SHARED};
use crate::engine::capture::Change;
use crate::engine::chain::{Durable, Waiting};
use crate::engine::db::{Db, Guard};
use crate::engine::error::{Error, Result};
use crate::engine::files::{FileKind, next_ino};
use crate::engine::locks::{LockKind, Owner};
use crate::limits;
use crate::sqlite::header::JournalMode;
use crate::sqlite::lock_byte::{Lock, LockSet};

/// Whether a database is lent, and to whom.
#[derive(Default)]
pub struct Lending {
    loan: Mutex<Option<Loan>>,
}

#[derive(Debug, Clone, Copy)]
struct Loan {
    id: HaltId,
    /// Where the database stood.
    pos: Pos,
    until: BootTime,
    owner: Owner,
}

/// A HALT lock as its holder sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lent {
    /// Whose it is.
    pub id: HaltId,
    /// Where the database stood when it was lent.
    pub pos: Pos,
    /// Until when it is valid.
    pub until: BootTime,
    /// Whether it was made just now.
    pub is_new: bool,
}

impl Loan {
    fn lent(&self, is_new: bool) -> Lent {
        Lent { id: self.id, pos: self.pos, until: self.until, is_new }
    }

    fn is_valid(&self) -> bool {
        BootTime::now() < self.until
    }
}

impl Db {
    /// Whether the database is lent to another node.
    pub fn is_lent(&self) -> bool {
        self.lending.loan.lock().unwrap().is_some()
    }

    /// The loan `id`, if it is valid.
    pub fn lent(&self, id: HaltId) -> Option<Lent> {
        self.loan(id).map(|loan| loan.lent(false))
    }

    fn loan(&self, id: HaltId) -> Option<Loan> {
        let loan = *self.lending.loan.lock().unwrap();
        loan.filter(|loan| loan.id == id && loan.is_valid())
    }

    /// Lends the database, or renews the loan `id`. Waits `limit` long for writers and former loans to
    /// end; once it has waited it gives up if the request was `abandoned`. Blocking.
    ///
    /// Errors: this node is not the primary; the wait was too long ([`Error::Busy`]).
    pub fn lend(&self, id: HaltId, limit: Duration, abandoned: &AtomicBool) -> Result<Lent> {
        let end = Instant::now() + limit;
        let owner = Owner::loan(next_ino());
        loop {
            if !self.shared.may_begin() {
                return Err(Error::NotPrimary);
            }
            self.refuse_lost()?;
            if let Some(lent) = self.renew(id) {
                return Ok(lent);
            }
            let mode = self.view().mode;
            let guard = self.lock_writers_out(owner, mode, end)?;
            let mut turn = self.turn();
            if abandoned.load(Ordering::SeqCst) {
                return Err(self.busy("nobody waits for the lock any more"));
            }
            // Asked again under the locks, for which a change of the role waits.
            if self.view().mode == mode && self.shared.may_begin() {
                return self.make_loan(&mut turn, guard, owner, id);
            }
        }
    }

    fn renew(&self, id: HaltId) -> Option<Lent> {
        let mut loan = self.lending.loan.lock().unwrap();
        let loan = loan.as_mut().filter(|loan| loan.id == id && loan.is_valid())?;
        loan.until = BootTime::now().after(limits::HALT_TTL);
        Some(loan.lent(false))
    }

    fn make_loan<'a>(
        &'a self,
        turn: &mut Turn,
        mut guard: Guard<'a>,
        owner: Owner,
        id: HaltId,
    ) -> Result<Lent> {
        if self.has_left_journal() {
            // As long as RESERVED is held, SQLite takes the journal for that of a live writer.
            drop(guard);
            guard = self.undo_left_journal(owner)?;
        }
        let mut change = self.change.lock().unwrap();
        self.capture_frames(&mut change)?;
        self.hold_lent(turn, &mut change, owner)?;
        guard.keep();
        let until = BootTime::now().after(limits::HALT_TTL);
        let loan = Loan { id, pos: change.pos, until, owner };
        *self.lending.loan.lock().unwrap() = Some(loan);
        Ok(loan.lent(true))
    }

    /// What a loan holds shared and exclusively.
    fn loan_locks(&self, mode: JournalMode) -> [LockSet; 2] {
        match (mode, self.shared.is_passthrough()) {
            (JournalMode::Rollback, _) => [LockSet::EMPTY, LockSet::one(Lock::Reserved)],
            (JournalMode::Wal, false) => [LockSet::one(Lock::Shared), LockSet::one(Lock::Write)],
            (JournalMode::Wal, true) => [WAL_SHARED, WAL_EXCLUSIVE],
        }
    }

    fn lock_writers_out(&self, owner: Owner, mode: JournalMode, end: Instant) -> Result<Guard<'_>> {
        let [shared, exclusive] = self.loan_locks(mode);
        let left = || end.saturating_duration_since(Instant::now());
        let mut guard = self.guard(owner, LockSet::EMPTY);
        self.take(owner, shared, LockKind::Shared, left())?;
        guard.add(shared);
        self.take(owner, exclusive, LockKind::Exclusive, left())?;
        guard.add(exclusive);
        Ok(guard)
    }

    /// With passthrough, becomes the one writer of the WAL.
    fn hold_lent(&self, turn: &mut Turn, change: &mut Change, owner: Owner) -> Result<()> {
        match change.page_size {
            Some(page_size) if change.mode == JournalMode::Wal && self.shared.is_passthrough() => {
                self.hold_wal(turn, change, owner, page_size)
            }
            _ => Ok(()),
        }
    }

    /// Whether there is a journal whose writer died: nobody has RESERVED but the loan.
    fn has_left_journal(&self) -> bool {
        let mut first = [0];
        self.files.get(FileKind::Journal).is_some_and(|journal| {
            let read = crate::os::read_up_to(&journal.file, &mut first, 0);
            read.is_ok_and(|filled| filled == 1 && first != [0])
        })
    }

    /// Undoes what a writer that died has left in the database file. What the loan holds afterwards.
    fn undo_left_journal(&self, owner: Owner) -> Result<Guard<'_>> {
        let mut everything = self.lock_everything(owner, limits::FORWARD_LOCK_WAIT)?;
        let mut change = self.change.lock().unwrap();
        let mut stale = Stale::default();
        let undone = self.undo_journal(&mut change, &mut stale);
        drop(change);
        self.drop_cached(stale);
        undone?;
        self.keep_loan(owner, &mut everything);
        let mut guard = self.guard(owner, LockSet::EMPTY);
        guard.add(self.loan_locks(self.view().mode).into_iter().flat_map(LockSet::iter).collect());
        Ok(guard)
    }

    /// Ends the loan `id`, or any; whether there was one. Waits for a transaction that is being
    /// applied. Blocking.
    pub fn take_back(&self, id: Option<HaltId>, why: &'static str) -> bool {
        let mut turn = self.turn();
        let found = {
            let loan = self.lending.loan.lock().unwrap();
            loan.filter(|loan| id.is_none_or(|id| loan.id == id))
        };
        if let Some(loan) = found {
            self.end_loan(&mut turn, loan, why);
        }
        found.is_some()
    }

    /// Ends the loan `id` if it is not valid any more; if it is, until when. Blocking.
    pub fn expire_lent(&self, id: HaltId) -> Option<BootTime> {
        let mut turn = self.turn();
        let loan = (*self.lending.loan.lock().unwrap()).filter(|loan| loan.id == id)?;
        if loan.is_valid() {
            return Some(loan.until);
        }
        self.end_loan(&mut turn, loan, "it was not renewed in time");
        None
    }

    fn end_loan(&self, turn: &mut Turn, loan: Loan, why: &'static str) {
        let mut change = self.change.lock().unwrap();
        let is_lost = self.is_lost();
        self.leave_wal(turn, &mut change);
        *self.lending.loan.lock().unwrap() = None;
        if !is_lost {
            // Of a lost database nobody may see what is there.
            self.release(loan.owner, LockSet::ALL);
        }
        drop(change);
        tracing::info!(db = %self.name, id = %loan.id, pos = %self.pos(), why, "halt lock ended");
    }

    /// Applies a transaction of the node to which the database is lent with `id`. Blocking.
    ///
    /// Errors: the loan is not valid; the transaction does not follow, is not whole, or does not lead
    /// to its checksum; readers do not finish. Nothing has changed then.
    pub(in crate::engine) fn apply_forwarded(
        &self,
        id: HaltId,
        received: &Arc<Received>,
    ) -> Result<Pos> {
        let mut turn = self.turn();
        let not_held = || Error::HaltLock { db: self.name.clone(), what: "is not held" };
        let loan = self.loan(id).ok_or_else(not_held)?;
        if !self.shared.may_begin() {
            return Err(Error::NotPrimary);
        }
        self.refuse_lost()?;
        let pos = received.pos();
        let mut change = self.change.lock().unwrap();
        if change.pos == pos {
            // Its answer was lost.
            return Ok(pos);
        }
        self.check_forwarded(&change, received)?;
        if self.fits_wal(&change, received) {
            self.apply_to_wal(&mut turn, &mut change, std::slice::from_ref(received))?;
            drop(change);
            self.keep_wal_short(&mut turn)?;
        } else {
            drop(change);
            self.apply_exclusively_as(&mut turn, loan.owner, received)?;
        }
        self.refuse_late_commit().map_err(|_| Error::NotPrimary)?;
        Ok(pos)
    }

    /// The transaction is the next one, whole, and leads to its checksum.
    fn check_forwarded(&self, change: &Change, received: &Received) -> Result<()> {
        let header = &received.header;
        let next = change.pos.txid.next();
        let follows = match header.is_snapshot() {
            true => header.max_txid == next,
            false => header.pre_pos() == change.pos && header.max_txid == next,
        };
        if !follows {
            let (db, have, need) = (self.name.clone(), change.pos, header.pre_pos());
            return Err(Error::PositionMismatch { db, have, need });
        }
        let known = if header.is_snapshot() { 0 } else { change.pages() };
        if !is_whole(header, &received.sums, known) {
            let what = "the transaction lacks pages by which the database grows";
            return Err(Error::Diverged { db: self.name.clone(), pos: change.pos, what });
        }
        self.check_outcome(change, received)
    }

    /// Applies one LTX file with everybody else locked out; the loan goes on.
    fn apply_exclusively_as(
        &self,
        turn: &mut Turn,
        owner: Owner,
        received: &Arc<Received>,
    ) -> Result<()> {
        self.leave_wal(turn, &mut self.change.lock().unwrap());
        let applied = match self.lock_everything(owner, limits::FORWARD_LOCK_WAIT) {
            Ok(mut guard) => {
                let applied = self.apply_alone(&mut guard, received);
                if guard.is_left() {
                    let error = applied.as_ref().expect_err("locks are left by who fails");
                    self.fail_for_good(error);
                    return applied;
                }
                self.keep_loan(owner, &mut guard);
                applied
            }
            Err(error) => Err(error),
        };
        let mut change = self.change.lock().unwrap();
        self.hold_lent(turn, &mut change, owner)?;
        applied
    }

    /// Takes what the loan needs in the journal mode that the database has now out of a guard of
    /// everything, and leaves the rest to it.
    fn keep_loan(&self, owner: Owner, guard: &mut Guard<'_>) {
        let [shared, exclusive] = self.loan_locks(self.view().mode);
        let kept: LockSet = shared.iter().chain(exclusive.iter()).collect();
        // All of it is the owner's already.
        self.try_take(owner, exclusive, LockKind::Exclusive);
        self.try_take(owner, shared, LockKind::Shared);
        guard.add(self.held_by(owner).without(kept));
        guard.spare(kept);
    }

    /// Calls `done` when everything up to `txid` is durable.
    pub fn when_durable(&self, txid: Txid, done: Durable) {
        if self.chain.when_durable(txid, done) == Waiting::Waits {
            self.shared.writer.urgent(&self.chain);
        }
    }

    /// Whether there is too little room on the disk for another transaction.
    pub fn is_disk_full(&self) -> bool {
        self.shared.is_full()
    }

    fn busy(&self, what: &'static str) -> Error {
        Error::Busy { db: self.name.clone(), what }
    }
}

/// Whether the pages, which ascend, are inside the database and hold every one by which it grew from
/// `known` pages.
fn is_whole(header: &Header, pages: &[(Pgno, Checksum)], known: u32) -> bool {
    let lock = header.page_size.lock_pgno();
    let grown = pages.partition_point(|(pgno, _)| pgno.0 <= known);
    let holds_lock = known < lock.0 && lock.0 <= header.commit;
    let expected = u64::from(header.commit.saturating_sub(known)) - u64::from(holds_lock);
    let inside = pages.iter().all(|(pgno, _)| pgno.0 <= header.commit && *pgno != lock);
    inside && (pages.len() - grown) as u64 == expected
}
