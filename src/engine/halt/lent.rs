//! The primary's side: a database whose writers are locked out for one other node, which writes it by
//! sending transactions.
//!
//! A lent database is, on this node, what it is on a replica: no client gets a write lock, the applier
//! holds the WAL, readers go on and see each transaction. Only that what is applied comes from the node
//! that has the loan, and is checked before anything is stored.
//!
//! ```text
//! Free -- lend --> Asking -- writers are out --> Lent -- take_back, expire_lent --> Free
//! ```
//!
//! Invariants: there is at most one loan; it is made, used and ended by who has the turn, so it does not
//! end while a transaction is being applied under it; nothing of a transaction is stored before it is
//! known to fit the database and to lead to the checksum that it promises.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use ltx::{Checksum, Header, Pgno, Pos};

use super::HaltId;
use crate::boot_time::BootTime;
use crate::engine::apply::{Received, Turn};
use crate::engine::capture::Change;
use crate::engine::capture::wal::Captured;
use crate::engine::db::{Db, WRITERS};
use crate::engine::error::{Error, Result, chain_text};
use crate::engine::locks::{LockKind, Owner};
use crate::limits;

/// Whether a database is lent, and to whom.
#[derive(Default)]
pub struct Lending {
    /// Clients may not write. Set and cleared with the turn.
    lent: AtomicBool,
    state: Mutex<State>,
    /// The state is another one.
    changed: Condvar,
}

#[derive(Default, Clone, Copy)]
enum State {
    #[default]
    Free,
    /// Somebody locks the writers out.
    Asking,
    Lent(Loan),
}

/// A HALT lock as the primary knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loan {
    /// Whose it is.
    pub id: HaltId,
    /// Where the database stood when it was lent.
    pub pos: Pos,
    /// Until when it is valid.
    pub until: BootTime,
}

impl Loan {
    fn is_valid(&self) -> bool {
        BootTime::now() < self.until
    }
}

/// What [`Db::lend`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lent {
    /// The lock is new.
    New(Loan),
    /// It was held already, and is valid for longer now.
    Renewed(Loan),
}

impl Lent {
    /// The lock.
    pub fn loan(self) -> Loan {
        let (Lent::New(loan) | Lent::Renewed(loan)) = self;
        loan
    }
}

/// The right to make the loan. Dropped without one, others may ask.
struct Asking<'a>(&'a Lending);

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock().unwrap();
        if let State::Asking = *state {
            *state = State::Free;
            self.0.changed.notify_all();
        }
    }
}

impl Db {
    /// Whether the database is lent to another node.
    pub fn is_lent(&self) -> bool {
        self.lending.lent.load(Ordering::SeqCst)
    }

    /// The loan `id`, if it is valid.
    pub fn loan(&self, id: HaltId) -> Option<Loan> {
        match *self.lending.state.lock().unwrap() {
            State::Lent(loan) if loan.id == id && loan.is_valid() => Some(loan),
            _ => None,
        }
    }

    /// Lends the database, or renews the loan `id`. Waits `limit` long for writers and another loan to
    /// end; once it has waited it gives up if the request was `abandoned`. Blocking.
    ///
    /// Errors: this node is not the primary; the wait was too long ([`Error::Busy`]).
    pub fn lend(&self, id: HaltId, limit: Duration, abandoned: &AtomicBool) -> Result<Lent> {
        let end = Instant::now() + limit;
        let _asking = match self.ask(id, end, abandoned)? {
            Ok(asking) => asking,
            Err(renewed) => return Ok(Lent::Renewed(renewed)),
        };
        let mut turn = self.turn_to_lend(end)?;
        self.lock_writers_out(end, abandoned)?;
        let held = self.settle_hold(&mut turn, left(end)).and_then(|()| self.refuse_lost());
        if let Err(error) = held {
            self.let_writers_in(&mut turn);
            return Err(error);
        }
        let loan = Loan { id, pos: self.pos(), until: BootTime::now().after(limits::HALT_TTL) };
        *self.lending.state.lock().unwrap() = State::Lent(loan);
        Ok(Lent::New(loan))
    }

    /// Waits until nobody else has or asks for a loan; or renews the loan `id`.
    fn ask(
        &self,
        id: HaltId,
        end: Instant,
        abandoned: &AtomicBool,
    ) -> Result<Result<Asking<'_>, Loan>> {
        let mut state = self.lending.state.lock().unwrap();
        loop {
            if !self.shared.may_begin() {
                return Err(Error::NotPrimary);
            }
            if abandoned.load(Ordering::SeqCst) {
                return Err(self.busy("nobody waits for the lock any more"));
            }
            match &mut *state {
                State::Free => break,
                State::Lent(loan) if loan.id == id && loan.is_valid() => {
                    loan.until = BootTime::now().after(limits::HALT_TTL);
                    return Ok(Err(*loan));
                }
                State::Lent(_) | State::Asking => {}
            }
            let left = left(end);
            if left.is_zero() {
                return Err(self.busy("another node has its halt lock"));
            }
            state = self.lending.changed.wait_timeout(state, left).unwrap().0;
        }
        *state = State::Asking;
        Ok(Ok(Asking(&self.lending)))
    }

    /// The turn, when everything is applied that this node received as a replica.
    fn turn_to_lend(&self, end: Instant) -> Result<std::sync::MutexGuard<'_, Turn>> {
        loop {
            let turn = self.turn();
            if !self.inbox.has_queue() {
                return Ok(turn);
            }
            drop(turn);
            self.wait_for_applier(left(end));
            if left(end).is_zero() {
                return Err(self.busy("what it received as a replica is not applied yet"));
            }
        }
    }

    /// Nobody writes from here on, and all that was committed is captured.
    fn lock_writers_out(&self, end: Instant, abandoned: &AtomicBool) -> Result<()> {
        self.take(Owner::LEND, WRITERS, LockKind::Exclusive, left(end))?;
        let _guard = self.guard(Owner::LEND, WRITERS);
        if self.capture_wal() == Captured::Failed {
            return Err(self.busy("what was committed cannot be captured"));
        }
        if abandoned.load(Ordering::SeqCst) {
            return Err(self.busy("nobody waits for the lock any more"));
        }
        // A change of the role refuses new writers, then ends loans; one made after that it waits for
        // as for a writer, whose locks are held here.
        self.lending.lent.store(true, Ordering::SeqCst);
        if !self.shared.may_begin() {
            self.lending.lent.store(false, Ordering::SeqCst);
            return Err(Error::NotPrimary);
        }
        Ok(())
    }

    fn let_writers_in(&self, turn: &mut Turn) {
        self.lending.lent.store(false, Ordering::SeqCst);
        if self.settle_hold(turn, Duration::ZERO).is_err() {
            self.try_again();
        }
    }

    /// Ends the loan `id`, or any; whether there was one. Waits for a transaction that is being
    /// applied. Blocking.
    pub fn take_back(&self, id: Option<HaltId>, why: &'static str) -> bool {
        let is_it = |loan: &Loan| id.is_none_or(|id| loan.id == id);
        if !self.is_lent() {
            return false;
        }
        let mut turn = self.turn();
        let found = match *self.lending.state.lock().unwrap() {
            State::Lent(loan) if is_it(&loan) => loan,
            _ => return false,
        };
        self.end_loan(&mut turn, found, why);
        true
    }

    /// Ends the loan `id` if it is not valid any more; if it is, until when. Blocking.
    pub fn expire_lent(&self, id: HaltId) -> Option<BootTime> {
        let mut turn = self.turn();
        let loan = match *self.lending.state.lock().unwrap() {
            State::Lent(loan) if loan.id == id => loan,
            _ => return None,
        };
        if loan.is_valid() {
            return Some(loan.until);
        }
        self.end_loan(&mut turn, loan, "it was not renewed in time");
        None
    }

    fn end_loan(&self, turn: &mut Turn, loan: Loan, why: &'static str) {
        self.let_writers_in(turn);
        *self.lending.state.lock().unwrap() = State::Free;
        self.lending.changed.notify_all();
        tracing::info!(db = %self.name, id = %loan.id, pos = %self.pos(), why, "halt lock ended");
    }

    /// Applies a transaction of the node to which the database is lent with `id`. Blocking.
    ///
    /// Errors: the loan is not valid; the transaction does not follow, is not whole, or does not lead
    /// to its checksum: nothing has changed then. Or it cannot be applied: then either nothing has
    /// changed, or it is stored and will be applied.
    pub(in crate::engine) fn apply_forwarded(
        &self,
        id: HaltId,
        received: &Arc<Received>,
    ) -> Result<Pos> {
        let mut turn = self.turn();
        if self.loan(id).is_none() {
            return Err(Error::HaltLock { db: self.name.clone(), what: "is not held" });
        }
        if !self.shared.may_commit() {
            return Err(Error::NotPrimary);
        }
        self.refuse_lost()?;
        let pos = received.pos();
        if self.pos() == pos {
            // Its answer was lost.
            return Ok(pos);
        }
        if self.inbox.has_queue() {
            return Err(self.busy("a transaction before it is not applied yet"));
        }
        self.check_forwarded(&self.change.lock().unwrap(), received)?;
        if let Err(error) = self.apply_next(&mut turn, received) {
            return Err(self.forwarded_failed(error, received));
        }
        if let Err(error) = self.settle_hold(&mut turn, Duration::ZERO) {
            tracing::warn!(db = %self.name, error = chain_text(&error), "hold the wal of a lent database");
            self.try_again();
        }
        self.refuse_late_commit().map_err(|_| Error::NotPrimary)?;
        Ok(pos)
    }

    /// What follows from a transaction that fits and was not applied.
    fn forwarded_failed(&self, error: Error, received: &Arc<Received>) -> Error {
        if matches!(error, Error::Diverged { .. }) {
            // The page checksums in memory are not those of the files.
            self.fail_for_good(&error);
        } else if self.chain.contains(received.header.max_txid) {
            // A restart would come to it.
            self.queue_stored(received.clone());
        }
        error
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

    /// Whether this node is the primary and the database stands at `pos`.
    pub fn is_committed_at(&self, pos: Pos) -> bool {
        self.shared.may_commit() && self.pos() == pos && !self.is_lost()
    }
}

fn left(end: Instant) -> Duration {
    end.saturating_duration_since(Instant::now())
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
