//! The transport over io_uring (Linux 6.14, protocol 7.42): one queue for each CPU, served by a
//! thread on that CPU.
//!
//! The kernel hands a request to the queue of the CPU that the client runs on, so the client's wake-up of
//! the worker, and the worker's of the client, stay on one CPU: a round trip is two context
//! switches, and never a wake-up of another, perhaps sleeping, CPU.
//!
//! It wants a queue for every CPU that is possible, be it there or not, and numbers them from zero
//! without gaps; who runs on a CPU with a higher number than the last queue's uses queue 0. Here a ring
//! with its thread serves the queue of each CPU that this process may run on, and one more ring, bound
//! to no CPU, all other queues: those of CPUs that are not there, that a container has not got, or
//! that an administrator set aside. So threads, descriptors and memory are bounded by the CPUs that are
//! used (computed in the tests below).
//!
//! A queue has a number of slots. A slot is a header, a payload area, and one command
//! under way: REGISTER gives the slot to the kernel; completed, the slot holds a request; COMMIT_AND_FETCH
//! gives it back with the answer. A request has its header, its fixed struct and its data in three places
//! of the slot; the answer's struct and data stand together in the payload. Who answers from another
//! thread leaves the answer with the ring and wakes its thread, since only that one may submit.
//!
//! Interrupts, forgets and notifications go through `/dev/fuse` as ever; one worker reads it.
//!
//! Once INIT has agreed on io_uring the kernel holds back every request until each queue has a
//! slot. So the rings are made, and a refusal (io_uring forbidden, by sysctl or by a container) seen,
//! before; what fails later ends the mount.
//!
//! A slot is taken for as long as its request is unanswered. Lock calls that wait may not take them all,
//! or the unlock that they wait for would find none; see `ring`.

mod aside;
mod memory;
mod ring;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use nix::errno::Errno;
use nix::sched::sched_getaffinity;
use nix::unistd::Pid;

pub use aside::settle_thread;
use aside::{Aside, Trail};
pub(crate) use ring::{Ring, Slot};

use crate::dev::{self, Blocking, Channel};
use crate::disk::Workers;
use crate::dispatch::Session;
use crate::error::Error;
use crate::volume::Volume;

/// The kernel's switch for FUSE over io_uring: `Y` or `N`, for all mounts made afterwards.
const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";
/// The CPUs that there may ever be.
const CPUS: &str = "/sys/devices/system/cpu/possible";

/// Whether the kernel offers FUSE over io_uring to new mounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offer {
    /// It does.
    On,
    /// It could.
    Off,
    /// It is too old, or was built without it.
    Missing,
}

impl Offer {
    /// What it says now.
    pub fn of_kernel() -> Offer {
        let switch = std::fs::read(SWITCH).or_else(|_| {
            // The module may not be loaded yet; opening the device does that.
            dev::open_device(Blocking::Yes)?;
            std::fs::read(SWITCH)
        });
        match switch.as_deref() {
            Ok([b'Y', ..]) => Offer::On,
            Ok(_) => Offer::Off,
            Err(_) => Offer::Missing,
        }
    }
}

/// Whether the kernel offers FUSE over io_uring to new mounts.
pub fn uring_enabled() -> bool {
    Offer::of_kernel() == Offer::On
}

/// Has the kernel offer FUSE over io_uring to every mount on this machine that is made from now on.
/// Needs root; does nothing if it is so already.
pub fn enable_uring() -> Result<(), Error> {
    match Offer::of_kernel() {
        Offer::On => Ok(()),
        Offer::Missing => Err(Error::UringMissing),
        Offer::Off => write_switch().map_err(|error| Error::Uring {
            doing: "switch it on in the kernel",
            source: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
        }),
    }
}

fn write_switch() -> std::io::Result<()> {
    use std::io::Write;
    std::fs::OpenOptions::new().write(true).open(Path::new(SWITCH))?.write_all(b"Y")
}

/// The rings of a mount to be, each with its thread waiting for a device.
pub(crate) struct Rings {
    /// How many of them serve a CPU of this process.
    of_cpus: usize,
    starts: Vec<Sender<Start>>,
    readies: Receiver<Result<(), Errno>>,
}

/// What a ring's thread gets when the mount is there.
type Start = (Arc<Channel>, Receiver<Serve>);

/// A ring that the kernel has, waiting to be served.
pub(crate) type Serve = Box<dyn FnOnce(ring::Runner) + Send>;

impl Rings {
    /// Makes the rings, each on a thread of its own.
    pub fn new() -> Result<Rings, Errno> {
        let (ready, readies) = channel();
        let mut rings = Rings { of_cpus: 0, starts: Vec::new(), readies };
        let own = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
        let trail = Arc::new(Trail::default());
        let may_step_aside = aside::is_allowed();
        let seats = seats(possible_cpus()?, |cpu| own.is_set(usize::from(cpu)).unwrap_or(false));
        for Seat { cpu, queues } in seats {
            rings.of_cpus += usize::from(cpu.is_some());
            let ring = Arc::new(Ring::new(cpu, &queues)?);
            let aside = Aside::new(trail.clone(), cpu.filter(|_| may_step_aside));
            let (start, started) = channel();
            let ready = ready.clone();
            thread::Builder::new()
                .name(cpu.map_or("fuse-ring".to_owned(), |cpu| format!("fuse-ring-{cpu}")))
                .spawn(move || run((ring, aside), &ready, &started))
                .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EAGAIN)))?;
            rings.starts.push(start);
        }
        rings.all_ready()?;
        Ok(rings)
    }

    /// What a thread of a ring may do for its clients.
    pub fn workers(&self) -> Workers {
        if self.of_cpus > 1 { Workers::Apart } else { Workers::Alone }
    }

    /// Gives every queue to the connection of `device`; through the result each ring begins to
    /// serve.
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
        let answers = self.starts.iter().map(|_| self.readies.recv().unwrap_or(Err(Errno::EPIPE)));
        answers.collect()
    }
}

/// A ring's thread: makes the ring, registers it, serves; ends early when its mount does not come.
fn run(
    (ring, aside): (Arc<Ring>, Aside),
    ready: &Sender<Result<(), Errno>>,
    started: &Receiver<Start>,
) {
    ring.pin();
    let mut runner = match ring::Runner::new(ring, aside) {
        Ok(runner) => runner,
        Err(errno) => {
            let _ = ready.send(Err(errno));
            return;
        }
    };
    let _ = ready.send(Ok(()));
    let Ok((device, served)) = started.recv() else { return };
    let registered = runner.register(&device);
    drop(device);
    let failed = registered.is_err();
    let _ = ready.send(registered);
    if let (false, Ok(serve)) = (failed, served.recv()) {
        serve(runner);
    }
}

/// A thread to be, with its CPU and the kernel's queues that it serves.
#[derive(Debug, PartialEq, Eq)]
struct Seat {
    cpu: Option<u16>,
    queues: Vec<u16>,
}

/// Which thread serves which of so many queues, on a process that may run on its `own` CPUs.
fn seats(queues: u16, own: impl Fn(u16) -> bool) -> Vec<Seat> {
    let (own, others): (Vec<u16>, Vec<u16>) = (0..queues).partition(|queue| own(*queue));
    let mut seats: Vec<Seat> =
        own.into_iter().map(|cpu| Seat { cpu: Some(cpu), queues: vec![cpu] }).collect();
    if !others.is_empty() {
        seats.push(Seat { cpu: None, queues: others });
    }
    seats
}

/// Serves a ring until the mount ends.
pub(crate) fn work<V: Volume>(session: &Session<V>, mut runner: ring::Runner) -> Result<(), Error> {
    runner.serve(session).map_err(|source| Error::Session { doing: "serve fuse ring", source })
}

/// How many CPUs the kernel counts as possible, and so how many queues it wants: of `0-3,8`, five.
fn possible_cpus() -> Result<u16, Errno> {
    let list = std::fs::read_to_string(CPUS).map_err(|_| Errno::ENOENT)?;
    count_of_list(&list).ok_or(Errno::EINVAL)
}

fn count_of_list(list: &str) -> Option<u16> {
    list.trim().split(',').try_fold(0u16, |count, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
        count.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::RING_TRANSFER_MAX;

    #[test]
    fn the_kernel_wants_a_queue_for_each_possible_cpu() {
        assert_eq!(count_of_list("0\n"), Some(1));
        assert_eq!(count_of_list("0-1\n"), Some(2));
        assert_eq!(count_of_list("0-3,8\n"), Some(5));
        assert_eq!(count_of_list("0,2-3\n"), Some(3));
        assert_eq!(count_of_list("0-65535"), None);
        assert_eq!(count_of_list("3-1"), None);
        assert_eq!(count_of_list(""), None);
    }

    #[test]
    fn a_thread_serves_each_cpu_of_ours_and_one_the_others() {
        let on = |cpu| Seat { cpu: Some(cpu), queues: vec![cpu] };
        let rest = |queues: &[u16]| Seat { cpu: None, queues: queues.to_vec() };
        assert_eq!(seats(2, |_| true), [on(0), on(1)]);
        // A container with two CPUs of four.
        assert_eq!(seats(4, |cpu| cpu == 1 || cpu == 3), [on(1), on(3), rest(&[0, 2])]);
        // CPUs 0 to 3 and 8: nobody runs on queue 4, and who runs on CPU 8 uses queue 0.
        assert_eq!(seats(5, |cpu| cpu < 4 || cpu == 8), [on(0), on(1), on(2), on(3), rest(&[4])]);
        assert_eq!(seats(3, |_| false), [rest(&[0, 1, 2])]);
    }

    /// What the rings of a mount cost, on a process that may run on `own` of `possible` CPUs.
    #[derive(Debug, PartialEq, Eq)]
    struct Needs {
        threads: usize,
        /// Of the rings and their wake-up counters.
        descriptors: usize,
        /// How many commands the kernel keeps, at some 400 bytes each.
        slots: usize,
        /// Address space in MiB. What is touched of it are the headers, and as much of the payloads as
        /// requests under way at one time have needed.
        address_space: usize,
    }

    fn needs(possible: u16, own: u16) -> Needs {
        let seats = seats(possible, |cpu| cpu < own);
        let slots = |seat: &Seat| {
            let slots = if seat.cpu.is_some() { ring::SLOTS } else { ring::SLOTS_FOREIGN };
            (seat.queues.len(), usize::from(slots))
        };
        let memory = |(queues, slots)| queues * memory::memory_len(slots, RING_TRANSFER_MAX);
        Needs {
            threads: seats.len(),
            descriptors: 2 * seats.len(),
            slots: seats.iter().map(slots).map(|(queues, slots)| queues * slots).sum(),
            address_space: seats.iter().map(slots).map(memory).sum::<usize>() >> 20,
        }
    }

    /// The figures of docs/decisions/0011-a-ring-for-each-cpu.md.
    #[test]
    fn rings_cost_what_the_record_says() {
        let check = |(possible, own), threads, slots, address_space| {
            let expected = Needs { threads, descriptors: 2 * threads, slots, address_space };
            assert_eq!(needs(possible, own), expected);
        };
        check((2, 2), 2, 512, 64);
        check((64, 64), 64, 16384, 2052);
        // A container with two of 64 CPUs.
        check((64, 2), 3, 2496, 312);
        // Two CPUs of a virtual machine to which 238 more can be added.
        check((240, 2), 3, 8128, 1018);
    }
}
