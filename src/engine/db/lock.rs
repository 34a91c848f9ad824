//! The lock calls of the applications and of the engine itself on one database.
//!
//! A release of the WRITE lock captures first and releases then, so nobody can write in between. A
//! grant that would let frames be moved or overwritten (CKPT; READ1 to READ4 together, which is a
//! restart of the WAL; the whole database in WAL mode) is answered only when everything captured is
//! durable in the chain: the lock is held meanwhile, the answer waits, no thread does.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, mpsc};
use std::time::Duration;

use super::{Db, Refusal};
use crate::engine::capture::wal::Captured;
use crate::engine::error::Result;
use crate::engine::fence::Settled;
use crate::engine::files::next_ino;
use crate::engine::locks::{
    Conflict, Grant, Granted, Handle, LockKind, LockTable, Outcome, Owner, Request, Woken,
};
use crate::engine::shared::Writing;
use crate::sqlite::header::JournalMode;
use crate::sqlite::lock_byte::{Lock, LockSet};

/// Takes the answer to one call.
pub type Answer = Box<dyn FnOnce(Result<(), Refusal>) + Send>;

/// The lock table with what waits in it.
pub type Table = LockTable<Waiter>;

/// For whom a lock call may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// For nobody: it is answered at once.
    None,
    /// Not for another client, and [`crate::limits::ENGINE_LOCK_WAIT`] for what the engine itself holds and gives
    /// back by itself. SQLite asks in this way, and by default does not try again.
    WithEngine,
    /// For anybody, until an interrupt names this id.
    Any(u64),
}

/// A lock call that waits in the table.
pub struct Waiter {
    /// The id by which an interrupt names it.
    id: Option<u64>,
    owner: Owner,
    patience: Patience,
    answer: Answer,
}

/// Locks that the engine holds; dropped, they are released.
pub struct Guard<'a> {
    db: &'a Db,
    owner: Owner,
    set: LockSet,
    /// Keeps a replica's applier from moving frames.
    pins: bool,
}

impl Guard<'_> {
    /// Keeps a replica's applier from moving or overwriting frames as long as this lives.
    pub(in crate::engine) fn pin(&mut self) {
        if !self.pins {
            self.db.inbox.pin();
            self.pins = true;
        }
    }

    /// Leaves the locks of `set` to their owner, and releases the others.
    pub(in crate::engine) fn keep(mut self, set: LockSet) {
        self.set = self.set.without(set);
    }

    /// Leaves the locks to their owner, who does not know when they are given back.
    pub(in crate::engine) fn leave(&mut self) {
        self.db.inbox.set_left(true);
        self.set = LockSet::EMPTY;
    }

    /// Whether the locks were left to their owner.
    pub(in crate::engine) fn is_left(&self) -> bool {
        self.set.is_empty()
    }

    /// Also holds `set`, which was taken for the same owner.
    pub(in crate::engine) fn add(&mut self, set: LockSet) {
        self.set = self.set.union(set);
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if self.pins {
            self.db.inbox.unpin();
        }
        self.db.release(self.owner, self.set);
    }
}

impl Db {
    /// Takes locks.
    pub fn lock(&self, request: Request, patience: Patience, answer: Answer) {
        if let Err(refusal) = self.admit(&request) {
            return answer(Err(refusal));
        }
        let id = if let Patience::Any(id) = patience { Some(id) } else { None };
        let waiter = Waiter { id, owner: request.owner, patience, answer };
        let mut locks = self.locks.lock().unwrap();
        let outcome = match patience {
            Patience::Any(_) => locks.lock_or_wait(request, waiter),
            Patience::None | Patience::WithEngine => match locks.try_lock(request) {
                Ok((grant, woken)) => Outcome::Locked(Granted { waiter, grant }, woken),
                Err(conflict)
                    if patience == Patience::WithEngine
                        && self.ends(&locks, &request, conflict) =>
                {
                    return self.wait_for_engine(locks, request, waiter);
                }
                Err(conflict) => {
                    let by_applier = is_kept_out(&locks, conflict);
                    drop(locks);
                    return self.keep_out(waiter, by_applier);
                }
            },
        };
        drop(locks);
        self.conclude(outcome);
    }

    fn wait_for_engine(&self, mut locks: MutexGuard<'_, Table>, request: Request, waiter: Waiter) {
        let id = next_ino();
        let outcome = locks.lock_or_wait(request, Waiter { id: Some(id), ..waiter });
        drop(locks);
        if let Outcome::Waiting = outcome
            && self.shared.brief.add(&self.me, id).is_err()
        {
            self.end_wait(id);
        }
        self.conclude(outcome);
    }

    fn conclude(&self, outcome: Outcome<Waiter>) {
        match outcome {
            Outcome::Locked(granted, woken) => {
                self.granted(granted);
                self.wake(woken);
            }
            Outcome::Waiting => {}
            Outcome::Deadlock(Waiter { patience: Patience::Any(_), answer, .. }) => {
                answer(Err(Refusal::Os(libc::EDEADLK)));
            }
            Outcome::Deadlock(waiter) => (waiter.answer)(Err(Refusal::WouldBlock)),
        }
    }

    /// Refuses a call, perhaps because of what the applier holds.
    fn keep_out(&self, waiter: Waiter, by_applier: bool) {
        if by_applier {
            self.inbox.note_kept_out();
        }
        (waiter.answer)(Err(Refusal::WouldBlock));
    }

    /// Whether what stands in the way is held by the engine, which waits for no client and gives it back
    /// soon, and whether SQLite has no better way than to wait. In WAL mode it has for what belongs to a
    /// checkpoint.
    fn ends(&self, locks: &Table, request: &Request, conflict: Conflict) -> bool {
        let works = match conflict.owner {
            Owner::READ => true,
            Owner::APPLY => !self.inbox.is_left(),
            _ => false,
        };
        let is_rollback = || self.view().mode == JournalMode::Rollback;
        works
            && !locks.waits(conflict.owner)
            && match conflict.lock {
                Lock::Write => true,
                Lock::Pending | Lock::Reserved | Lock::Shared => {
                    request.kind == LockKind::Shared || is_rollback()
                }
                _ => false,
            }
    }

    /// The time of a call that waits for the engine is over, if it still waits.
    pub(in crate::engine) fn end_wait(&self, id: u64) {
        if self.cancel(|waiter| waiter.id == Some(id), Refusal::WouldBlock) {
            self.inbox.note_kept_out();
        }
    }

    /// Gives locks up and calls `done`; giving up WRITE is a commit. SQLite takes no error for an
    /// answer here. So a commit while the lease is not confirmed is answered, and its lock released,
    /// when the lease is confirmed again or lost.
    pub fn unlock(&self, owner: Owner, set: LockSet, done: impl FnOnce() + Send + 'static) {
        if !self.ends_writing(owner, set) {
            self.release(owner, set);
            return done();
        }
        let (cut, last_frame) = self.capture_of_writer();
        // What was taken and not committed here will come from the primary.
        self.settle();
        if let Some(cut) = cut {
            return self.release_after(cut, owner, set, done);
        }
        let committed = self.has_committed();
        if committed {
            self.offer_mark(last_frame);
        }
        if committed
            && self.shared.is_fenced()
            && let Some(me) = self.me.upgrade()
        {
            return self.shared.fence.when_settled(move |settled| {
                if settled == Settled::Lost {
                    me.note_commit_without_lease();
                }
                me.release(owner, set);
                done();
            });
        }
        self.release(owner, set);
        done();
    }

    /// Gives up what an owner that is gone has locked.
    fn unlock_gone(&self, owner: Owner, set: LockSet) {
        if !self.ends_writing(owner, set) {
            return self.release(owner, set);
        }
        let cut = self.capture_of_gone_writer();
        self.settle();
        match cut {
            Some(cut) => self.release_after(cut, owner, set, || ()),
            None => self.release(owner, set),
        }
    }

    /// Whether giving up `set` ends a transaction of the WAL.
    fn ends_writing(&self, owner: Owner, set: LockSet) -> bool {
        set.contains(Lock::Write) && self.holds_exclusively(owner, Lock::Write)
    }

    /// Whether something was committed since WRITE was last granted.
    fn has_committed(&self) -> bool {
        self.counters.commits.load(Ordering::Relaxed) != self.write_began.load(Ordering::Relaxed)
    }

    fn note_commit_without_lease(&self) {
        tracing::error!(
            db = %self.name, pos = %self.pos(),
            "a commit ended after the lease was lost: SQLite reported success, but unless the new \
             primary has it, it will be set aside in lost+found"
        );
    }

    /// A descriptor was closed: all POSIX locks of its owner on that file, `set`, go.
    pub fn flush(&self, owner: Owner, set: LockSet) {
        let held = self.locks.lock().unwrap().held_by(owner).and(set);
        if held.is_empty() {
            return;
        }
        if held.contains(Lock::Shared) && self.is_locked_exclusively() {
            // An exclusive connection may have committed without ever releasing WRITE.
            self.capture_wal();
        }
        self.unlock_gone(owner, held);
    }

    /// An open file was closed for good: what was locked through it goes.
    pub fn release_handle(&self, via: Handle) {
        let owners = self.locks.lock().unwrap().owners_via(via);
        for (owner, set) in owners {
            self.unlock_gone(owner, set);
        }
    }

    /// What stands in the way of a call.
    pub fn query(&self, request: &Request) -> Option<Conflict> {
        self.locks.lock().unwrap().query(request.owner, request.set, request.kind)
    }

    /// Ends the waiting lock call with that id; `false` if there is none.
    pub fn interrupt(&self, id: u64) -> bool {
        self.cancel(|waiter| waiter.id == Some(id), Refusal::Interrupted)
    }

    /// Ends all waiting for locks for the applier.
    pub(in crate::engine) fn interrupt_applier(&self) {
        while self.cancel(|waiter| waiter.owner == Owner::APPLY, Refusal::Interrupted) {}
    }

    fn cancel(&self, is_it: impl FnMut(&Waiter) -> bool, refusal: Refusal) -> bool {
        let cancelled = self.locks.lock().unwrap().cancel(is_it);
        let Some((waiter, woken)) = cancelled else { return false };
        (waiter.answer)(Err(refusal));
        self.wake(woken);
        true
    }

    /// What can fail at a commit is checked here, because SQLite ignores errors of the unlock.
    fn admit(&self, request: &Request) -> Result<(), Refusal> {
        if request.kind != LockKind::Exclusive {
            return Ok(());
        }
        if request.set.contains(Lock::Reserved)
            && let Ok(mut change) = self.change.try_lock()
        {
            // The new writer may have no journal at all.
            self.forget_cold_journal(&mut change);
        }
        if !self.may_write() {
            let journal = request.set.contains(Lock::Reserved);
            if self.is_lent() && (journal || request.set.contains(Lock::Write)) {
                return Err(Refusal::WouldBlock);
            }
            if request.set.contains(Lock::Write) {
                self.note_refused_write();
                return Err(Refusal::WouldBlock);
            }
            // Where the wal-index is out of sight nobody writes into it but the applier, not even the
            // mark of a reader.
            if !self.shared.is_passthrough() && !request.set.and(LockSet::MARKS).is_empty() {
                return Err(Refusal::WouldBlock);
            }
        }
        let writes = request.set.contains(Lock::Write) || request.set.contains(Lock::Reserved);
        // A new primary first applies what it has received.
        let is_behind =
            self.may_write() && (self.is_behind() || self.has_strays.load(Ordering::SeqCst));
        let refused = || self.shared.is_fenced() || self.refuses_writers() || self.shared.is_full();
        if writes && (is_behind || (refused() && !self.builds_index(request.set))) {
            return Err(Refusal::WouldBlock);
        }
        Ok(())
    }

    /// Whether WRITE is wanted to build the wal-index, as the first reader of a WAL does. Nobody can
    /// commit before that is done, so readers get in where writers must not. Without passthrough nobody
    /// can tell; what is then written to the WAL is refused.
    fn builds_index(&self, set: LockSet) -> bool {
        let unseen = !self.shared.is_passthrough() && self.view().mode == JournalMode::Wal;
        set.contains(Lock::Write)
            && self.refuse_lost().is_ok()
            && (unseen || (self.shared.is_passthrough() && matches!(self.needs_index(), Ok(true))))
    }

    /// Whether it has become too late to begin a transaction, or is too early. Asked when the lock is held, so that
    /// who waits for the last writer after that misses none.
    fn is_too_late(&self, grant: &Grant) -> bool {
        let gained = grant.gained();
        let (wal, journal) = (gained.contains(Lock::Write), gained.contains(Lock::Reserved));
        if wal && self.has_uncut.load(Ordering::SeqCst) {
            if !self.has_failed() {
                self.try_again();
            }
            return true;
        }
        grant.request().kind == LockKind::Exclusive
            && match self.shared.writing() {
                Writing::Allowed => self.is_lent() && (wal || journal),
                Writing::Finishing => wal || journal,
                // See `admit`.
                Writing::Refused => wal && !self.is_borrowed(),
            }
    }

    /// Answers those who were waiting. Not with the right to change, which they may want.
    pub(in crate::engine) fn wake(&self, woken: Woken<Waiter>) {
        for granted in woken {
            self.granted(granted);
        }
    }

    /// A lock was granted: answers, at once or when the chain is durable.
    fn granted(&self, granted: Granted<Waiter>) {
        let Granted { waiter, grant } = granted;
        let client = matches!(grant.request().owner, Owner::Client(_));
        // Much may have changed since it was asked for.
        let is_late = waiter.id.is_some() && waiter.patience == Patience::WithEngine;
        let is_refused = is_late && self.admit(grant.request()).is_err();
        if client && (is_refused || self.is_too_late(&grant)) {
            let woken = self.locks.lock().unwrap().undo(grant);
            (waiter.answer)(Err(Refusal::WouldBlock));
            return self.wake(woken);
        }
        if client && grant.gained().contains(Lock::Write) {
            let commits = self.counters.commits.load(Ordering::Relaxed);
            self.write_began.store(commits, Ordering::Relaxed);
        }
        if !client || !self.is_barrier(&grant) {
            return (waiter.answer)(Ok(()));
        }
        let set = grant.request().set;
        if !set.contains(Lock::Write) {
            // What an exclusive connection committed without ever releasing WRITE.
            let captured = match self.has_failed() && !set.contains(Lock::Recover) {
                true => self.try_capture(),
                false => self.capture_wal(),
            };
            // RECOVER goes with a new wal-index, which may be what capture needs; it moves no frame.
            if captured == Captured::Failed && !set.contains(Lock::Recover) {
                let woken = self.locks.lock().unwrap().undo(grant);
                (waiter.answer)(Err(Refusal::WouldBlock));
                return self.wake(woken);
            }
        }
        let me = self.me.clone();
        let done = Box::new(move |result: Result<(), String>| match (result, me.upgrade()) {
            (Err(_), Some(db)) => {
                let woken = db.locks.lock().unwrap().undo(grant);
                (waiter.answer)(Err(Refusal::WouldBlock));
                db.wake(woken);
            }
            _ => (waiter.answer)(Ok(())),
        });
        self.when_durable(self.pos().txid, done);
    }

    /// Whether frames may be moved or overwritten under this grant.
    fn is_barrier(&self, grant: &Grant) -> bool {
        let request = grant.request();
        if request.kind != LockKind::Exclusive {
            return false;
        }
        let set = request.set;
        let restart = set.contains(Lock::Read1) && set.contains(Lock::Read4);
        let whole = set.contains(Lock::Shared) && self.view().mode == JournalMode::Wal;
        restart || whole || set.contains(Lock::Ckpt)
    }

    /// Unlocks and answers who was waiting for it.
    pub(in crate::engine) fn release(&self, owner: Owner, set: LockSet) {
        let woken = self.locks.lock().unwrap().unlock(owner, set);
        self.wake(woken);
    }

    fn holds_exclusively(&self, owner: Owner, lock: Lock) -> bool {
        self.locks.lock().unwrap().holds(owner, lock) == Some(LockKind::Exclusive)
    }

    /// Whether somebody may write the database file under a journal.
    pub(in crate::engine) fn has_writer(&self) -> bool {
        let locks = self.locks.lock().unwrap();
        let exclusive = Some(LockKind::Exclusive);
        locks.held(Lock::Reserved) == exclusive || locks.held(Lock::Shared) == exclusive
    }

    /// Whether a client has begun a transaction with a journal.
    pub(in crate::engine) fn is_reserved(&self) -> bool {
        self.client_holder(Lock::Reserved).is_some()
    }

    /// Whether a client holds EXCLUSIVE on the database file.
    pub(in crate::engine) fn is_locked_exclusively(&self) -> bool {
        self.client_holder(Lock::Shared).is_some()
    }

    /// Whether the client that writes a transaction into the WAL has its locks through this open file.
    pub(in crate::engine) fn holds_write_through(&self, via: Handle) -> bool {
        self.client_holder(Lock::Write) == Some(via)
    }

    /// Whether a client writes a transaction into the WAL.
    pub(in crate::engine) fn is_written(&self) -> bool {
        self.client_holder(Lock::Write).is_some()
    }

    /// The open file through which a client holds `lock` exclusively, if one does.
    fn client_holder(&self, lock: Lock) -> Option<Handle> {
        let holder = self.locks.lock().unwrap().exclusive_holder(lock);
        holder.and_then(|(owner, via)| matches!(owner, Owner::Client(_)).then_some(via))
    }

    /// Whether a client may write to the database file from the WAL.
    pub(in crate::engine) fn is_checkpointing(&self) -> bool {
        let locks = self.locks.lock().unwrap();
        let held = [Lock::Ckpt, Lock::Shared].map(|lock| locks.exclusive_holder(lock));
        held.into_iter().flatten().any(|(owner, _)| matches!(owner, Owner::Client(_)))
    }

    /// Whether somebody has the wal-index open.
    pub(in crate::engine) fn has_index_user(&self) -> bool {
        self.locks.lock().unwrap().held(Lock::Dms).is_some()
    }

    /// Whether a client is connected in WAL mode, or reads in rollback mode.
    pub(in crate::engine) fn has_clients(&self) -> bool {
        let locks = self.locks.lock().unwrap();
        let mut holders = locks.holders(Lock::Shared).chain(locks.holders(Lock::Dms));
        holders.any(|(owner, _)| matches!(owner, Owner::Client(_)))
    }

    /// The files that clients have locked are gone: nothing of their locks is left.
    pub(in crate::engine) fn forget_clients(&self) {
        let is_client = |owner| matches!(owner, Owner::Client(_));
        // Nor of those for which they wait: SQLite asks again, and finds its file gone.
        while self.cancel(|waiter| is_client(waiter.owner), Refusal::WouldBlock) {}
        let woken = self.locks.lock().unwrap().release_all(is_client);
        self.wake(woken);
    }

    /// Gives up what the owner of `request` has locked of its set, through this very open file.
    pub fn unlock_handle(&self, request: &Request) {
        let held = self.locks.lock().unwrap().owners_via(request.via);
        for (owner, set) in held.into_iter().filter(|(owner, _)| *owner == request.owner) {
            self.unlock_gone(owner, set.and(request.set));
        }
    }

    /// Takes locks for the engine, waiting at most `limit`; an error if that was not enough.
    pub(in crate::engine) fn take(
        &self,
        owner: Owner,
        set: LockSet,
        kind: LockKind,
        limit: Duration,
    ) -> Result<()> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let answer: Answer = Box::new(move |result| {
            let _ = sender.send(result);
        });
        let request = Request { owner, via: Handle::NONE, set, kind };
        let id = next_ino();
        let waiter = Waiter { id: Some(id), owner, patience: Patience::Any(id), answer };
        let outcome = self.locks.lock().unwrap().lock_or_wait(request, waiter);
        let granted = match outcome {
            Outcome::Locked(_, woken) => {
                self.wake(woken);
                true
            }
            Outcome::Waiting => match receiver.recv_timeout(limit) {
                Ok(result) => result.is_ok(),
                // Taken out of the queue, or granted in this very moment.
                Err(_) => !self.interrupt(id) && matches!(receiver.recv(), Ok(Ok(()))),
            },
            Outcome::Deadlock(_) => false,
        };
        granted.then_some(()).ok_or_else(|| self.busy("its locks are not released"))
    }

    /// Takes locks for the engine if they are free.
    pub(in crate::engine) fn try_take(&self, owner: Owner, set: LockSet, kind: LockKind) -> bool {
        let request = Request { owner, via: Handle::NONE, set, kind };
        let taken = self.locks.lock().unwrap().try_lock(request);
        match taken {
            Ok((_, woken)) => {
                self.wake(woken);
                true
            }
            Err(_) => false,
        }
    }

    /// Releases `set` of `owner`, which holds it, when the guard is dropped.
    pub(in crate::engine) fn guard(&self, owner: Owner, set: LockSet) -> Guard<'_> {
        Guard { db: self, owner, set, pins: false }
    }

    /// The whole database for the engine, if nobody has anything of it locked.
    pub(in crate::engine) fn lock_everything_now(&self) -> Option<Guard<'_>> {
        let set = Lock::ALL.into_iter().collect();
        self.try_take(Owner::DROP, set, LockKind::Exclusive).then(|| self.guard(Owner::DROP, set))
    }
}

/// Whether the applier keeps a client out of the database. It does not by a single mark, which it moves: SQLite
/// looks for another one at once.
fn is_kept_out(locks: &Table, conflict: Conflict) -> bool {
    let moves_mark = || {
        let has_database = locks.holds(Owner::APPLY, Lock::Read0).is_some();
        LockSet::MARKS.contains(conflict.lock) && !has_database
    };
    conflict.owner == Owner::APPLY && !moves_mark()
}
