//! The locks of one database: who holds which, and who waits.
//!
//! A pure state machine, used under the database's mutex. Clients lock byte ranges of the database
//! file and the wal-index as POSIX says; here a range has become a [`LockSet`]. The engine itself
//! (apply, checkpoint, snapshot) competes as one more owner.
//!
//! Rules, for each pair of owner and lock:
//! * shared is granted if no other owner holds it exclusively, exclusive if no other holds it at all;
//! * asking again for what is held is fine; shared on top of exclusive is a downgrade, exclusive on
//!   top of shared an upgrade;
//! * a request for several locks gets all or none.
//!
//! Waiters are granted first come first served: one that conflicts with an earlier one stays behind
//! it, unless its owner already holds one of the locks (an upgrade must not wait for those who wait
//! for it). A request that does not wait takes what is free and heeds no queue, as F_SETLK does.
//!
//! **A grant that must wait for something else** (a commit that must be durable, a peer) is taken
//! at once and answered later: keep the reply together with the [`Grant`]; nobody else can get the
//! locks meanwhile. Then answer, or take it back with [`LockTable::undo`], which leaves the owner
//! what it had before. The same holds for grants that a release gives to waiters.
//!
//! Invariant: of each lock there is either one exclusive holder or any number of shared ones, and no
//! owner is among them twice. Nothing allocates as long as there are few holders and no waiters.

use std::collections::VecDeque;

use crate::sqlite::lock_byte::{Lock, LockSet};

/// Who holds locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    /// A process, or an open file (OFD locks), by the number that the kernel gave it.
    Client(u64),
    /// A part of the engine, by a number that the engine gave it.
    Internal(u64),
}

impl Owner {
    /// Whoever applies what comes from the primary.
    pub const APPLY: Owner = Owner::Internal(1);
    /// Whoever reads a whole database, for a snapshot or an export.
    pub const READ: Owner = Owner::Internal(2);
    /// Whoever removes a database.
    pub const DROP: Owner = Owner::Internal(3);
    /// Whoever waits until nobody writes.
    pub const DRAIN: Owner = Owner::Internal(4);
    /// Whoever lends the database to another node.
    pub const LEND: Owner = Owner::Internal(5);
    /// Whoever moves a read mark for readers to come.
    pub const MARK: Owner = Owner::Internal(6);

    /// A process or an open file by the kernel's number.
    pub fn client(number: u64) -> Owner {
        Owner::Client(number)
    }
}

/// The open file through which a lock was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handle(pub u64);

impl Handle {
    /// No open file: what the engine's own locks are taken through.
    pub const NONE: Handle = Handle(u64::MAX);
}

/// How a lock is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LockKind {
    /// Together with others (F_RDLCK).
    Shared,
    /// Alone (F_WRLCK).
    Exclusive,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// By whom.
    pub owner: Owner,
    /// Through which open file.
    pub via: Handle,
    /// Which locks.
    pub set: LockSet,
    /// How.
    pub kind: LockKind,
}

/// What stands in the way of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conflict {
    /// The first lock that cannot be had.
    pub lock: Lock,
    /// Who holds it.
    pub owner: Owner,
    /// How.
    pub kind: LockKind,
}

/// A request that was granted, and what its owner held before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    request: Request,
    /// The locks that it did not hold.
    new: LockSet,
    /// The locks that it held shared and now holds exclusively.
    upgraded: LockSet,
}

impl Grant {
    /// What was granted.
    pub fn request(&self) -> &Request {
        &self.request
    }

    /// The locks that the owner did not hold in this way before.
    pub fn gained(&self) -> LockSet {
        self.new.iter().chain(self.upgraded.iter()).collect()
    }
}

/// A waiter that got its locks: answer it.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a waiter wants its answer"]
pub struct Granted<W> {
    /// Who waited.
    pub waiter: W,
    /// What it holds now.
    pub grant: Grant,
}

/// Waiters that got their locks, in the order of the queue.
pub type Woken<W> = Vec<Granted<W>>;

/// The outcome of a request that may wait.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a waiter wants its answer"]
pub enum Outcome<W> {
    /// Granted at once; a downgrade may have freed others.
    Locked(Granted<W>, Woken<W>),
    /// In the queue.
    Waiting,
    /// Refused: the owners who are in the way wait, in the end, for this one (EDEADLK).
    Deadlock(W),
}

#[derive(Debug, Clone, Copy)]
struct Holder {
    owner: Owner,
    via: Handle,
}

/// The holders of one lock.
#[derive(Debug, Default)]
struct LockState {
    exclusive: Option<Holder>,
    shared: Vec<Holder>,
}

impl LockState {
    fn holders(&self) -> impl Iterator<Item = (&Holder, LockKind)> {
        let exclusive = self.exclusive.iter().map(|holder| (holder, LockKind::Exclusive));
        exclusive.chain(self.shared.iter().map(|holder| (holder, LockKind::Shared)))
    }

    fn kind_of(&self, owner: Owner) -> Option<LockKind> {
        self.holders().find(|(holder, _)| holder.owner == owner).map(|(_, kind)| kind)
    }

    /// The holders that keep `owner` from having it as `kind`.
    fn in_the_way(&self, owner: Owner, kind: LockKind) -> impl Iterator<Item = (Owner, LockKind)> {
        self.holders()
            .filter(move |(holder, held)| holder.owner != owner && conflict(kind, *held))
            .map(|(holder, held)| (holder.owner, held))
    }

    fn set(&mut self, holder: Holder, kind: LockKind) {
        self.clear(holder.owner);
        match kind {
            LockKind::Exclusive => self.exclusive = Some(holder),
            LockKind::Shared => self.shared.push(holder),
        }
    }

    fn clear(&mut self, owner: Owner) {
        self.retain(|holder| holder.owner != owner);
    }

    fn retain(&mut self, keep: impl Fn(&Holder) -> bool) {
        self.exclusive = self.exclusive.filter(&keep);
        self.shared.retain(keep);
    }
}

fn conflict(one: LockKind, other: LockKind) -> bool {
    one == LockKind::Exclusive || other == LockKind::Exclusive
}

#[derive(Debug)]
struct Waiting<W> {
    request: Request,
    waiter: W,
}

/// The locks of one database. `W` is what a waiting request leaves behind to be answered.
#[derive(Debug)]
pub struct LockTable<W> {
    locks: [LockState; Lock::ALL.len()],
    queue: VecDeque<Waiting<W>>,
}

impl<W> Default for LockTable<W> {
    /// A table in which nobody holds anything.
    fn default() -> LockTable<W> {
        LockTable { locks: Default::default(), queue: VecDeque::new() }
    }
}

impl<W> LockTable<W> {
    /// Takes all locks of the request, or none. A downgrade may free waiters.
    pub fn try_lock(&mut self, request: Request) -> Result<(Grant, Woken<W>), Conflict> {
        match self.conflict(&request) {
            Some(conflict) => Err(conflict),
            None => Ok(self.take(request)),
        }
    }

    /// Takes all locks of the request, or queues it until [`LockTable`] hands `waiter` back.
    pub fn lock_or_wait(&mut self, request: Request, waiter: W) -> Outcome<W> {
        if self.conflict(&request).is_none() && !self.is_behind(&request, self.queue.len()) {
            let (grant, woken) = self.take(request);
            return Outcome::Locked(Granted { waiter, grant }, woken);
        }
        if self.is_deadlock(&request) {
            return Outcome::Deadlock(waiter);
        }
        self.queue.push_back(Waiting { request, waiter });
        Outcome::Waiting
    }

    /// Gives up what `owner` holds of `set`.
    pub fn unlock(&mut self, owner: Owner, set: LockSet) -> Woken<W> {
        for lock in set.iter() {
            self.state_mut(lock).clear(owner);
        }
        self.wake()
    }

    /// Gives up everything that the owners for whom `is_it` holds have locked.
    pub fn release_all(&mut self, is_it: impl Fn(Owner) -> bool) -> Woken<W> {
        for state in &mut self.locks {
            state.retain(|holder| !is_it(holder.owner));
        }
        self.wake()
    }

    /// Takes a grant back: its owner holds what it held before, as far as it has not given that up
    /// since. A downgrade stays.
    pub fn undo(&mut self, grant: Grant) -> Woken<W> {
        let Request { owner, via, .. } = grant.request;
        for lock in grant.new.iter() {
            self.state_mut(lock).clear(owner);
        }
        for lock in grant.upgraded.iter() {
            if self.holds(owner, lock) == Some(LockKind::Exclusive) {
                self.state_mut(lock).set(Holder { owner, via }, LockKind::Shared);
            }
        }
        self.wake()
    }

    /// Takes the first waiter out of the queue for which `is_it` holds; those behind it may go on.
    pub fn cancel(&mut self, is_it: impl FnMut(&W) -> bool) -> Option<(W, Woken<W>)> {
        let at = self.queue.iter().map(|waiting| &waiting.waiter).position(is_it)?;
        let waiting = self.queue.remove(at)?;
        Some((waiting.waiter, self.wake()))
    }

    /// What would stand in the way of `owner` now (F_GETLK).
    pub fn query(&self, owner: Owner, set: LockSet, kind: LockKind) -> Option<Conflict> {
        set.iter().find_map(|lock| {
            let (owner, kind) = self.state(lock).in_the_way(owner, kind).next()?;
            Some(Conflict { lock, owner, kind })
        })
    }

    /// How `owner` holds `lock`.
    pub fn holds(&self, owner: Owner, lock: Lock) -> Option<LockKind> {
        self.state(lock).kind_of(owner)
    }

    /// What `owner` holds, in either way.
    pub fn held_by(&self, owner: Owner) -> LockSet {
        LockSet::ALL.iter().filter(|&lock| self.holds(owner, lock).is_some()).collect()
    }

    /// Whether `owner` holds any of `set`.
    pub fn holds_any(&self, owner: Owner, set: LockSet) -> bool {
        set.iter().any(|lock| self.holds(owner, lock).is_some())
    }

    /// What was last taken through `via`, by owner: to be given up when that is closed for good (RELEASE).
    pub fn owners_via(&self, via: Handle) -> Vec<(Owner, LockSet)> {
        let mut owners: Vec<(Owner, LockSet)> = Vec::new();
        for lock in Lock::ALL {
            for (holder, _) in self.state(lock).holders().filter(|(holder, _)| holder.via == via) {
                match owners.iter_mut().find(|(owner, _)| *owner == holder.owner) {
                    Some((_, set)) => *set = set.with(lock),
                    None => owners.push((holder.owner, LockSet::one(lock))),
                }
            }
        }
        owners
    }

    /// How `lock` is held by anyone.
    pub fn held(&self, lock: Lock) -> Option<LockKind> {
        self.state(lock).holders().next().map(|(_, kind)| kind)
    }

    /// Who holds `lock` exclusively, and through which open file.
    pub fn exclusive_holder(&self, lock: Lock) -> Option<(Owner, Handle)> {
        self.state(lock).exclusive.map(|holder| (holder.owner, holder.via))
    }

    /// Everybody who holds `lock`.
    pub fn holders(&self, lock: Lock) -> impl Iterator<Item = (Owner, LockKind)> {
        self.state(lock).holders().map(|(holder, kind)| (holder.owner, kind))
    }

    /// Whether a request of `owner` waits.
    pub fn waits(&self, owner: Owner) -> bool {
        self.queue.iter().any(|waiting| waiting.request.owner == owner)
    }

    /// How many requests wait.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    fn state(&self, lock: Lock) -> &LockState {
        &self.locks[lock as usize]
    }

    fn state_mut(&mut self, lock: Lock) -> &mut LockState {
        &mut self.locks[lock as usize]
    }

    fn conflict(&self, request: &Request) -> Option<Conflict> {
        self.query(request.owner, request.set, request.kind)
    }

    /// Gives the request its locks; there is no conflict.
    fn take(&mut self, request: Request) -> (Grant, Woken<W>) {
        let Request { owner, via, set, kind } = request;
        let mut grant = Grant { request, new: LockSet::EMPTY, upgraded: LockSet::EMPTY };
        let mut downgraded = LockSet::EMPTY;
        for lock in set.iter() {
            match (self.holds(owner, lock), kind) {
                (None, _) => grant.new = grant.new.with(lock),
                (Some(LockKind::Shared), LockKind::Exclusive) => {
                    grant.upgraded = grant.upgraded.with(lock)
                }
                (Some(LockKind::Exclusive), LockKind::Shared) => downgraded = downgraded.with(lock),
                _ => {}
            }
            self.state_mut(lock).set(Holder { owner, via }, kind);
        }
        let woken = if downgraded.is_empty() { Vec::new() } else { self.wake() };
        (grant, woken)
    }

    /// Grants what can be granted, in order.
    fn wake(&mut self) -> Woken<W> {
        let mut woken = Vec::new();
        let mut at = 0;
        while let Some(waiting) = self.queue.get(at) {
            let request = waiting.request;
            if self.conflict(&request).is_some() || self.is_behind(&request, at) {
                at += 1;
                continue;
            }
            let Some(Waiting { waiter, .. }) = self.queue.remove(at) else { break };
            let (grant, more) = self.take(request);
            woken.push(Granted { waiter, grant });
            woken.extend(more);
            // A downgrade has woken others, and the queue is no longer what it was.
            at = 0;
        }
        woken
    }

    /// Whether the request must stay behind one of the first `len` waiters.
    fn is_behind(&self, request: &Request, len: usize) -> bool {
        self.waiters_in_the_way(request, len).next().is_some()
    }

    fn waiters_in_the_way(&self, request: &Request, len: usize) -> impl Iterator<Item = Owner> {
        let Request { owner, set, kind, .. } = *request;
        let ahead = if len > 0 && self.holds_any(owner, set) { 0 } else { len };
        self.queue.iter().take(ahead).filter_map(move |waiting| {
            let other = &waiting.request;
            let meets = !other.set.and(set).is_empty() && conflict(kind, other.kind);
            (meets && other.owner != owner).then_some(other.owner)
        })
    }

    /// Whether, were the request queued, its owner would in the end wait for itself.
    fn is_deadlock(&self, request: &Request) -> bool {
        let mut to_visit = self.blockers(request, self.queue.len());
        let mut visited = Vec::new();
        while let Some(owner) = to_visit.pop() {
            if owner == request.owner {
                return true;
            }
            if visited.contains(&owner) {
                continue;
            }
            visited.push(owner);
            for (at, waiting) in self.queue.iter().enumerate() {
                if waiting.request.owner == owner {
                    to_visit.extend(self.blockers(&waiting.request, at));
                }
            }
        }
        false
    }

    /// The owners for whom the request waits, or would wait behind the first `len` waiters.
    fn blockers(&self, request: &Request, len: usize) -> Vec<Owner> {
        let &Request { owner, set, kind, .. } = request;
        let holders = set.iter().flat_map(|lock| self.state(lock).in_the_way(owner, kind));
        let holders = holders.map(|(owner, _)| owner);
        holders.chain(self.waiters_in_the_way(request, len)).collect()
    }
}

#[cfg(test)]
mod orders;
#[cfg(test)]
mod tests;
