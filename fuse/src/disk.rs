//! Threads for calls that wait for a disk.
//!
//! A worker, above all the one of a CPU's ring, serves other clients too, and one fsync(2) takes
//! as long as thousands of lock calls. So what is known to end in the disk's queue is handed to one
//! of a few threads: the client, which waits for the disk anyway, pays one wake-up more. Nothing is
//! ordered among such calls; the kernel holds back itself what must be one after the other.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use nix::errno::Errno;

/// How many calls may wait for the disk at once. A disk has few queues, and group commits
/// make one flush of many.
const THREADS: usize = 4;

/// A call to be made.
type Call = Box<dyn FnOnce() + Send>;

/// Calls that wait for a thread. There are never more than requests under way.
#[derive(Default)]
pub(crate) struct Disk {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    calls: VecDeque<Call>,
    ended: bool,
}

impl Disk {
    /// Starts the threads. They end, their calls made, with [`Disk::stop`].
    pub fn start() -> Result<Arc<Disk>, Errno> {
        let disk = Arc::new(Disk::default());
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn every_call_is_made_even_after_a_panic_and_at_the_end() {
        let disk = Disk::start().unwrap();
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
}
