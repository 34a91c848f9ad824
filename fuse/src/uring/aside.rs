//! Keeps a client on its CPU while it does little but ask.
//!
//! The scheduler sends a task that is woken to a CPU that sleeps, if the one that it slept on is busy. It is busy: with
//! the ring's thread, which just answers. So a client that is alone goes to and fro between two CPUs, one move a
//! call, and to wake a CPU, above all a virtual one, takes several times as long as the call. Clients of the same
//! scheduling group as this process (a container, else a session) are spared mostly, since Linux 6.12 leaves a task that
//! has had more than its share in the queue of its CPU as it sleeps, and wakes it there. Others are not.
//!
//! A thread of the policy `SCHED_IDLE` does not make a CPU busy. But it comes last among all of its group, so where others of
//! it are at work each answer would take tens of milliseconds. So a ring's thread steps aside when it has seen
//! a client come and go for a while, which only happens where another CPU sleeps; and it steps back as soon as it has
//! waited for long, be it for a request or for the CPU. What goes wrong is one slow call. Who steps back soon needs to see
//! more the next time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sched::{sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// A look at the trail is taken each time that so many requests in a row came from one client.
const STRIDE: u32 = 32;
/// So many looks in a row must find that the client was elsewhere before, the first time: some 500 calls.
const MOVES: u32 = 8;
/// The most that is ever needed.
const MOVES_MAX: u32 = MOVES << 5;
/// Who waits longer steps back. A turn of the processor among equals is 3 ms.
const PATIENCE: Duration = Duration::from_millis(5);
/// A stay of this length has spared more than the slow call that may end it, so the next one needs less.
const LONG_STAY: Duration = Duration::from_millis(20);

/// Where the last client was served. All rings of a mount share it; each writes only what has changed.
#[derive(Debug, Default)]
pub(crate) struct Trail(AtomicU64);

impl Trail {
    /// `client` is on `cpu`; whether it was on another one before.
    fn has_moved(&self, client: u32, cpu: u16) -> bool {
        let here = u64::from(client) << 32 | u64::from(cpu);
        let before = self.0.load(Ordering::Relaxed);
        if before == here {
            return false;
        }
        self.0.store(here, Ordering::Relaxed);
        before >> 32 == u64::from(client)
    }
}

/// Whether the thread of a ring is aside, and what it has seen. It belongs to that thread.
#[derive(Debug)]
pub(crate) struct Aside {
    trail: Arc<Trail>,
    /// The CPU that the ring serves; none: the thread never steps aside.
    cpu: Option<u16>,
    /// How many looks in a row found the client elsewhere before.
    moves: u32,
    /// How many it takes to step aside.
    needed: u32,
    /// Since when the thread is aside.
    since: Option<Instant>,
}

impl Aside {
    /// Of the thread that serves the clients on `cpu`.
    pub fn new(trail: Arc<Trail>, cpu: Option<u16>) -> Aside {
        Aside { trail, cpu, moves: 0, needed: MOVES, since: None }
    }

    /// `row` requests in a row came from `client`, the last one just now.
    pub fn served(&mut self, client: u32, row: u32) {
        if row.is_multiple_of(STRIDE) && row != 0 && self.is_due(client) {
            match step_aside() {
                Ok(()) => {
                    tracing::debug!(cpu = self.cpu, "fuse ring thread steps aside");
                    self.since = Some(Instant::now());
                }
                Err(errno) => {
                    tracing::debug!(%errno, "fuse ring threads stay where they are");
                    self.cpu = None;
                }
            }
        }
    }

    /// Whether `client` has come and gone for long enough.
    fn is_due(&mut self, client: u32) -> bool {
        let (Some(cpu), None) = (self.cpu, self.since) else { return false };
        self.moves = if self.trail.has_moved(client, cpu) { self.moves + 1 } else { 0 };
        self.moves >= self.needed
    }

    /// When the thread, with nothing more to do, begins to wait; none if that is of no interest.
    pub fn begin_wait(&self) -> Option<Instant> {
        self.since.map(|_| Instant::now())
    }

    /// The thread has waited since `begin`.
    pub fn end_wait(&mut self, begin: Option<Instant>) {
        let (Some(begin), Some(since)) = (begin, self.since) else { return };
        if begin.elapsed() <= PATIENCE {
            return;
        }
        match set_policy(libc::SCHED_OTHER) {
            Ok(()) => {
                tracing::debug!(cpu = self.cpu, "fuse ring thread steps back");
                self.stayed(begin.duration_since(since));
            }
            // It tries again after the next wait.
            Err(errno) => tracing::warn!(
                %errno,
                cpu = self.cpu,
                "a fuse ring thread cannot leave SCHED_IDLE, so calls may be slow: allow CAP_SYS_NICE"
            ),
        }
    }

    /// The thread was aside for so long and is so no more.
    fn stayed(&mut self, stay: Duration) {
        self.needed = if stay >= LONG_STAY {
            (self.needed / 2).max(1)
        } else {
            (self.needed * 2).min(MOVES_MAX)
        };
        (self.moves, self.since) = (0, None);
    }
}

/// Whether threads of this process may step aside and back; the way back needs CAP_SYS_NICE or a limit on
/// nice values that allows it (sched(7)).
pub(super) fn is_allowed() -> bool {
    // In a thread of its own, which may not be able to come back.
    let tried = std::thread::spawn(|| {
        policy(0) == Ok(libc::SCHED_OTHER)
            && step_aside().is_ok()
            && set_policy(libc::SCHED_OTHER).is_ok()
    });
    tried.join().unwrap_or(false)
}

/// Gives the current thread the CPUs and the priority of the program. For threads that are started from within a
/// call on a [`Volume`](crate::Volume): they begin with those of the worker, which may have one CPU and come last on it.
pub fn settle_thread() {
    let program = nix::unistd::getpid();
    let cpus = sched_getaffinity(program).and_then(|cpus| sched_setaffinity(THIS, &cpus));
    let is_aside = policy(0) == Ok(libc::SCHED_IDLE);
    let back = match policy(program.as_raw()) {
        Ok(libc::SCHED_OTHER) if is_aside => set_policy(libc::SCHED_OTHER),
        _ => Ok(()),
    };
    if let Err(errno) = cpus.and(back) {
        tracing::debug!(%errno, "a thread stays on the CPU of a fuse worker");
    }
}

/// The current thread.
const THIS: Pid = Pid::from_raw(0);

/// Gives the current thread the policy `SCHED_IDLE`.
fn step_aside() -> Result<(), Errno> {
    keep_io_priority()?;
    set_policy(libc::SCHED_IDLE)
}

// Not by the library's functions, which musl refuses: for POSIX they are about whole processes.

/// The policy of a thread; zero is the current one.
fn policy(thread: libc::pid_t) -> Result<libc::c_int, Errno> {
    // SAFETY: takes a number.
    let policy = Errno::result(unsafe { libc::syscall(libc::SYS_sched_getscheduler, thread) })?;
    Ok(policy as libc::c_int)
}

/// Gives the current thread a policy.
fn set_policy(policy: libc::c_int) -> Result<(), Errno> {
    let none = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameters live until the call returns.
    let result = Errno::result(unsafe {
        libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &raw const none)
    });
    result.map(drop)
}

/// Keeps the current thread's class for the disk as it is; by itself it follows the policy, and the disk would
/// serve the syncs of a thread aside last (ioprio_set(2)).
fn keep_io_priority() -> Result<(), Errno> {
    /// `IOPRIO_WHO_PROCESS`, which is a thread, of which zero is the current one.
    const THREAD: [libc::c_long; 2] = [1, 0];
    /// `IOPRIO_CLASS_BE` at the level of nice 0, above the 13 bits of the level (`linux/ioprio.h`).
    const BEST_EFFORT: libc::c_long = 2 << 13 | 4;
    let [kind, thread] = THREAD;
    // SAFETY: takes numbers only.
    let set = Errno::result(unsafe { libc::syscall(libc::SYS_ioprio_get, kind, thread) })?;
    if set >> 13 == 0 {
        // SAFETY: as above.
        Errno::result(unsafe { libc::syscall(libc::SYS_ioprio_set, kind, thread, BEST_EFFORT) })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use nix::sched::CpuSet;

    use super::*;

    fn of_two() -> [Aside; 2] {
        let trail = Arc::new(Trail::default());
        [Aside::new(trail.clone(), Some(0)), Aside::new(trail, Some(1))]
    }

    #[test]
    fn a_client_that_comes_and_goes_is_noticed() {
        let [mut first, mut second] = of_two();
        for _ in 0..MOVES {
            assert!(!first.is_due(7));
            assert!(!second.is_due(7) || second.moves == MOVES);
        }
        assert!(first.is_due(7));
    }

    #[test]
    fn clients_that_stay_are_not_noticed() {
        let [mut first, mut second] = of_two();
        for _ in 0..4 * MOVES {
            // Each on its CPU.
            assert!(!first.is_due(7) && !second.is_due(8));
            // One that moves now and then.
            assert!(!first.is_due(9) && !first.is_due(9) && !second.is_due(9) && !second.is_due(9));
        }
    }

    #[test]
    fn short_stays_need_more_and_long_ones_less() {
        let [mut first, _] = of_two();
        first.stayed(LONG_STAY / 2);
        first.stayed(Duration::ZERO);
        assert_eq!(first.needed, 4 * MOVES);
        (0..40).for_each(|_| first.stayed(Duration::ZERO));
        assert_eq!(first.needed, MOVES_MAX);
        first.stayed(LONG_STAY);
        assert_eq!((first.needed, first.moves, first.since), (MOVES_MAX / 2, 0, None));
        (0..40).for_each(|_| first.stayed(LONG_STAY));
        assert_eq!(first.needed, 1);
    }

    /// A thread that is aside, with what it has seen.
    fn aside() -> Aside {
        assert!(is_allowed(), "run as root");
        let [mut first, _] = of_two();
        first.moves = MOVES;
        first.trail.0.store(7 << 32 | 1, Ordering::Relaxed);
        first.served(7, STRIDE);
        assert_eq!(policy(0), Ok(libc::SCHED_IDLE));
        first
    }

    /// Runs something in a thread of its own.
    fn apart(run: impl FnOnce() + Send + 'static) {
        std::thread::spawn(run).join().unwrap();
    }

    #[test]
    fn a_thread_that_waits_for_long_steps_back() {
        apart(|| {
            let mut aside = aside();
            let begin = aside.begin_wait().unwrap();
            aside.end_wait(Some(begin));
            assert_eq!(policy(0), Ok(libc::SCHED_IDLE));
            aside.end_wait(begin.checked_sub(PATIENCE));
            assert_eq!((policy(0), aside.needed), (Ok(libc::SCHED_OTHER), 2 * MOVES));
            assert_eq!(aside.begin_wait(), None);
        });
    }

    #[test]
    fn what_a_thread_aside_starts_can_settle() {
        apart(|| {
            let _aside = aside();
            let ours = sched_getaffinity(THIS).unwrap();
            let first = (0..CpuSet::count()).find(|cpu| ours.is_set(*cpu).unwrap()).unwrap();
            let mut one = CpuSet::new();
            one.set(first).unwrap();
            sched_setaffinity(THIS, &one).unwrap();
            apart(|| {
                assert_eq!(policy(0), Ok(libc::SCHED_IDLE));
                settle_thread();
                assert_eq!(policy(0), Ok(libc::SCHED_OTHER));
                assert_eq!(sched_getaffinity(THIS), sched_getaffinity(nix::unistd::getpid()));
            });
        });
    }
}
