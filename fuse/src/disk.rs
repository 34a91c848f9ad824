//! Calls that wait for a disk, and threads for them.
//!
//! A worker, above all the one of a CPU's ring, serves other clients too, and one fsync(2) takes
//! as long as thousands of lock calls. So what is known to end in the disk's queue is handed to one
//! of a few threads: the client, which waits for the disk anyway, pays one wake-up more. Nothing is
//! ordered among such calls; the kernel holds back itself what must be one after the other.
//!
//! On a quick disk that wake-up costs as much as the sync, so a worker that can be spared makes it itself, until
//! one took long ([`QUICK_MAX`]). Where several read the same `/dev/fuse` that is one at a time, and another one
//! always reads on. Where a worker is the only one of its clients, it has to have just one of them. No worker
//! waits for what only another one can serve.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
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
    /// Nobody else serves its clients.
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
    /// A worker waits for the disk.
    one_waits: AtomicBool,
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
        let (one_waits, is_slow) = (AtomicBool::new(false), AtomicBool::new(false));
        let disk = Arc::new(Disk { state, changed, workers, one_waits, is_slow });
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
        if let Some(_spared) = self.spare(clients) {
            self.time(sync);
            return;
        }
        let disk = self.clone();
        self.call(move || disk.time(sync));
    }

    /// A worker less, until the result is dropped.
    fn spare(&self, clients: Clients) -> Option<Spared<'_>> {
        if self.is_slow.load(Ordering::Relaxed) {
            return None;
        }
        match (self.workers, clients) {
            (Workers::Alike, _) if self.one_waits.swap(true, Ordering::Acquire) => None,
            (Workers::Alike, _) => Some(Spared(Some(&self.one_waits))),
            (Workers::Alone, Clients::One) => Some(Spared(None)),
            (Workers::Alone, Clients::Many) => None,
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

/// A worker that waits for the disk itself, and what says so, if no other one may do it meanwhile.
struct Spared<'a>(Option<&'a AtomicBool>);

impl Drop for Spared<'_> {
    fn drop(&mut self) {
        if let Some(one_waits) = self.0 {
            one_waits.store(false, Ordering::Release);
        }
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
    fn thread_of_sync(disk: &Arc<Disk>, meanwhile: impl FnOnce() + Send + 'static) -> ThreadId {
        thread_of_sync_for(Clients::Many, disk, meanwhile)
    }

    fn thread_of_sync_for(
        clients: Clients,
        disk: &Arc<Disk>,
        meanwhile: impl FnOnce() + Send + 'static,
    ) -> ThreadId {
        let (done, made) = channel();
        disk.sync(clients, move || {
            meanwhile();
            done.send(thread::current().id()).unwrap();
        });
        made.recv().unwrap()
    }

    #[test]
    fn a_worker_that_is_alone_syncs_itself_for_its_only_client() {
        let here = thread::current().id();
        let disk = Disk::start(Workers::Alone).unwrap();
        assert_ne!(thread_of_sync_for(Clients::Many, &disk, || {}), here);
        // How long a call takes on a busy machine is not to be known.
        disk.is_slow.store(false, Ordering::Relaxed);
        assert_eq!(thread_of_sync_for(Clients::One, &disk, || {}), here);
        disk.is_slow.store(false, Ordering::Relaxed);
        let of_another = disk.spare(Clients::One).unwrap();
        assert_eq!(thread_of_sync_for(Clients::One, &disk, || {}), here);
        drop(of_another);
        disk.is_slow.store(true, Ordering::Relaxed);
        assert_ne!(thread_of_sync_for(Clients::One, &disk, || {}), here);
        disk.stop();
    }

    #[test]
    fn one_worker_at_a_time_syncs_itself_if_others_read_on() {
        let here = thread::current().id();
        let disk = Disk::start(Workers::Alike).unwrap();
        disk.is_slow.store(false, Ordering::Relaxed);
        assert_eq!(thread_of_sync(&disk, || {}), here);
        disk.is_slow.store(false, Ordering::Relaxed);
        let spared = disk.spare(Clients::Many).unwrap();
        assert_ne!(thread_of_sync(&disk, || {}), here);
        drop(spared);
        disk.is_slow.store(false, Ordering::Relaxed);
        let of_disk = disk.clone();
        let panicked =
            catch_unwind(AssertUnwindSafe(|| of_disk.sync(Clients::Many, || panic!("on purpose"))));
        assert!(panicked.is_err());
        assert!(disk.spare(Clients::Many).is_some(), "the worker is back after a panic");
        disk.stop();
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
        assert_eq!(thread_of_sync(&disk, busy_for_long), here);
        assert_ne!(thread_of_sync(&disk, busy_for_long), here);
        disk.stop();
    }
}
