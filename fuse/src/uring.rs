//! The transport over io_uring (Linux 6.14, protocol 7.42): one queue for each CPU, served by a
//! thread on that CPU.
//!
//! The kernel hands a request to the queue of the CPU that the client runs on, so the client's wake-up of
//! the worker, and the worker's of the client, stay on one CPU: a round trip is two context
//! switches, and never a wake-up of another, perhaps sleeping, CPU.
//!
//! A queue is a ring with a number of slots. A slot is a header, a payload area, and one command
//! under way: REGISTER gives the slot to the kernel; completed, the slot holds a request; COMMIT_AND_FETCH
//! gives it back with the answer. A request has its header, its fixed struct and its data in three places
//! of the slot; the answer's struct and data stand together in the payload. Who answers from another
//! thread leaves the answer with the queue and wakes its thread, since only that one may submit.
//!
//! Interrupts, forgets and notifications go through `/dev/fuse` as ever; one worker reads it.
//!
//! Once INIT has agreed on io_uring the kernel holds back every request until each queue has a
//! slot. So the rings are made, and a refusal (io_uring forbidden, by sysctl or by a container) seen,
//! before; what fails later ends the mount.
//!
//! A slot is taken for as long as its request is unanswered. Lock calls that wait may not take them all,
//! or the unlock that they wait for would find none, so a queue grows; see `queue`.

mod memory;
mod queue;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use nix::errno::Errno;

pub(crate) use queue::Queue;

use crate::dev::Channel;
use crate::dispatch::Session;
use crate::error::Error;
use crate::volume::Volume;

/// The kernel's switch for FUSE over io_uring: `Y` or `N`, for all mounts made afterwards.
const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";
/// The CPUs that there may ever be; the kernel wants a queue for each.
const CPUS: &str = "/sys/devices/system/cpu/possible";

/// Whether the kernel offers FUSE over io_uring to new mounts.
pub fn uring_enabled() -> bool {
    std::fs::read(SWITCH).is_ok_and(|switch| switch.first() == Some(&b'Y'))
}

/// Has the kernel offer FUSE over io_uring to every mount on this machine that is made from now on.
/// Needs root; does nothing if it is so already.
pub fn enable_uring() -> Result<(), Error> {
    if uring_enabled() {
        return Ok(());
    }
    write_switch().map_err(|error| Error::Session {
        doing: "enable fuse over io_uring",
        source: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
    })
}

fn write_switch() -> std::io::Result<()> {
    use std::io::Write;
    std::fs::OpenOptions::new().write(true).open(Path::new(SWITCH))?.write_all(b"Y")
}

/// The queues of a mount to be, each with its thread waiting for a device.
pub(crate) struct Queues {
    starts: Vec<Sender<Start>>,
    readies: Receiver<Result<(), Errno>>,
    queues: Vec<Arc<Queue>>,
}

/// What a queue's thread gets when the mount is there.
type Start = (Arc<Channel>, Receiver<Serve>);

/// A queue that the kernel has, waiting to be served.
pub(crate) type Serve = Box<dyn FnOnce(queue::Runner) + Send>;

impl Queues {
    /// Makes a ring for each CPU, on a thread of its own.
    pub fn new() -> Result<Queues, Errno> {
        let (ready, readies) = channel();
        let mut queues = Queues { starts: Vec::new(), readies, queues: Vec::new() };
        for id in 0..possible_cpus()? {
            let queue = Arc::new(Queue::new(id)?);
            let (start, started) = channel();
            let (ready, thread_queue) = (ready.clone(), queue.clone());
            thread::Builder::new()
                .name(format!("fuse-ring-{id}"))
                .spawn(move || run(thread_queue, &ready, &started))
                .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EAGAIN)))?;
            queues.starts.push(start);
            queues.queues.push(queue);
        }
        queues.all_ready()?;
        Ok(queues)
    }

    /// Gives every queue to the connection of `device`; through the result each begins to serve.
    pub fn register(self, device: &Arc<Channel>) -> Result<Vec<Sender<Serve>>, Errno> {
        let mut serves = Vec::new();
        for start in &self.starts {
            let (serve, served) = channel();
            start.send((device.clone(), served)).map_err(|_| Errno::EPIPE)?;
            serves.push(serve);
        }
        self.all_ready()?;
        Ok(serves)
    }

    /// Waits for an answer of each thread; the first failure.
    fn all_ready(&self) -> Result<(), Errno> {
        let answers = self.queues.iter().map(|_| self.readies.recv().unwrap_or(Err(Errno::EPIPE)));
        answers.collect()
    }
}

/// A queue's thread: makes the ring, registers it, serves; ends early when its mount does not come.
fn run(queue: Arc<Queue>, ready: &Sender<Result<(), Errno>>, started: &Receiver<Start>) {
    queue.pin();
    let mut runner = match queue::Runner::new(queue) {
        Ok(runner) => runner,
        Err(errno) => {
            let _ = ready.send(Err(errno));
            return;
        }
    };
    let _ = ready.send(Ok(()));
    let Ok((device, served)) = started.recv() else { return };
    let registered = runner.register(device);
    let failed = registered.is_err();
    let _ = ready.send(registered);
    if let (false, Ok(serve)) = (failed, served.recv()) {
        serve(runner);
    }
}

/// Serves a queue until the mount ends.
pub(crate) fn work<V: Volume>(
    session: &Session<V>,
    mut runner: queue::Runner,
) -> Result<(), Error> {
    runner.serve(session).map_err(|source| Error::Session { doing: "serve fuse ring", source })
}

/// How many CPUs the kernel counts: of `0-3,8`, nine.
fn possible_cpus() -> Result<u16, Errno> {
    let list = std::fs::read_to_string(CPUS).map_err(|_| Errno::ENOENT)?;
    count_of_list(&list).ok_or(Errno::EINVAL)
}

fn count_of_list(list: &str) -> Option<u16> {
    let last = list.trim().rsplit([',', '-']).next()?;
    last.parse::<u16>().ok()?.checked_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_queue_for_the_last_possible_cpu() {
        assert_eq!(count_of_list("0\n"), Some(1));
        assert_eq!(count_of_list("0-1\n"), Some(2));
        assert_eq!(count_of_list("0-3,8\n"), Some(9));
        assert_eq!(count_of_list("65535"), None);
        assert_eq!(count_of_list(""), None);
    }
}
