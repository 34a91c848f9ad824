//! The lock table as threads use it that wait for their locks, in many orders of these threads.
//!
//! `LITEFS_TEST_ORDERS` (`make torture`) plays so many, `LITEFS_TEST_SEED` others.

use std::sync::Arc;

use super::*;
use crate::engine::sync::model::{self, Clock};
use crate::engine::sync::{Condvar, Mutex, spawn};

/// The table of one database, and who was let in.
struct Shared {
    table: Mutex<(LockTable<u64>, Vec<u64>)>,
    wake: Condvar,
}

impl Shared {
    fn new() -> Arc<Shared> {
        Arc::new(Shared { table: Mutex::default(), wake: Condvar::new() })
    }

    fn answer(&self, table: &mut (LockTable<u64>, Vec<u64>), woken: Woken<u64>) {
        table.1.extend(woken.into_iter().map(|granted| granted.waiter));
        self.wake.notify_all();
    }

    /// Waits for the locks (F_SETLKW); whether they were given.
    fn lock(&self, n: u64, lock: Lock, kind: LockKind) -> bool {
        let owner = Owner::client(n);
        let request = Request { owner, via: Handle(n), set: LockSet::one(lock), kind };
        let mut table = self.table.lock().unwrap();
        match table.0.lock_or_wait(request, n) {
            Outcome::Locked(_, woken) => {
                self.answer(&mut table, woken);
                return true;
            }
            Outcome::Deadlock(_) => return false,
            Outcome::Waiting => {}
        }
        while !table.1.contains(&n) {
            table = self.wake.wait(table).unwrap();
        }
        table.1.retain(|one| *one != n);
        true
    }

    fn unlock(&self, n: u64) {
        let mut table = self.table.lock().unwrap();
        let woken = table.0.unlock(Owner::client(n), LockSet::ALL);
        self.answer(&mut table, woken);
    }
}

/// Plays it in many orders.
fn check(run: impl Fn() + Send + Sync + 'static) {
    model::check(Clock::Goes, model::given("LITEFS_TEST_ORDERS", 1000) as usize, run);
}

/// Nobody waits for ever, and nobody is alone beside somebody else.
#[test]
fn everybody_gets_a_turn_in_every_order() {
    check(|| {
        let shared = Shared::new();
        let inside: Arc<Mutex<(u32, u32)>> = Arc::default();
        let threads: Vec<_> =
            [LockKind::Exclusive, LockKind::Shared, LockKind::Shared, LockKind::Exclusive]
                .into_iter()
                .zip(1..)
                .map(|(kind, n)| {
                    let (shared, inside) = (shared.clone(), inside.clone());
                    spawn("locks", move || {
                        for _ in 0..2 {
                            assert!(shared.lock(n, Lock::Write, kind), "no deadlock over one lock");
                            let count = |by: i32| {
                                let mut inside = inside.lock().unwrap();
                                match kind {
                                    LockKind::Exclusive => {
                                        inside.0 = inside.0.wrapping_add_signed(by)
                                    }
                                    LockKind::Shared => inside.1 = inside.1.wrapping_add_signed(by),
                                }
                                assert!(matches!(*inside, (0, _) | (1, 0)), "{inside:?}");
                            };
                            count(1);
                            count(-1);
                            shared.unlock(n);
                        }
                    })
                })
                .collect();
        threads.into_iter().for_each(|thread| thread.unwrap().join().unwrap());
        assert_eq!(shared.table.lock().unwrap().0.waiting(), 0);
    });
}

/// Of those who would wait for each other one is refused, and the others go on.
#[test]
fn who_would_wait_for_each_other_is_told_in_every_order() {
    check(|| {
        let shared = Shared::new();
        let pairs =
            [(Lock::Write, Lock::Ckpt), (Lock::Ckpt, Lock::Recover), (Lock::Recover, Lock::Write)];
        let threads: Vec<_> = pairs
            .into_iter()
            .zip(1..)
            .map(|((first, second), n)| {
                let shared = shared.clone();
                spawn("locks", move || {
                    let got = shared.lock(n, first, LockKind::Exclusive)
                        && shared.lock(n, second, LockKind::Exclusive);
                    let table = shared.table.lock().unwrap();
                    assert!(!got || table.0.holds(Owner::client(n), second).is_some());
                    drop(table);
                    shared.unlock(n);
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.unwrap().join().unwrap());
        let table = shared.table.lock().unwrap();
        assert!(
            table.0.waiting() == 0
                && Lock::ALL.into_iter().all(|lock| table.0.held(lock).is_none())
        );
    });
}
