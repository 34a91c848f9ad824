//! The lock table against examples, and against a plain model of POSIX byte-range locks.

use std::collections::BTreeMap;

use super::*;
use crate::sqlite::lock_byte::LockFile;
use crate::sqlite::test_rng::Rng;

const A: Owner = Owner::Client(1);
const B: Owner = Owner::Client(2);
const C: Owner = Owner::Internal(1);

type Table = LockTable<&'static str>;

fn request(owner: Owner, lock: Lock, kind: LockKind) -> Request {
    let (Owner::Client(number) | Owner::Internal(number)) = owner;
    Request { owner, via: Handle(number), set: LockSet::one(lock), kind }
}

fn shared(owner: Owner, lock: Lock) -> Request {
    request(owner, lock, LockKind::Shared)
}

fn exclusive(owner: Owner, lock: Lock) -> Request {
    request(owner, lock, LockKind::Exclusive)
}

#[track_caller]
fn lock(table: &mut Table, request: Request) -> Grant {
    let (grant, woken) = table.try_lock(request).unwrap();
    assert_eq!(woken, []);
    grant
}

#[track_caller]
fn wait(table: &mut Table, request: Request, waiter: &'static str) {
    assert_eq!(table.lock_or_wait(request, waiter), Outcome::Waiting);
}

fn names(woken: Woken<&'static str>) -> Vec<&'static str> {
    woken.into_iter().map(|granted| granted.waiter).collect()
}

#[test]
fn sharers_keep_an_exclusive_lock_out_and_the_last_one_upgrades() {
    let mut table = Table::default();
    lock(&mut table, shared(A, Lock::Shared));
    lock(&mut table, shared(B, Lock::Shared));
    let conflict = table.try_lock(exclusive(A, Lock::Shared)).unwrap_err();
    assert_eq!(conflict, Conflict { lock: Lock::Shared, owner: B, kind: LockKind::Shared });
    assert_eq!(table.holds(A, Lock::Shared), Some(LockKind::Shared));
    assert_eq!(table.unlock(B, LockSet::DATABASE), []);
    let grant = lock(&mut table, exclusive(A, Lock::Shared));
    assert_eq!(grant.gained(), LockSet::one(Lock::Shared));
    assert_eq!(table.exclusive_holder(Lock::Shared), Some((A, Handle(1))));
    assert_eq!(
        table.query(B, LockSet::DATABASE, LockKind::Shared).unwrap().kind,
        LockKind::Exclusive
    );
}

#[test]
fn a_request_gets_all_its_locks_or_none() {
    let mut table = Table::default();
    lock(&mut table, shared(A, Lock::Read3));
    let all = Request { set: LockSet::READERS, ..exclusive(B, Lock::Read0) };
    let conflict = table.try_lock(all).unwrap_err();
    assert_eq!((conflict.lock, conflict.kind), (Lock::Read3, LockKind::Shared));
    assert_eq!(table.held_by(B), LockSet::EMPTY);
    assert_eq!(table.unlock(A, LockSet::SHM), []);
    lock(&mut table, all);
    assert_eq!(table.held_by(B), LockSet::READERS);
    assert_eq!(lock(&mut table, all).gained(), LockSet::EMPTY);
}

#[test]
fn waiters_are_granted_first_come_first_served() {
    let mut table = Table::default();
    lock(&mut table, exclusive(A, Lock::Write));
    wait(&mut table, shared(B, Lock::Write), "b");
    wait(&mut table, exclusive(C, Lock::Write), "c");
    wait(&mut table, shared(Owner::Client(3), Lock::Write), "d");
    assert_eq!(names(table.unlock(A, LockSet::SHM)), ["b"]);
    assert_eq!(names(table.unlock(B, LockSet::SHM)), ["c"]);
    assert_eq!(table.holds(C, Lock::Write), Some(LockKind::Exclusive));
    assert_eq!(names(table.unlock(C, LockSet::SHM)), ["d"]);
    assert_eq!(table.waiting(), 0);
}

#[test]
fn a_request_that_may_wait_heeds_the_queue_and_one_that_may_not_does_not() {
    let mut table = Table::default();
    lock(&mut table, shared(A, Lock::Shared));
    wait(&mut table, exclusive(B, Lock::Shared), "b");
    wait(&mut table, shared(C, Lock::Shared), "c");
    let third = Owner::Client(3);
    lock(&mut table, shared(third, Lock::Shared));
    let Outcome::Locked(..) = table.lock_or_wait(shared(A, Lock::Shared), "again") else {
        panic!("what is held is granted again");
    };
    assert_eq!(names(table.unlock(third, LockSet::DATABASE)), [""; 0]);
    assert_eq!(names(table.unlock(A, LockSet::DATABASE)), ["b"]);
}

#[test]
fn an_upgrade_does_not_stay_behind_those_who_wait_for_it() {
    let mut table = Table::default();
    lock(&mut table, shared(A, Lock::Shared));
    wait(&mut table, exclusive(B, Lock::Shared), "b");
    let Outcome::Locked(..) = table.lock_or_wait(exclusive(A, Lock::Shared), "a") else {
        panic!("the only sharer upgrades");
    };
    assert_eq!(names(table.unlock(A, LockSet::DATABASE)), ["b"]);
}

#[test]
fn a_downgrade_frees_waiters() {
    let mut table = Table::default();
    lock(&mut table, exclusive(A, Lock::Dms));
    wait(&mut table, shared(B, Lock::Dms), "b");
    let (_, woken) = table.try_lock(shared(A, Lock::Dms)).unwrap();
    assert_eq!(names(woken), ["b"]);
}

#[test]
fn a_cancelled_waiter_lets_those_behind_it_go_on() {
    let mut table = Table::default();
    lock(&mut table, shared(A, Lock::Read1));
    wait(&mut table, exclusive(B, Lock::Read1), "b");
    wait(&mut table, shared(C, Lock::Read1), "c");
    let (waiter, woken) = table.cancel(|waiter| *waiter == "b").unwrap();
    assert_eq!((waiter, names(woken)), ("b", vec!["c"]));
    assert!(table.cancel(|waiter| *waiter == "b").is_none());
}

#[test]
fn a_grant_that_is_taken_back_leaves_what_was_there_before() {
    let mut table = Table::default();
    lock(&mut table, shared(A, Lock::Shared));
    let set = LockSet::of(&[Lock::Pending, Lock::Shared]);
    let grant = lock(&mut table, Request { set, ..exclusive(A, Lock::Shared) });
    assert_eq!(grant.gained(), set);
    wait(&mut table, shared(B, Lock::Shared), "b");
    assert_eq!(names(table.undo(grant)), ["b"]);
    assert_eq!(table.holds(A, Lock::Shared), Some(LockKind::Shared));
    assert_eq!(table.holds(A, Lock::Pending), None);
}

#[test]
fn a_grant_whose_owner_has_gone_brings_nothing_back() {
    let mut table = Table::default();
    lock(&mut table, shared(A, Lock::Shared));
    let grant = lock(&mut table, exclusive(A, Lock::Shared));
    assert_eq!(table.unlock(A, LockSet::DATABASE), []);
    lock(&mut table, exclusive(B, Lock::Shared));
    assert_eq!(table.undo(grant), []);
    assert_eq!(table.holds(A, Lock::Shared), None);
    assert_eq!(table.holds(B, Lock::Shared), Some(LockKind::Exclusive));
}

#[test]
fn an_open_file_knows_what_was_locked_through_it() {
    let mut table = Table::default();
    lock(&mut table, shared(A, Lock::Shared));
    lock(&mut table, Request { via: Handle(7), ..exclusive(A, Lock::Write) });
    lock(&mut table, Request { via: Handle(7), ..shared(B, Lock::Dms) });
    let expected = [(A, LockSet::one(Lock::Write)), (B, LockSet::one(Lock::Dms))];
    assert_eq!(table.owners_via(Handle(7)), expected);
    assert_eq!(table.unlock(A, LockSet::DATABASE), []);
    assert_eq!(table.held_by(A), LockSet::one(Lock::Write));
    assert_eq!(table.unlock(A, LockSet::SHM), []);
    assert_eq!(table.owners_via(Handle(7)), expected[1..]);
}

#[test]
fn owners_that_wait_for_each_other_are_told() {
    let mut table = Table::default();
    lock(&mut table, exclusive(A, Lock::Read1));
    lock(&mut table, exclusive(B, Lock::Read2));
    lock(&mut table, exclusive(C, Lock::Read3));
    wait(&mut table, shared(A, Lock::Read2), "a");
    wait(&mut table, shared(B, Lock::Read3), "b");
    assert_eq!(table.lock_or_wait(shared(C, Lock::Read1), "c"), Outcome::Deadlock("c"));
    assert_eq!(names(table.unlock(C, LockSet::SHM)), ["b"]);
}

#[test]
fn two_upgrades_of_one_lock_are_a_deadlock() {
    let mut table = Table::default();
    lock(&mut table, shared(A, Lock::Shared));
    lock(&mut table, shared(B, Lock::Shared));
    wait(&mut table, exclusive(A, Lock::Shared), "a");
    assert_eq!(table.lock_or_wait(exclusive(B, Lock::Shared), "b"), Outcome::Deadlock("b"));
}

/// POSIX byte-range locks, in the plainest way: for each owner and byte of a file how it is held.
#[derive(Default)]
struct Model(BTreeMap<(Owner, u64), LockKind>);

impl Model {
    /// The bytes that matter, those that SQLite locks.
    fn bytes(file: LockFile, start: u64, end: u64) -> Vec<u64> {
        let all = Lock::ALL.into_iter().filter(|lock| lock.file() == file).map(Lock::byte);
        all.filter(|byte| (start..=end).contains(byte)).collect()
    }

    fn conflict(&self, owner: Owner, bytes: &[u64], kind: LockKind) -> Option<LockKind> {
        let held = |byte: &u64| {
            let others = self.0.iter().filter(|((other, at), _)| *other != owner && at == byte);
            let mut kinds = others.map(|(_, held)| *held);
            kinds.find(|&held| kind == LockKind::Exclusive || held == LockKind::Exclusive)
        };
        bytes.iter().find_map(held)
    }

    fn set(&mut self, owner: Owner, bytes: &[u64], kind: LockKind) {
        self.0.extend(bytes.iter().map(|&byte| ((owner, byte), kind)));
    }

    fn clear(&mut self, owner: Owner, bytes: &[u64]) {
        self.0.retain(|(holder, byte), _| *holder != owner || !bytes.contains(byte));
    }
}

/// Random requests of four owners; grants and refusals, held locks and queries are the model's, and
/// a waiter is granted no sooner than the model allows.
#[test]
fn the_table_behaves_like_posix_locks() {
    let mut rng = Rng::from_env();
    let mut table: LockTable<u64> = LockTable::default();
    let mut model = Model::default();
    let mut waiting: BTreeMap<u64, Request> = BTreeMap::new();
    let owners = [A, B, C, Owner::Client(3)];
    for step in 0..30_000u64 {
        let owner = owners[rng.below(4) as usize];
        let file = [LockFile::Database, LockFile::Shm][rng.below(2) as usize];
        let base = if file == LockFile::Shm { 119 } else { 0x3fff_ffff };
        let start = base + rng.below(10);
        let end = start + rng.below(4);
        let kind = [LockKind::Shared, LockKind::Exclusive][rng.below(2) as usize];
        let set = LockSet::in_range(file, start, end);
        let bytes = Model::bytes(file, start, end);
        let request = Request { owner, via: Handle(0), set, kind };
        let expected = model.conflict(owner, &bytes, kind);
        assert_eq!(table.query(owner, set, kind).map(|found| found.kind), expected);
        let woken = match rng.below(10) {
            0..4 => {
                let result = table.try_lock(request);
                assert_eq!(result.is_ok(), expected.is_none(), "step {step}: {request:?}");
                result.map_or_else(
                    |_| Vec::new(),
                    |(_, woken)| {
                        model.set(owner, &bytes, kind);
                        woken
                    },
                )
            }
            4..6 if waiting.len() < 6 => match table.lock_or_wait(request, step) {
                Outcome::Locked(granted, woken) => {
                    assert_eq!((granted.waiter, expected), (step, None));
                    model.set(owner, &bytes, kind);
                    woken
                }
                Outcome::Waiting => {
                    waiting.insert(step, request);
                    Vec::new()
                }
                Outcome::Deadlock(waiter) => {
                    assert_eq!(waiter, step);
                    Vec::new()
                }
            },
            6 if !waiting.is_empty() => {
                let oldest = *waiting.keys().next().unwrap();
                let (waiter, woken) = table.cancel(|&waiter| waiter == oldest).unwrap();
                waiting.remove(&waiter);
                woken
            }
            7 => {
                model.clear(owner, &Model::bytes(file, 0, u64::MAX));
                table.unlock(owner, LockSet::file(file))
            }
            _ => {
                model.clear(owner, &bytes);
                table.unlock(owner, set)
            }
        };
        for Granted { waiter, grant } in woken {
            let Request { owner, set, kind, .. } = waiting.remove(&waiter).unwrap();
            assert_eq!(grant.request().set, set);
            let bytes: Vec<u64> = set.iter().map(Lock::byte).collect();
            assert_eq!(model.conflict(owner, &bytes, kind), None, "step {step}");
            model.set(owner, &bytes, kind);
        }
        assert_eq!(table.waiting(), waiting.len());
        for owner in owners {
            for lock in Lock::ALL {
                let expected = model.0.get(&(owner, lock.byte())).copied();
                assert_eq!(table.holds(owner, lock), expected, "step {step}");
            }
        }
        let oldest = waiting.values().next();
        if let Some(Request { owner, set, kind, .. }) = oldest {
            let bytes: Vec<u64> = set.iter().map(Lock::byte).collect();
            assert!(model.conflict(*owner, &bytes, *kind).is_some(), "the first could be granted");
        }
    }
}

/// `docs/differences.md`, 28: "no lock owners".
#[test]
fn nothing_is_left_of_owners_that_are_gone() {
    let mut table = Table::default();
    for owner in (0..10_000).map(Owner::Client) {
        lock(&mut table, shared(owner, Lock::Shared));
        lock(&mut table, exclusive(owner, Lock::Reserved));
        assert_eq!(table.unlock(owner, LockSet::ALL), []);
    }
    assert!(table.locks.iter().all(|lock| lock.holders().next().is_none()));
    let room: usize = table.locks.iter().map(|lock| lock.shared.capacity()).sum();
    assert!(room < 100, "room for {room} owners");
}
