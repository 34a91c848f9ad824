//! One ring: the thread that serves it ([`Runner`]), the kernel's queues that it serves ([`Lane`])
//! with their slots, and what other threads see of it ([`Ring`]).
//!
//! Each slot is in one of two states: with the kernel, from the submission of a command until
//! its completion; here, from the completion until the next submission. `Lane::here` counts the
//! second, and only in it is the slot's memory touched. A slot whose command failed stays here.
//!
//! A lock call that waits keeps its slot, and the unlock that it waits for needs another one of
//! perhaps the same queue. While all slots of a queue are taken the kernel keeps further requests back,
//! and hands one out with each answer; it does not with a slot that is new. So a queue has all its slots
//! from the beginning, and a lock call that finds only [`RESERVE`] left is not allowed to wait: the call
//! that takes the last slot is answered, and with its answer comes the next one.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, ThreadId};

use io_uring::squeue::Entry128;
use io_uring::{EnterFlags, IoUring, cqueue, opcode, types};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::Pid;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::aside::Aside;
use super::memory::Memory;
use crate::abi::{self, InHeader, OutHeader, RingHeader};
use crate::dev::Channel;
use crate::disk::Clients;
use crate::dispatch::Session;
use crate::init::RING_TRANSFER_MAX;
use crate::reply::{Delivery, Responder};
use crate::request::Parts;
use crate::volume::Volume;

/// How many requests of one of our CPUs may be under way.
pub(super) const SLOTS: u16 = 256;
/// The same of a CPU that is not ours, where hardly ever somebody runs.
pub(super) const SLOTS_FOREIGN: u16 = 32;
/// How many of them no waiting lock call may take.
const RESERVE: usize = 16;
/// So many requests in a row, some commits long, say that a client is the only one at the moment.
const ONLY_ONE: u32 = 32;
/// Submissions that fit into the ring at once; with more, they are submitted in between.
const SUBMISSIONS: u32 = 32;
/// The completion of the read that others wake the thread by; slots are below it.
const WAKE: u64 = u64::MAX;

/// What every thread may do with a ring: answer a request of it.
#[derive(Debug)]
pub(crate) struct Ring {
    /// The CPU to run on; none serves queues of CPUs that this process does not run on.
    cpu: Option<u16>,
    lanes: Vec<Lane>,
    /// The thread that serves the ring, once it does.
    thread: OnceLock<ThreadId>,
    wake: EventFd,
    answers: Mutex<Answers>,
    client: LastClient,
}

/// One of the kernel's queues.
#[derive(Debug)]
struct Lane {
    /// The kernel's number of it, which is that of its CPU.
    qid: u16,
    slots: u16,
    /// How many slots are here. Written by the ring's thread alone.
    here: AtomicUsize,
}

/// A slot: of which lane of a ring, and which of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot {
    lane: u16,
    index: u16,
}

impl Slot {
    /// As a command carries it.
    fn user_data(self) -> u64 {
        u64::from(self.lane) << 16 | u64::from(self.index)
    }

    fn of_user_data(data: u64) -> Slot {
        Slot { lane: (data >> 16) as u16, index: data as u16 }
    }
}

/// Answers that wait to be submitted, their bodies one after the other.
#[derive(Debug, Default)]
struct Answers {
    heads: Vec<Head>,
    bodies: Vec<u8>,
    /// Nobody submits any more.
    ended: bool,
}

#[derive(Debug)]
struct Head {
    slot: Slot,
    unique: u64,
    error: i32,
    body: Body,
}

/// The body of an answer: how long it is, and where.
#[derive(Debug, Clone, Copy)]
enum Body {
    /// Among the bodies of its [`Answers`].
    Kept(usize),
    /// In the slot's payload already.
    InPlace(usize),
}

/// Who sent the last request. Written by the ring's thread alone.
#[derive(Debug, Default)]
struct LastClient {
    /// Its thread, by the kernel's number.
    thread: AtomicU32,
    /// How many requests in a row were from it.
    requests: AtomicU32,
    /// Other requests have been seen behind it.
    has_followers: AtomicBool,
}

impl LastClient {
    /// `thread` sent a request. It is 0 of everybody who is out of sight: in a container beside this one.
    fn note(&self, thread: u32, has_followers: bool) {
        self.has_followers.store(has_followers, Ordering::Relaxed);
        if thread == 0 {
            return self.requests.store(0, Ordering::Relaxed);
        }
        let known = if self.thread.load(Ordering::Relaxed) == thread {
            self.requests.load(Ordering::Relaxed)
        } else {
            self.thread.store(thread, Ordering::Relaxed);
            0
        };
        self.requests.store(known.saturating_add(1), Ordering::Relaxed);
    }

    /// The thread that sent the last request, and how many in a row.
    fn row(&self) -> (u32, u32) {
        (self.thread.load(Ordering::Relaxed), self.requests.load(Ordering::Relaxed))
    }

    fn is_only_one(&self) -> bool {
        let has_followers = self.has_followers.load(Ordering::Relaxed);
        !has_followers && self.requests.load(Ordering::Relaxed) >= ONLY_ONE
    }
}

impl Ring {
    /// A ring for the kernel's queues with these numbers, served on `cpu` if there is one.
    pub fn new(cpu: Option<u16>, queues: &[u16]) -> Result<Ring, Errno> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        let (thread, answers) = (OnceLock::new(), Mutex::default());
        let slots = if cpu.is_some() { SLOTS } else { SLOTS_FOREIGN };
        let lane = |qid: &u16| Lane { qid: *qid, slots, here: AtomicUsize::new(0) };
        let lanes = queues.iter().map(lane).collect();
        Ok(Ring { cpu, lanes, thread, wake, answers, client: LastClient::default() })
    }

    /// Runs the current thread on the ring's CPU. A CPU that is not to be had any more costs time
    /// and nothing else.
    pub fn pin(&self) {
        let Some(cpu) = self.cpu else { return };
        let mut set = CpuSet::new();
        let pinned = set.set(usize::from(cpu));
        if let Err(error) = pinned.and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)) {
            tracing::debug!(cpu, %error, "pin fuse ring thread");
        }
    }

    /// Answers the request in `slot`, from any thread.
    pub fn answer(&self, slot: Slot, unique: u64, error: i32, body: &[u8]) -> Delivery {
        let head = Head { slot, unique, error, body: Body::Kept(body.len()) };
        self.leave(head, body)
    }

    /// Answers the request in `slot` with what is in the first `len` bytes of its payload.
    pub fn answer_in_place(&self, slot: Slot, unique: u64, len: usize) -> Delivery {
        self.leave(Head { slot, unique, error: 0, body: Body::InPlace(len) }, &[])
    }

    fn leave(&self, head: Head, body: &[u8]) -> Delivery {
        let mut answers = self.answers.lock().unwrap();
        if answers.ended {
            return Delivery::Gone;
        }
        let is_first = answers.heads.is_empty();
        answers.heads.push(head);
        answers.bodies.extend_from_slice(body);
        drop(answers);
        // The ring's own thread looks after each request; others wake it, the first for all.
        if is_first && self.thread.get() != Some(&thread::current().id()) {
            let _ = self.wake.write(1);
        }
        Delivery::Taken
    }

    /// Whether the queue of `slot` has so few others left that no lock call should wait in it.
    pub fn is_crowded(&self, slot: Slot) -> bool {
        let lane = &self.lanes[usize::from(slot.lane)];
        lane.here.load(Ordering::Relaxed) + RESERVE > usize::from(lane.slots)
    }

    /// Whom the ring's thread serves at the moment.
    pub fn clients(&self) -> Clients {
        // One is the request that asks.
        if self.unanswered() == 1 && self.client.is_only_one() {
            Clients::One
        } else {
            Clients::Many
        }
    }

    /// How many requests are here and not answered.
    fn unanswered(&self) -> usize {
        self.lanes.iter().map(|lane| lane.here.load(Ordering::Relaxed)).sum()
    }

    /// How many slots there are in all queues.
    fn slots(&self) -> u32 {
        self.lanes.iter().map(|lane| u32::from(lane.slots)).sum()
    }
}

/// The thread of a ring: the only one that touches the ring itself and its slots.
pub(crate) struct Runner {
    // First, so that the kernel is done with the memory before it goes.
    io: IoUring<Entry128>,
    /// The slots of each lane.
    memories: Vec<Memory>,
    ring: Arc<Ring>,
    /// Where the read of the wake-up counter goes.
    woken: Box<u64>,
    /// Taken from the ring, being submitted.
    answers: Answers,
    aside: Aside,
}

/// The device in a submission: the ring's first file. So the count of who uses the device, which all
/// rings would share, is not touched for each request.
const DEVICE: types::Fixed = types::Fixed(0);

impl Runner {
    /// Makes the ring. The thread that calls this is the one that serves.
    pub fn new(ring: Arc<Ring>, aside: Aside) -> Result<Runner, Errno> {
        let io = IoUring::<Entry128>::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            // One of each slot, and the wake-up.
            .setup_cqsize(ring.slots() + 1)
            .build(SUBMISSIONS)
            .map_err(|error| errno(&error))?;
        let is_new = ring.thread.set(thread::current().id()).is_ok();
        assert!(is_new, "one thread serves a ring");
        let (memories, answers) = (Vec::new(), Answers::default());
        Ok(Runner { io, memories, ring, woken: Box::default(), answers, aside })
    }

    /// Gives the slots of each queue to the kernel.
    pub fn register(&mut self, device: &Channel) -> Result<(), Errno> {
        let file = device.as_fd().as_raw_fd();
        self.io.submitter().register_files(&[file]).map_err(|error| errno(&error))?;
        self.read_wake()?;
        for lane in 0..self.ring.lanes.len() {
            self.register_lane(lane as u16)?;
        }
        // A request cannot have come yet: requests wait until every queue is registered, and
        // completions of those that do wait for the first call that asks for them.
        match self.io.completion().map(|completion| completion.result()).find(|code| *code < 0) {
            Some(code) => Err(Errno::from_raw(-code)),
            None => Ok(()),
        }
    }

    fn register_lane(&mut self, lane: u16) -> Result<(), Errno> {
        let Lane { qid, slots, .. } = *self.lane(lane);
        let memory = Memory::new(usize::from(slots), RING_TRANSFER_MAX)?;
        let vectors: Vec<_> = (0..slots).map(|slot| memory.vectors(usize::from(slot))).collect();
        self.memories.push(memory);
        for (index, vectors) in (0..slots).zip(&vectors) {
            let mut register = opcode::UringCmd80::new(DEVICE, abi::RING_REGISTER)
                .cmd(command(qid, 0))
                .addr(Some(vectors.as_ptr() as u64))
                .build()
                .user_data(Slot { lane, index }.user_data());
            set_len(&mut register, vectors.len() as u32);
            self.push(register)?;
        }
        // Here, since the kernel reads the vectors now.
        self.submit()
    }

    fn lane(&self, lane: u16) -> &Lane {
        &self.ring.lanes[usize::from(lane)]
    }

    /// Serves requests until the mount ends.
    pub fn serve<V: Volume>(&mut self, session: &Session<V>) -> Result<(), Errno> {
        let mut buffer = vec![0; RING_TRANSFER_MAX];
        let served = self.serve_with(session, &mut buffer);
        self.ring.answers.lock().unwrap().ended = true;
        match served {
            Err(Errno::ENOTCONN | Errno::ECONNABORTED | Errno::ENODEV | Errno::ECANCELED) => Ok(()),
            other => other,
        }
    }

    fn serve_with<V: Volume>(
        &mut self,
        session: &Session<V>,
        buffer: &mut [u8],
    ) -> Result<(), Errno> {
        loop {
            let begin = self.aside.begin_wait();
            match self.wait() {
                Ok(()) | Err(Errno::EINTR | Errno::EAGAIN | Errno::EBUSY) => {}
                Err(errno) => return Err(errno),
            }
            self.aside.end_wait(begin);
            while let Some(completion) = self.next_completion() {
                self.complete(session, &completion, buffer)?;
                // Nobody's answer waits until the next request is served.
                if !self.io.completion().is_empty() {
                    self.submit()?;
                }
            }
        }
    }

    /// Submits what there is and waits for a completion. Linux 6.15 and later can be told that it is no
    /// disk that we wait for: before, an idle mount counts as pressure on one (`/proc/pressure/io`).
    fn wait(&mut self) -> Result<(), Errno> {
        let mut flags = EnterFlags::GETEVENTS;
        flags.set(EnterFlags::NO_IOWAIT, self.io.params().is_feature_no_iowait());
        let queued = self.io.submission().len() as u32;
        // SAFETY: the queues are the ring's own, and no argument goes with the call.
        let waited =
            unsafe { self.io.submitter().enter::<libc::sigset_t>(queued, 1, flags.bits(), None) };
        waited.map(drop).map_err(|error| errno(&error))
    }

    fn next_completion(&mut self) -> Option<cqueue::Entry> {
        self.io.completion().next()
    }

    /// A command is done: there is a request, or somebody left an answer.
    fn complete<V: Volume>(
        &mut self,
        session: &Session<V>,
        completion: &cqueue::Entry,
        buffer: &mut [u8],
    ) -> Result<(), Errno> {
        if completion.user_data() == WAKE {
            self.read_wake()?;
            return self.submit_answers();
        }
        let slot = Slot::of_user_data(completion.user_data());
        let here = &self.lane(slot.lane).here;
        here.store(here.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        if completion.result() < 0 {
            return self.lost(slot, Errno::from_raw(-completion.result()));
        }
        let has_followers = !self.io.completion().is_empty();
        self.serve_slot(session, (slot, has_followers), buffer)?;
        let (client, row) = self.ring.client.row();
        self.aside.served(client, row);
        self.submit_answers()
    }

    fn serve_slot<V: Volume>(
        &self,
        session: &Session<V>,
        (slot, has_followers): (Slot, bool),
        buffer: &mut [u8],
    ) -> Result<(), Errno> {
        let (memory, place) = self.place(slot);
        // SAFETY: the slot's command was completed just now, and the next one is submitted by
        // `submit_answers`, after this call.
        let header = unsafe { memory.read_header(place) };
        let Ok((request, _)) = InHeader::read_from_prefix(&header.in_out) else {
            return Err(Errno::EPROTO);
        };
        self.ring.client.note(request.pid, has_followers);
        let ring = self.ring.clone();
        if request.opcode == abi::op::READ {
            // It has no payload itself, so what it asks for is read to where the kernel takes it from.
            let parts = Parts { header: request, fixed: &header.op_in, rest: &[] };
            let responder = Responder::into_slot(ring, slot, request.unique);
            // SAFETY: as above, and no other slice of the payload is made in this call.
            session.serve(&parts, responder, unsafe { memory.payload_mut(place) });
            return Ok(());
        }
        let len = header.entry.payload_sz as usize;
        // SAFETY: as above, and an answer waits elsewhere until `submit_answers`.
        let payload = unsafe { memory.read_payload(place, len) };
        let parts = Parts { header: request, fixed: &header.op_in, rest: payload };
        session.serve(&parts, Responder::over_ring(ring, slot, request.unique), buffer);
        Ok(())
    }

    /// A command failed: with the connection, or it alone, and its slot is of no more use.
    fn lost(&self, slot: Slot, errno: Errno) -> Result<(), Errno> {
        match errno {
            Errno::ENOTCONN | Errno::ECONNABORTED | Errno::ENODEV | Errno::ECANCELED => Err(errno),
            errno => {
                tracing::error!(queue = self.lane(slot.lane).qid, %errno, "fuse ring command");
                Ok(())
            }
        }
    }

    /// Submits the answers that were left so far; they reach their clients with this.
    fn submit_answers(&mut self) -> Result<(), Errno> {
        let mut left = self.ring.answers.lock().unwrap();
        if left.heads.is_empty() {
            return Ok(());
        }
        std::mem::swap(&mut *left, &mut self.answers);
        drop(left);
        let mut answers = std::mem::take(&mut self.answers);
        let mut start = 0;
        for head in answers.heads.drain(..) {
            let Body::Kept(len) = head.body else {
                self.commit(&head, None)?;
                continue;
            };
            let body = &answers.bodies[start..start + len];
            start += len;
            self.commit(&head, Some(body))?;
        }
        answers.bodies.clear();
        self.answers = answers;
        Ok(())
    }

    /// Gives a slot back to the kernel with its answer; `body` is none where it is in the payload already.
    fn commit(&mut self, head: &Head, body: Option<&[u8]>) -> Result<(), Errno> {
        let (Body::Kept(len) | Body::InPlace(len)) = head.body;
        let out = OutHeader {
            len: (size_of::<OutHeader>() + len) as u32,
            error: head.error,
            unique: head.unique,
        };
        let mut header = RingHeader::new_zeroed();
        header.in_out[..size_of::<OutHeader>()].copy_from_slice(out.as_bytes());
        header.entry.commit_id = head.unique;
        header.entry.payload_sz = len as u32;
        let (memory, place) = self.place(head.slot);
        // SAFETY: the request in the slot was completed and is answered only once, so no command of
        // the slot is under way; no slice of its payload lives longer than `serve_slot`, which is over.
        unsafe {
            memory.write_header(place, &header);
            if let Some(body) = body {
                memory.write_payload(place, body);
            }
        }
        let lane = self.lane(head.slot.lane);
        lane.here.store(lane.here.load(Ordering::Relaxed) - 1, Ordering::Relaxed);
        let commit = opcode::UringCmd80::new(DEVICE, abi::RING_COMMIT_AND_FETCH)
            .cmd(command(lane.qid, head.unique))
            .build()
            .user_data(head.slot.user_data());
        self.push(commit)
    }

    /// Where a slot is.
    fn place(&self, slot: Slot) -> (&Memory, usize) {
        (&self.memories[usize::from(slot.lane)], usize::from(slot.index))
    }

    /// Asks to be woken again.
    fn read_wake(&mut self) -> Result<(), Errno> {
        let wake = types::Fd(self.ring.wake.as_fd().as_raw_fd());
        let into: *mut u64 = &raw mut *self.woken;
        let read = opcode::Read::new(wake, into.cast(), size_of::<u64>() as u32);
        self.push(Entry128::from(read.build().user_data(WAKE)))
    }

    fn push(&mut self, entry: Entry128) -> Result<(), Errno> {
        // SAFETY: what the entry points to lives as long as its command: the slots and the counter
        // until the ring is gone, the vectors until `register_lane` has submitted them.
        if unsafe { self.io.submission().push(&entry) }.is_ok() {
            return Ok(());
        }
        self.submit()?;
        // SAFETY: as above.
        unsafe { self.io.submission().push(&entry) }.map_err(|_| Errno::EBUSY)
    }

    fn submit(&self) -> Result<(), Errno> {
        loop {
            match self.io.submit().map_err(|error| errno(&error)) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

/// The command area of a submission.
fn command(qid: u16, commit_id: u64) -> [u8; 80] {
    let command = abi::RingCommand { commit_id, qid, ..abi::RingCommand::default() };
    let mut area = [0; 80];
    area[..size_of::<abi::RingCommand>()].copy_from_slice(command.as_bytes());
    area
}

/// Sets `len` of a submission, which the library's builder leaves out for this operation.
fn set_len(entry: &mut Entry128, len: u32) {
    /// Where `struct io_uring_sqe` has `len`, in units of its size.
    const LEN: usize = 24 / size_of::<u32>();
    // SAFETY: an `Entry128` is `#[repr(C)]` and the kernel's struct of 128 bytes, aligned to 8.
    unsafe { (&raw mut *entry).cast::<u32>().add(LEN).write(len) };
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_sends_many_requests_in_a_row_is_the_only_client() {
        let client = LastClient::default();
        let send = |thread| {
            client.note(thread, false);
            client.is_only_one()
        };
        assert!((1..ONLY_ONE).all(|_| !send(7)));
        assert!(send(7) && send(7));
        assert!(!send(8));
        assert!((1..ONLY_ONE).all(|_| !send(7)));
        assert!(send(7));
        client.note(7, true);
        assert!(!client.is_only_one(), "somebody else is waiting");
        assert!(send(7));
        assert!((0..2 * ONLY_ONE).all(|_| !send(0)), "these may be many");
    }
}
