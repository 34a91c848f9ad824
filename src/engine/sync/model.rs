//! Locks that belong to a scheduler which decides, at each of their calls, what thread goes on.
//!
//! What is made outside of [`check`] is a lock of the standard library. Inside, the scheduler's lock is
//! taken first, so the real one is always free then.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};
use std::sync::LockResult;
use std::time::Duration;

use shuttle::rand::Rng as _;

thread_local! {
    static MODELLED: Cell<bool> = const { Cell::new(false) };
    static CLOCK: Cell<Clock> = const { Cell::new(Clock::Goes) };
}

/// When a wait with a limit ends, if nobody wakes who waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// At some time, before or after others have had their turns, or not within the play.
    Goes,
    /// Never: whoever should have been woken and was not waits for good.
    Stands,
}

/// A number that the environment gives.
pub fn given(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// Plays `run` in so many orders of its threads; each is drawn from `LITEFS_TEST_SEED`.
pub fn check(clock: Clock, orders: usize, run: impl Fn() + Send + Sync + 'static) {
    let seed = given("LITEFS_TEST_SEED", 1);
    let scheduler = shuttle::scheduler::RandomScheduler::new_from_seed(seed, orders);
    let runner = shuttle::Runner::new(scheduler, shuttle::Config::default());
    MODELLED.set(true);
    CLOCK.set(clock);
    runner.run(run);
    MODELLED.set(false);
    CLOCK.set(Clock::Goes);
}

fn in_model<T>(make: impl FnOnce() -> T) -> Option<T> {
    MODELLED.get().then(make)
}

/// A mutex.
#[derive(Debug)]
pub struct Mutex<T> {
    model: Option<shuttle::sync::Mutex<()>>,
    real: std::sync::Mutex<T>,
}

/// Its guard.
#[derive(Debug)]
pub struct MutexGuard<'a, T> {
    /// Given up first.
    real: Option<std::sync::MutexGuard<'a, T>>,
    model: Option<shuttle::sync::MutexGuard<'a, ()>>,
    of: &'a Mutex<T>,
}

impl<T> Mutex<T> {
    /// A free mutex.
    pub fn new(value: T) -> Mutex<T> {
        let model = in_model(|| shuttle::sync::Mutex::new(()));
        Mutex { model, real: std::sync::Mutex::new(value) }
    }

    /// Waits for it.
    pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        Ok(self.guard(self.model.as_ref().map(|model| model.lock().unwrap())))
    }

    fn guard<'a>(&'a self, model: Option<shuttle::sync::MutexGuard<'a, ()>>) -> MutexGuard<'a, T> {
        MutexGuard { real: Some(self.real.lock().unwrap()), model, of: self }
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Mutex<T> {
        Mutex::new(T::default())
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.real.as_ref().expect("held")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.real.as_mut().expect("held")
    }
}

/// A condition variable.
#[derive(Debug)]
pub struct Condvar {
    model: Option<shuttle::sync::Condvar>,
    real: std::sync::Condvar,
}

/// Whether a wait ended because of its limit.
#[derive(Debug, Clone, Copy)]
pub struct TimedOut(bool);

impl TimedOut {
    /// Whether it did.
    pub fn timed_out(self) -> bool {
        self.0
    }
}

impl Condvar {
    /// One that nobody waits for.
    #[allow(clippy::new_without_default, reason = "as in the standard library")]
    pub fn new() -> Condvar {
        let model = in_model(shuttle::sync::Condvar::new);
        Condvar { model, real: std::sync::Condvar::new() }
    }

    /// Waits to be woken.
    pub fn wait<'a, T>(&self, mut guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
        let real = guard.real.take().expect("held");
        let of = guard.of;
        match (&self.model, guard.model.take()) {
            (Some(condvar), Some(model)) => {
                drop(real);
                Ok(of.guard(Some(condvar.wait(model).unwrap())))
            }
            _ => Ok(MutexGuard { real: Some(self.real.wait(real).unwrap()), model: None, of }),
        }
    }

    /// Waits to be woken, or for some time: in a model others may have had any number of turns, or the
    /// time does not end before the play does.
    pub fn wait_timeout<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
        time: Duration,
    ) -> LockResult<(MutexGuard<'a, T>, TimedOut)> {
        let real = guard.real.take().expect("held");
        let of = guard.of;
        if let (Some(condvar), Some(model)) = (&self.model, guard.model.take()) {
            drop(real);
            if CLOCK.get() == Clock::Stands || shuttle::rand::thread_rng().r#gen() {
                return Ok((of.guard(Some(condvar.wait(model).unwrap())), TimedOut(false)));
            }
            drop(model);
            shuttle::thread::yield_now();
            return Ok((of.lock().unwrap(), TimedOut(true)));
        }
        let (real, waited) = self.real.wait_timeout(real, time).unwrap();
        let guard = MutexGuard { real: Some(real), model: None, of };
        Ok((guard, TimedOut(waited.timed_out())))
    }

    /// Wakes one who waits.
    pub fn notify_one(&self) {
        match &self.model {
            Some(model) => model.notify_one(),
            None => self.real.notify_one(),
        }
    }

    /// Wakes all who wait.
    pub fn notify_all(&self) {
        match &self.model {
            Some(model) => model.notify_all(),
            None => self.real.notify_all(),
        }
    }
}

/// A thread.
#[derive(Debug)]
pub enum JoinHandle<T> {
    /// Of a model.
    Model(shuttle::thread::JoinHandle<T>),
    /// Of the system.
    Real(std::thread::JoinHandle<T>),
}

impl<T> JoinHandle<T> {
    /// Waits for its end.
    pub fn join(self) -> std::thread::Result<T> {
        match self {
            JoinHandle::Model(thread) => thread.join(),
            JoinHandle::Real(thread) => thread.join(),
        }
    }
}

/// Starts a thread of that name.
pub fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    match MODELLED.get() {
        true => Ok(JoinHandle::Model(shuttle::thread::spawn(run))),
        false => std::thread::Builder::new().name(name.to_owned()).spawn(run).map(JoinHandle::Real),
    }
}
