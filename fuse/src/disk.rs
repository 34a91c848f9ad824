//! Threads for calls that wait for a disk.
//!
//! A worker, above all the one of a CPU's ring, serves other clients too, and one fsync(2) takes
//! as long as thousands of lock calls. So what is known to end in the disk's queue is handed to one
//! of a few threads. Nothing is ordered among such calls; the kernel holds back itself what must be one
//! after the other.
//!
//! To wake a thread on another, perhaps sleeping, CPU and to be woken by it takes as long as many a
//! disk. So each CPU that has a ring has a thread here too, bound to it, which takes a call of
//! that ring if it has nothing to do. All other calls go to the threads that run anywhere.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use nix::errno::Errno;

use crate::uring::pin;

/// How many calls may wait for the disk at once. A disk has few queues, and group commits
/// make one flush of many.
const THREADS: usize = 4;

/// A call to be made.
type Call = Box<dyn FnOnce() + Send>;

/// Calls that wait for a disk. There are never more than requests under way.
pub(crate) struct Disk {
    anywhere: Desk,
    /// By CPU, each with one thread.
    bound: Vec<(u16, Desk)>,
}

/// Calls that wait, and the threads that make them.
#[derive(Default)]
struct Desk {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    calls: VecDeque<Call>,
    /// Calls that are being made.
    busy: usize,
    ended: bool,
}

impl Disk {
    /// Starts the threads, and one more bound to each of `cpus`. They end, their calls made, with
    /// [`Disk::stop`].
    pub fn start(cpus: &[u16]) -> Result<Arc<Disk>, Errno> {
        let bound = cpus.iter().map(|cpu| (*cpu, Desk::default())).collect();
        let disk = Arc::new(Disk { anywhere: Desk::default(), bound });
        let started = disk.start_threads();
        if started.is_err() {
            disk.stop();
        }
        started.map(|()| disk)
    }

    fn start_threads(self: &Arc<Disk>) -> Result<(), Errno> {
        for index in 0..THREADS {
            let disk = self.clone();
            spawn(format!("fuse-disk-{index}"), move || disk.anywhere.work())?;
        }
        for (index, (cpu, _)) in self.bound.iter().enumerate() {
            let (disk, cpu) = (self.clone(), *cpu);
            spawn(format!("fuse-disk-c{cpu}"), move || {
                pin(cpu);
                disk.bound[index].1.work();
            })?;
        }
        Ok(())
    }

    /// Has one of the threads make a call, on `cpu` if its thread has nothing to do. A panic in it is
    /// logged.
    pub fn call(&self, cpu: Option<u16>, call: impl FnOnce() + Send + 'static) {
        let call = Box::new(call);
        match self.bound.iter().find(|(own, _)| Some(*own) == cpu) {
            Some((_, desk)) => {
                if let Err(call) = desk.offer(call) {
                    self.anywhere.take(call);
                }
            }
            None => self.anywhere.take(call),
        }
    }

    /// Ends the threads when nothing is left to do.
    pub fn stop(&self) {
        let bound = self.bound.iter().map(|(_, desk)| desk);
        bound.chain([&self.anywhere]).for_each(Desk::stop);
    }
}

impl Desk {
    fn take(&self, call: Call) {
        self.state.lock().unwrap().calls.push_back(call);
        self.changed.notify_one();
    }

    /// Takes a call if no other would have to be made first.
    fn offer(&self, call: Call) -> Result<(), Call> {
        let mut state = self.state.lock().unwrap();
        if state.ended || state.busy > 0 || !state.calls.is_empty() {
            return Err(call);
        }
        state.calls.push_back(call);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    fn stop(&self) {
        self.state.lock().unwrap().ended = true;
        self.changed.notify_all();
    }

    fn work(&self) {
        while let Some(call) = self.next() {
            if catch_unwind(AssertUnwindSafe(call)).is_err() {
                tracing::error!("fuse call panicked");
            }
            self.state.lock().unwrap().busy -= 1;
        }
    }

    fn next(&self) -> Option<Call> {
        let idle = |state: &mut State| !state.ended && state.calls.is_empty();
        let mut state = self.changed.wait_while(self.state.lock().unwrap(), idle).unwrap();
        let call = state.calls.pop_front()?;
        state.busy += 1;
        Some(call)
    }
}

fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> Result<(), Errno> {
    let spawned = thread::Builder::new().name(name).spawn(run);
    spawned.map(drop).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EAGAIN)))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn every_call_is_made_even_after_a_panic_and_at_the_end() {
        let disk = Disk::start(&[0]).unwrap();
        let (done, made) = channel();
        for number in 0..100 {
            let done = done.clone();
            let cpu = [None, Some(0), Some(u16::MAX)][number % 3];
            disk.call(cpu, move || {
                assert_ne!(number % 10, 5, "a panic on purpose");
                done.send(number).unwrap();
            });
        }
        disk.stop();
        drop(done);
        assert_eq!(made.iter().count(), 90);
    }

    #[test]
    fn a_thread_of_a_cpu_that_is_busy_holds_no_call_up() {
        let disk = Disk::start(&[0]).unwrap();
        let (go_on, waits) = channel::<()>();
        disk.call(Some(0), move || {
            let _ = waits.recv();
        });
        let (done, made) = channel();
        disk.call(Some(0), move || done.send(()).unwrap());
        made.recv().unwrap();
        drop(go_on);
        disk.stop();
    }
}
