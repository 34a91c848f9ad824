//! Sequences of lock calls against the plainest model: for each owner and lock how it is held and
//! through which open file, and a list of who waits.

use std::collections::BTreeMap;

use crate::engine::locks::{
    Grant, Granted, Handle, LockKind, LockTable, Outcome, Owner, Request, Woken,
};
use crate::sqlite::lock_byte::{Lock, LockFile, LockSet};

/// The owners that take part.
const OWNERS: [Owner; 4] = [Owner::Client(1), Owner::Client(2), Owner::Client(3), Owner::APPLY];
/// Waiters at a time.
const WAITERS_MAX: usize = 6;

#[derive(Default)]
struct Model {
    held: BTreeMap<(Owner, u16), (LockKind, Handle)>,
    /// Waiters in the order in which they came, by number.
    waiting: Vec<(u64, Request)>,
}

impl Model {
    fn kind(&self, owner: Owner, lock: Lock) -> Option<LockKind> {
        self.held.get(&(owner, lock as u16)).map(|(kind, _)| *kind)
    }

    /// Whether something that is held keeps a request from its locks.
    fn is_blocked(&self, request: &Request) -> bool {
        !self.blockers(request).is_empty()
    }

    /// Who keeps a request from its locks by what they hold.
    fn blockers(&self, request: &Request) -> Vec<Owner> {
        let Request { owner, set, kind, .. } = *request;
        let is_exclusive = |kind| kind == LockKind::Exclusive;
        let others = self.held.iter().filter(|((other, _), _)| *other != owner);
        let mut blockers: Vec<Owner> = others
            .filter(|((_, lock), (held, _))| {
                let asked = set.iter().any(|asked| asked as u16 == *lock);
                asked && (is_exclusive(kind) || is_exclusive(*held))
            })
            .map(|((other, _), _)| *other)
            .collect();
        blockers.dedup();
        blockers
    }

    fn set(&mut self, request: &Request) {
        for lock in request.set.iter() {
            self.held.insert((request.owner, lock as u16), (request.kind, request.via));
        }
    }

    fn unlock(&mut self, owner: Owner, set: LockSet) {
        let is_given = |lock| set.iter().any(|given| given as u16 == lock);
        self.held.retain(|(other, lock), _| *other != owner || !is_given(*lock));
    }

    /// What was locked through `via`.
    fn locked_via(&self, via: Handle) -> Vec<(Owner, u16)> {
        let held = self.held.iter().filter(|(_, (_, other))| *other == via);
        held.map(|(key, _)| *key).collect()
    }

    fn undo(&mut self, grant: &Grant, before: &BTreeMap<(Owner, u16), (LockKind, Handle)>) {
        let Request { owner, .. } = *grant.request();
        for lock in grant.gained().iter() {
            let key = (owner, lock as u16);
            match before.get(&key) {
                None => _ = self.held.remove(&key),
                Some((kind, _)) => {
                    if let Some((now, _)) = self.held.get_mut(&key) {
                        *now = *kind;
                    }
                }
            }
        }
    }
}

/// Plays the calls that the bytes say.
pub fn locks(bytes: &[u8]) {
    let mut table: LockTable<u64> = LockTable::default();
    let mut model = Model::default();
    for (number, call) in (0..).zip(bytes.chunks_exact(4)) {
        step(&mut table, &mut model, number, [call[0], call[1], call[2], call[3]]);
        compare(&table, &model);
    }
}

fn step(table: &mut LockTable<u64>, model: &mut Model, number: u64, call: [u8; 4]) {
    let [verb, who, from, len] = call;
    let owner = OWNERS[usize::from(who % 4)];
    let via = Handle(u64::from(who / 4 % 4));
    let kind = if who & 16 == 0 { LockKind::Shared } else { LockKind::Exclusive };
    let file = if who & 32 == 0 { LockFile::Database } else { LockFile::Shm };
    let base = if file == LockFile::Shm { 119 } else { 0x3fff_ffff };
    let start = base + u64::from(from % 12);
    let set = LockSet::in_range(file, start, start + u64::from(len % 6));
    let request = Request { owner, via, set, kind };
    let woken = match verb % 12 {
        0..4 => {
            let expected = model.is_blocked(&request);
            match table.try_lock(request) {
                Ok((_, woken)) => {
                    assert!(!expected, "{request:?} was granted");
                    model.set(&request);
                    woken
                }
                Err(conflict) => {
                    assert!(expected, "{request:?} was refused");
                    assert!(model.blockers(&request).contains(&conflict.owner));
                    Vec::new()
                }
            }
        }
        4..6 if model.waiting.len() < WAITERS_MAX => {
            let expected = model.is_blocked(&request);
            match table.lock_or_wait(request, number) {
                Outcome::Locked(granted, woken) => {
                    assert!(!expected, "{request:?} was granted");
                    assert_eq!(granted.waiter, number);
                    model.set(&request);
                    woken
                }
                Outcome::Waiting => {
                    model.waiting.push((number, request));
                    Vec::new()
                }
                Outcome::Deadlock(waiter) => {
                    assert_eq!(waiter, number);
                    assert!(!model.waiting.is_empty(), "nobody waits");
                    Vec::new()
                }
            }
        }
        6 if model.waiting.len() > usize::from(from % 4) => {
            let (waiter, _) = model.waiting.remove(usize::from(from % 4));
            let (found, woken) = table.cancel(|found| *found == waiter).expect("it waits");
            assert_eq!(found, waiter);
            woken
        }
        7 => {
            // A descriptor was closed.
            let held = table.held_by(owner).and(LockSet::file(file));
            model.unlock(owner, LockSet::file(file));
            table.unlock(owner, held)
        }
        8 => {
            // An open file was closed for good.
            let owners = table.owners_via(via);
            let each = |(owner, set): &(Owner, LockSet)| {
                set.iter().map(|lock| (*owner, lock as u16)).collect::<Vec<_>>()
            };
            let mut locked: Vec<_> = owners.iter().flat_map(each).collect();
            locked.sort();
            assert_eq!(locked, model.locked_via(via));
            for (owner, set) in owners {
                model.unlock(owner, set);
                answer(model, table.unlock(owner, set));
            }
            Vec::new()
        }
        9 if len % 8 == 1 => {
            model.unlock(owner, LockSet::ALL);
            table.release_all(|other| other == owner)
        }
        10 => {
            let before = model.held.clone();
            match table.try_lock(request) {
                Ok((grant, woken)) => {
                    model.set(&request);
                    answer(model, woken);
                    compare(table, model);
                    model.undo(&grant, &before);
                    table.undo(grant)
                }
                Err(_) => Vec::new(),
            }
        }
        _ => {
            model.unlock(owner, set);
            table.unlock(owner, set)
        }
    };
    answer(model, woken);
}

/// Those who were woken may have their locks, one after the other.
fn answer(model: &mut Model, woken: Woken<u64>) {
    for Granted { waiter, grant } in woken {
        let at = model.waiting.iter().position(|(number, _)| *number == waiter);
        let (_, request) = model.waiting.remove(at.expect("it waited"));
        assert_eq!(*grant.request(), request);
        assert!(!model.is_blocked(&request), "{request:?} was granted");
        model.set(&request);
    }
}

fn compare(table: &LockTable<u64>, model: &Model) {
    assert_eq!(table.waiting(), model.waiting.len());
    for lock in Lock::ALL {
        for owner in OWNERS {
            assert_eq!(table.holds(owner, lock), model.kind(owner, lock), "{lock} of {owner:?}");
        }
        let exclusive =
            OWNERS.iter().filter(|&&owner| model.kind(owner, lock) == Some(LockKind::Exclusive));
        let holders = OWNERS.iter().filter(|&&owner| model.kind(owner, lock).is_some()).count();
        assert!(exclusive.count() == 0 || holders == 1, "{lock} is shared and exclusive");
    }
    if let Some((_, first)) = model.waiting.first() {
        assert!(model.is_blocked(first), "the first in the queue could go on");
    }
}
