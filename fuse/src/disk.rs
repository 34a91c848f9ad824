//! Calls that wait for a disk, and threads for them.
//!
//! A worker, above all the one of a CPU's ring, serves other clients too, and one fsync(2) takes
//! as long as thousands of lock calls. So what is known to end in the disk's queue is handed to one
//! of a few threads: the client, which waits for the disk anyway, pays one wake-up more. Nothing is
//! ordered among such calls; the kernel holds back itself what must be one after the other.
//!
//! On a quick disk that wake-up costs as much as the sync, so a worker that can be spared makes it itself, until
//! one took long ([`QUICK_MAX`]). While any sync is under way no other worker does that, so a disk that hangs
//! has one of them at most. Where several read the same `/dev/fuse`, another one reads on. Where a worker is the only one
//! of its clients, it has to have just one of them, and other CPUs' clients have other workers. No worker waits for what
//! only another one can serve.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;

/// How many calls may wait for the disk at once. A disk has few queues, and group commits
/// make one flush of many.
const THREADS: usize = 4;

/// A sync that takes longer is worth a wake-up, and too long to have one worker less.
const QUICK_MAX: Duration = Duration::from_millis(1);

/// A call to be made.
type Call = Box<dyn FnOnce() + Send>;

/// Whether a worker may wait for the disk itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Workers {
    /// One of several that read from one place: the others go on.
    Alike,
    /// One of several, each with clients of its own.
    Apart,
    /// Nobody else serves anybody.
    Alone,
}

/// Whom a worker serves at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clients {
    /// One thread of one process, as far as one can tell from the last requests.
    One,
    /// Any number.
    Many,
}

/// Calls that wait for a thread. There are never more than requests under way.
pub(crate) struct Disk {
    state: Mutex<State>,
    changed: Condvar,
    workers: Workers,
    /// How many syncs are under way.
    syncs: AtomicUsize,
    /// The last sync took longer than [`QUICK_MAX`].
    is_slow: AtomicBool,
}

#[derive(Default)]
struct State {
    calls: VecDeque<Call>,
    ended: bool,
}

impl Disk {
    /// Starts the threads. They end, their calls made, with [`Disk::stop`].
    pub fn start(workers: Workers) -> Result<Arc<Disk>, Errno> {
        let (state, changed) = (Mutex::default(), Condvar::new());
        let (syncs, is_slow) = (AtomicUsize::new(0), AtomicBool::new(false));
        let disk = Arc::new(Disk { state, changed, workers, syncs, is_slow });
        for index in 0..THREADS {
            let of_thread = disk.clone();
            let spawned = thread::Builder::new()
                .name(format!("fuse-disk-{index}"))
                .spawn(move || of_thread.work());
            if let Err(error) = spawned {
                disk.stop();
                return Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EAGAIN)));
            }
        }
        Ok(disk)
    }

    /// Has one of the threads make a call. A panic in it is logged.
    pub fn call(&self, call: impl FnOnce() + Send + 'static) {
        let mut state = self.state.lock().unwrap();
        state.calls.push_back(Box::new(call));
        drop(state);
        self.changed.notify_one();
    }

    /// Makes a sync: on the worker that calls this, which serves `clients`, if it can be spared, or on one of
    /// the threads.
    pub fn sync(self: &Arc<Self>, clients: Clients, sync: impl FnOnce() + Send + 'static) {
        let (under_way, is_only_one) = UnderWay::new(self.clone());
        let is_quick = is_only_one && !self.is_slow.load(Ordering::Relaxed);
        let sync = move || {
            under_way.0.time(sync);
        };
        if is_quick && self.may_spare(clients) { sync() } else { self.call(sync) }
    }

    /// Whether a worker of `clients` may wait for the disk, if that is quick.
    fn may_spare(&self, clients: Clients) -> bool {
        match self.workers {
            Workers::Alike => true,
            Workers::Apart => clients == Clients::One,
            Workers::Alone => false,
        }
    }

    fn time(&self, sync: impl FnOnce()) {
        let start = Instant::now();
        sync();
        self.is_slow.store(start.elapsed() > QUICK_MAX, Ordering::Relaxed);
    }

    /// Ends the threads when nothing is left to do.
    pub fn stop(&self) {
        self.state.lock().unwrap().ended = true;
        self.changed.notify_all();
    }

    fn work(&self) {
        while let Some(call) = self.next() {
            if catch_unwind(AssertUnwindSafe(call)).is_err() {
                tracing::error!("fuse call panicked");
            }
        }
    }

    fn next(&self) -> Option<Call> {
        let idle = |state: &mut State| !state.ended && state.calls.is_empty();
        let mut state = self.changed.wait_while(self.state.lock().unwrap(), idle).unwrap();
        state.calls.pop_front()
    }
}

/// A sync that is under way as long as this lives.
struct UnderWay(Arc<Disk>);

impl UnderWay {
    /// Counts it; whether it is the only one.
    fn new(disk: Arc<Disk>) -> (UnderWay, bool) {
        let others = disk.syncs.fetch_add(1, Ordering::Relaxed);
        (UnderWay(disk), others == 0)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.syncs.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread::ThreadId;

    use super::*;

    #[test]
    fn every_call_is_made_even_after_a_panic_and_at_the_end() {
        let disk = Disk::start(Workers::Alone).unwrap();
        let (done, made) = channel();
        for number in 0..100 {
            let done = done.clone();
            disk.call(move || {
                assert_ne!(number % 10, 5, "a panic on purpose");
                done.send(number).unwrap();
            });
        }
        disk.stop();
        drop(done);
        assert_eq!(made.iter().count(), 90);
    }

    /// On which thread a sync is made that then does `meanwhile`.
    fn thread_of(clients: Clients, disk: &Arc<Disk>, meanwhile: fn()) -> ThreadId {
        let (done, made) = channel();
        disk.sync(clients, move || {
            meanwhile();
            done.send(thread::current().id()).unwrap();
        });
        made.recv().unwrap()
    }

    /// A disk without a sync under way, the last of which was quick: how long they take on a busy machine is not to
    /// be known.
    fn quick(disk: &Arc<Disk>) -> &Arc<Disk> {
        while disk.syncs.load(Ordering::Relaxed) > 0 {
            thread::yield_now();
        }
        disk.is_slow.store(false, Ordering::Relaxed);
        disk
    }

    #[test]
    fn a_worker_that_can_be_spared_syncs_itself() {
        let here = thread::current().id();
        for (workers, for_one, for_many) in [
            (Workers::Alike, true, true),
            (Workers::Apart, true, false),
            (Workers::Alone, false, false),
        ] {
            let disk = Disk::start(workers).unwrap();
            for (clients, expected) in [(Clients::One, for_one), (Clients::Many, for_many)] {
                let is_here = thread_of(clients, quick(&disk), || {}) == here;
                assert_eq!(is_here, expected, "{workers:?} {clients:?}");
            }
            disk.stop();
        }
    }

    #[test]
    fn while_a_sync_is_under_way_others_go_to_threads() {
        let here = thread::current().id();
        for workers in [Workers::Alike, Workers::Apart] {
            let disk = Disk::start(workers).unwrap();
            let (other, is_only_one) = UnderWay::new(quick(&disk).clone());
            assert!(is_only_one);
            assert_ne!(thread_of(Clients::One, &disk, || {}), here);
            drop(other);
            assert_eq!(thread_of(Clients::One, quick(&disk), || {}), here);
            let of_disk = quick(&disk).clone();
            let panics = || of_disk.sync(Clients::One, || panic!("on purpose"));
            assert!(catch_unwind(AssertUnwindSafe(panics)).is_err());
            assert_eq!(thread_of(Clients::One, quick(&disk), || {}), here, "after a panic");
            disk.stop();
        }
    }

    #[test]
    fn after_a_sync_that_took_long_the_next_goes_to_a_thread() {
        let here = thread::current().id();
        let disk = Disk::start(Workers::Alike).unwrap();
        let busy_for_long = || {
            let start = Instant::now();
            while start.elapsed() <= QUICK_MAX {
                std::hint::spin_loop();
            }
        };
        assert_eq!(thread_of(Clients::Many, &disk, busy_for_long), here);
        assert_ne!(thread_of(Clients::Many, &disk, busy_for_long), here);
        disk.stop();
    }
}
