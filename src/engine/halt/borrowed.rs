//! The replica's side: a database that this node may write for a while.
//!
//! ```text
//! begin_borrow -> clients may take WRITE or RESERVED, and checkpoint -> end_borrow
//!   a commit: begin_forward (pending) -> forward -> taken: note_committed, or not: settle
//! ```
//!
//! Invariants: at most one transaction is pending, for its writer holds the write lock; nothing of
//! the primary is applied meanwhile; what is committed here was pending before; what is here already
//! and comes again in the primary's stream is known by its position.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use ltx::Pos;

use super::{HaltId, Outgoing};
use crate::boot_time::BootTime;
use crate::engine::db::{Answer, Db, Refusal};
use crate::engine::error::{Error, Result};
use crate::engine::files::FileKind;
use crate::{limits, os};

/// What a database knows of a lock that its node has borrowed.
#[derive(Default)]
pub struct Borrowing {
    state: Mutex<State>,
    /// Nothing is pending any more, or the database closes.
    settled: Condvar,
    /// A HALT lock was once used here.
    expected: AtomicBool,
}

impl Borrowing {
    /// Nothing is borrowed. `expected`: a HALT lock was used before.
    pub fn new(expected: bool) -> Borrowing {
        Borrowing { expected: AtomicBool::new(expected), ..Borrowing::default() }
    }
}

#[derive(Default)]
struct State {
    borrow: Option<Borrow>,
    /// Where a transaction leads to that is on its way to the primary, or taken and not here yet.
    pending: Option<Pos>,
    /// Where transactions lead to that the primary took from here; the newest last.
    taken: VecDeque<Pos>,
    closed: bool,
}

struct Borrow {
    id: HaltId,
    until: BootTime,
}

impl State {
    /// The lock, if it is still valid.
    fn valid(&self) -> Option<HaltId> {
        self.borrow.as_ref().filter(|borrow| BootTime::now() < borrow.until).map(|borrow| borrow.id)
    }
}

impl Db {
    /// Whether this node may write the database on behalf of the primary.
    pub fn is_borrowed(&self) -> bool {
        self.borrowing.state.lock().unwrap().valid().is_some()
    }

    /// Whether this node is the primary, which needs to borrow nothing.
    pub fn is_local(&self) -> bool {
        self.shared.is_writable()
    }

    /// An application is about to borrow. From here on, also after a restart, a replica's WAL is opened
    /// without passthrough, so that a commit can be held back.
    pub fn expect_borrow(&self) -> Result<()> {
        if self.shared.is_writable() || self.borrowing.expected.load(Ordering::SeqCst) {
            return Ok(());
        }
        let path = self.dir.halt();
        let made = match os::create_new("halt:mark", &path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made.map(drop),
        };
        made.map_err(Error::io("note halt lock", &path))?;
        self.borrowing.expected.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Whether the WAL is opened without passthrough.
    pub fn opens_wal_directly(&self) -> bool {
        !self.shared.is_writable() && self.borrowing.expected.load(Ordering::SeqCst)
    }

    /// Until when the lock `id` is valid, if the database is borrowed with it.
    pub fn borrowed_until(&self, id: HaltId) -> Option<BootTime> {
        let state = self.borrowing.state.lock().unwrap();
        state.borrow.as_ref().filter(|borrow| borrow.id == id).map(|borrow| borrow.until)
    }

    /// The primary has lent the lock until `until`, by this node's clock, at `pos`. From here on
    /// clients may write. Blocking.
    ///
    /// Errors: this node is the primary, or the database does not stand at `pos`.
    pub fn begin_borrow(&self, id: HaltId, pos: Pos, until: BootTime) -> Result<()> {
        let mut turn = self.turn();
        if self.pos() != pos || self.received_pos() != pos {
            let (db, have) = (self.name.clone(), self.received_pos());
            return Err(Error::PositionMismatch { db, have, need: pos });
        }
        if self.shared.is_writable() || BootTime::now() >= until {
            let what = "it came too late";
            return Err(Error::HaltLock { db: self.name.clone(), what });
        }
        self.borrowing.state.lock().unwrap().borrow = Some(Borrow { id, until });
        let held = self.settle_hold(&mut turn, Duration::ZERO);
        drop(turn);
        self.attributes_changed();
        held.inspect_err(|_| {
            self.end_borrow(Some(id));
        })
    }

    /// The primary has renewed the lock.
    pub fn extend_borrow(&self, id: HaltId, until: BootTime) {
        let mut state = self.borrowing.state.lock().unwrap();
        if let Some(borrow) = state.borrow.as_mut().filter(|borrow| borrow.id == id) {
            borrow.until = borrow.until.max(until);
        }
    }

    /// Clients may no longer write: what one of them has begun cannot be committed any more. Whether
    /// the database was borrowed with `id`, or at all.
    pub fn end_borrow(&self, id: Option<HaltId>) -> bool {
        let ended = {
            let mut state = self.borrowing.state.lock().unwrap();
            state.borrow.take_if(|borrow| id.is_none_or(|id| borrow.id == id)).is_some()
        };
        if ended {
            self.attributes_changed();
            // The applier takes hold of the WAL again.
            self.try_again();
        }
        ended
    }

    /// Waits until nothing is pending, for at most as long as a commit may take. Blocking.
    pub fn wait_settled(&self) {
        let end = Instant::now() + limits::FORWARD_WAIT + Duration::from_secs(1);
        let mut state = self.borrowing.state.lock().unwrap();
        while state.pending.is_some() && !state.closed {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.borrowing.settled.wait_timeout(state, left).unwrap().0;
        }
    }

    /// The database closes: nobody waits any more.
    pub(in crate::engine) fn close_borrowing(&self) {
        let mut state = self.borrowing.state.lock().unwrap();
        state.borrow = None;
        state.closed = true;
        self.borrowing.settled.notify_all();
    }

    /// The lock under which a transaction that leads to `pos` may be sent. It is pending from here on.
    pub(in crate::engine) fn begin_forward(&self, pos: Pos) -> Result<HaltId, Refusal> {
        let mut state = self.borrowing.state.lock().unwrap();
        let Some(id) = state.valid() else {
            drop(state);
            self.note_refused_write();
            return Err(Refusal::ReadOnly);
        };
        state.pending = Some(pos);
        Ok(id)
    }

    /// Sends a pending transaction to the primary. If it is not taken, nothing is pending any more;
    /// if it is, it is so until [`Db::note_committed`] or [`Db::settle`].
    pub(in crate::engine) fn forward(&self, outgoing: Outgoing, answer: Answer) {
        let (Some(me), Some(forward)) = (self.me.upgrade(), self.shared.forward()) else {
            self.settle();
            return answer(Err(Refusal::Os(libc::EIO)));
        };
        let db = me.clone();
        let answer: Answer = Box::new(move |result| {
            if result.is_err() {
                db.settle();
            }
            answer(result);
        });
        forward.commit(me, outgoing, answer);
    }

    /// Whether a transaction is pending.
    pub(in crate::engine) fn has_pending(&self) -> bool {
        self.borrowing.state.lock().unwrap().pending.is_some()
    }

    /// Whether the transaction that leads to `pos` is pending.
    pub(in crate::engine) fn is_pending(&self, pos: Pos) -> bool {
        self.borrowing.state.lock().unwrap().pending == Some(pos)
    }

    /// Nothing is pending any more.
    pub(in crate::engine) fn settle(&self) {
        if self.borrowing.state.lock().unwrap().pending.take().is_some() {
            self.borrowing.settled.notify_all();
        }
    }

    /// The transaction that leads to `pos` is committed here, and visible as the position.
    pub(in crate::engine) fn note_committed(&self, pos: Pos) {
        let mut state = self.borrowing.state.lock().unwrap();
        if state.pending.take_if(|pending| *pending == pos).is_some() {
            state.taken.push_back(pos);
            if state.taken.len() > limits::TAKEN_LEN {
                state.taken.pop_front();
            }
            self.borrowing.settled.notify_all();
        }
    }

    /// Whether a transaction that leads to `pos` is here, and was taken from here by the primary.
    pub(in crate::engine) fn has_taken(&self, pos: Pos) -> bool {
        // What comes again was mostly sent a moment ago.
        self.borrowing.state.lock().unwrap().taken.iter().rev().any(|taken| *taken == pos)
    }

    /// The permission bits of the database depend on who may write.
    fn attributes_changed(&self) {
        if let (Some(cache), Some(file)) =
            (self.shared.page_cache(), self.files.get(FileKind::Database))
        {
            cache.attr_changed(file.ino);
        }
    }
}
