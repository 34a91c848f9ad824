//! One queue: its slots, its ring, and the thread that serves it ([`Runner`]), and what other
//! threads see of it ([`Queue`]).
//!
//! Each slot is in one of two states: with the kernel, from the submission of a command until
//! its completion; here, from the completion until the next submission. `Runner::here` counts the
//! second, and only in it is the slot's memory touched.
//!
//! A lock call that waits keeps its slot, and the unlock that it waits for needs another one of
//! perhaps the same queue. So a queue begins with [`CHUNK`] slots and gets as many again whenever few are left,
//! up to [`SLOTS_MAX`]; from there on a lock call is not allowed to wait. Slots are never given
//! back. A queue with all its slots in use has 256 MiB of address space for payloads, of which
//! a waiting lock call has touched nothing; a queue at rest has 4 MiB, two descriptors, and one
//! thread. 64 CPUs at rest: 256 MiB of address space, 128 descriptors.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, ThreadId};

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::Pid;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::memory::Memory;
use crate::abi::{self, InHeader, OutHeader, RingHeader};
use crate::dev::Channel;
use crate::dispatch::Session;
use crate::init::RING_TRANSFER_MAX;
use crate::reply::{Delivery, Responder};
use crate::request::Parts;
use crate::volume::Volume;

/// How many slots a queue begins with and grows by.
const CHUNK: usize = 16;
/// How many requests of one CPU may be under way at most.
const SLOTS_MAX: usize = 1024;
/// With fewer slots than this with the kernel, a queue grows, or is crowded.
const FREE_MIN: usize = 4;
/// Submissions that fit into the ring at once; with more, they are submitted in between.
const SUBMISSIONS: u32 = 32;
/// Completions that fit into the ring: one of each slot, and more.
const COMPLETIONS: u32 = 2 * SLOTS_MAX as u32;
/// The completion of the read that others wake the thread by; slots are below it.
const WAKE: u64 = u64::MAX;

/// What every thread may do with a queue: answer a request of it.
#[derive(Debug)]
pub(crate) struct Queue {
    id: u16,
    /// The thread that serves the queue, once it does.
    thread: Mutex<Option<ThreadId>>,
    wake: EventFd,
    answers: Mutex<Answers>,
    /// How many slots there are, and how many of them are here.
    slots: AtomicUsize,
    here: AtomicUsize,
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
    slot: u16,
    unique: u64,
    error: i32,
    len: usize,
}

impl Queue {
    /// The queue of CPU `id`.
    pub fn new(id: u16) -> Result<Queue, Errno> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        let (thread, answers) = (Mutex::default(), Mutex::default());
        let (slots, here) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Ok(Queue { id, thread, wake, answers, slots, here })
    }

    /// Runs the current thread on the queue's CPU, if there is one and it may.
    pub fn pin(&self) {
        let mut set = CpuSet::new();
        let pinned = set.set(usize::from(self.id));
        if let Err(error) = pinned.and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)) {
            tracing::debug!(cpu = self.id, %error, "pin fuse ring thread");
        }
    }

    /// Answers the request in `slot`, from any thread.
    pub fn answer(&self, slot: u16, unique: u64, error: i32, body: &[u8]) -> Delivery {
        let mut answers = self.answers.lock().unwrap();
        if answers.ended {
            return Delivery::Gone;
        }
        let is_first = answers.heads.is_empty();
        answers.heads.push(Head { slot, unique, error, len: body.len() });
        answers.bodies.extend_from_slice(body);
        drop(answers);
        // The queue's own thread looks after each request; others wake it, the first for all.
        if is_first && *self.thread.lock().unwrap() != Some(thread::current().id()) {
            let _ = self.wake.write(1);
        }
        Delivery::Taken
    }

    /// Whether so many slots are taken, and no more to be had, that no lock call should wait in one.
    pub fn is_crowded(&self) -> bool {
        self.slots.load(Ordering::Relaxed) >= SLOTS_MAX && self.is_short()
    }

    /// Whether few slots are left.
    fn is_short(&self) -> bool {
        self.here.load(Ordering::Relaxed) + FREE_MIN > self.slots.load(Ordering::Relaxed)
    }
}

/// The thread of a queue: the only one that touches its ring and its slots.
pub(crate) struct Runner {
    // First, so that the kernel is done with the memory before it goes.
    ring: IoUring<Entry128>,
    /// The slots, [`CHUNK`] in each.
    chunks: Vec<Memory>,
    queue: Arc<Queue>,
    device: Option<Arc<Channel>>,
    /// Where the read of the wake-up counter goes.
    woken: Box<u64>,
    /// Taken from the queue, being submitted.
    answers: Answers,
}

impl Runner {
    /// Makes the ring. The thread that calls this is the one that serves.
    pub fn new(queue: Arc<Queue>) -> Result<Runner, Errno> {
        let ring = IoUring::<Entry128>::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .setup_cqsize(COMPLETIONS)
            .build(SUBMISSIONS)
            .map_err(|error| errno(&error))?;
        *queue.thread.lock().unwrap() = Some(thread::current().id());
        let (chunks, answers) = (Vec::new(), Answers::default());
        Ok(Runner { ring, chunks, queue, device: None, woken: Box::default(), answers })
    }

    /// Gives the first slots to the kernel.
    pub fn register(&mut self, device: Arc<Channel>) -> Result<(), Errno> {
        self.device = Some(device);
        self.read_wake()?;
        self.grow()?;
        // A request cannot have come yet: requests wait until every queue is registered, and
        // completions of those that do wait for the first call that asks for them.
        match self.ring.completion().map(|completion| completion.result()).find(|code| *code < 0) {
            Some(code) => Err(Errno::from_raw(-code)),
            None => Ok(()),
        }
    }

    /// Gives [`CHUNK`] more slots to the kernel.
    fn grow(&mut self) -> Result<(), Errno> {
        let memory = Memory::new(CHUNK, RING_TRANSFER_MAX);
        let vectors: Vec<_> = (0..CHUNK).map(|slot| memory.vectors(slot)).collect();
        let first = self.chunks.len() * CHUNK;
        self.chunks.push(memory);
        for (slot, vectors) in (first..).zip(&vectors) {
            let mut register = opcode::UringCmd80::new(self.descriptor()?, abi::RING_REGISTER)
                .cmd(command(self.queue.id, 0))
                .addr(Some(vectors.as_ptr() as u64))
                .build()
                .user_data(slot as u64);
            set_len(&mut register, vectors.len() as u32);
            self.push(register)?;
        }
        // Here, since the kernel reads the vectors now.
        self.submit()?;
        self.queue.slots.fetch_add(CHUNK, Ordering::Relaxed);
        Ok(())
    }

    /// Serves requests until the mount ends.
    pub fn serve<V: Volume>(&mut self, session: &Session<V>) -> Result<(), Errno> {
        let mut buffer = vec![0; RING_TRANSFER_MAX];
        let served = self.serve_with(session, &mut buffer);
        self.queue.answers.lock().unwrap().ended = true;
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
            match self.ring.submit_and_wait(1).map_err(|error| errno(&error)) {
                Ok(_) | Err(Errno::EINTR | Errno::EAGAIN | Errno::EBUSY) => {}
                Err(errno) => return Err(errno),
            }
            while let Some(completion) = self.next_completion() {
                self.complete(session, &completion, buffer)?;
                self.submit_answers()?;
                if self.queue.is_short() && self.chunks.len() * CHUNK < SLOTS_MAX {
                    self.grow()?;
                }
                // Nobody's answer waits until the next request is served.
                if !self.ring.completion().is_empty() {
                    self.submit()?;
                }
            }
        }
    }

    fn next_completion(&mut self) -> Option<cqueue::Entry> {
        self.ring.completion().next()
    }

    /// A command is done: there is a request, or somebody left an answer.
    fn complete<V: Volume>(
        &mut self,
        session: &Session<V>,
        completion: &cqueue::Entry,
        buffer: &mut [u8],
    ) -> Result<(), Errno> {
        if completion.user_data() == WAKE {
            return self.read_wake();
        }
        if completion.result() < 0 {
            return self.lost(Errno::from_raw(-completion.result()));
        }
        let slot = completion.user_data() as u16;
        self.queue.here.fetch_add(1, Ordering::Relaxed);
        let (memory, place) = self.place(slot);
        // SAFETY: the slot's command was completed just now, and the next one is submitted by
        // `submit_answers`, after this call.
        let (header, payload) = unsafe {
            let header = memory.read_header(place);
            let len = header.entry.payload_sz as usize;
            (header, memory.read_payload(place, len))
        };
        let Ok((request, _)) = InHeader::read_from_prefix(&header.in_out) else {
            return Err(Errno::EPROTO);
        };
        let parts = Parts { header: request, fixed: &header.op_in, rest: payload };
        let responder = Responder::over_ring(self.queue.clone(), slot, request.unique);
        session.serve(&parts, responder, buffer);
        Ok(())
    }

    /// A command failed: with the connection, or it alone, and its slot is of no more use.
    fn lost(&self, errno: Errno) -> Result<(), Errno> {
        match errno {
            Errno::ENOTCONN | Errno::ECONNABORTED | Errno::ENODEV | Errno::ECANCELED => Err(errno),
            errno => {
                tracing::error!(cpu = self.queue.id, %errno, "fuse ring command");
                Ok(())
            }
        }
    }

    /// Submits the answers that were left so far; they reach their clients with this.
    fn submit_answers(&mut self) -> Result<(), Errno> {
        let mut left = self.queue.answers.lock().unwrap();
        if left.heads.is_empty() {
            return Ok(());
        }
        std::mem::swap(&mut *left, &mut self.answers);
        drop(left);
        let mut answers = std::mem::take(&mut self.answers);
        let mut start = 0;
        for head in answers.heads.drain(..) {
            let body = &answers.bodies[start..start + head.len];
            start += head.len;
            self.commit(&head, body)?;
        }
        answers.bodies.clear();
        self.answers = answers;
        Ok(())
    }

    /// Gives a slot back to the kernel with its answer.
    fn commit(&mut self, head: &Head, body: &[u8]) -> Result<(), Errno> {
        let out = OutHeader {
            len: (size_of::<OutHeader>() + body.len()) as u32,
            error: head.error,
            unique: head.unique,
        };
        let mut header = RingHeader::new_zeroed();
        header.in_out[..size_of::<OutHeader>()].copy_from_slice(out.as_bytes());
        header.entry.commit_id = head.unique;
        header.entry.payload_sz = body.len() as u32;
        let (memory, place) = self.place(head.slot);
        // SAFETY: the request in the slot was completed and is answered only once, so no command of
        // the slot is under way; no slice of its payload lives outside `complete`.
        unsafe {
            memory.write_header(place, &header);
            memory.write_payload(place, body);
        }
        self.queue.here.fetch_sub(1, Ordering::Relaxed);
        let commit = opcode::UringCmd80::new(self.descriptor()?, abi::RING_COMMIT_AND_FETCH)
            .cmd(command(self.queue.id, head.unique))
            .build()
            .user_data(u64::from(head.slot));
        self.push(commit)
    }

    /// Where a slot is.
    fn place(&self, slot: u16) -> (&Memory, usize) {
        let slot = usize::from(slot);
        (&self.chunks[slot / CHUNK], slot % CHUNK)
    }

    fn descriptor(&self) -> Result<types::Fd, Errno> {
        let device = self.device.as_ref().ok_or(Errno::ENOTCONN)?;
        Ok(types::Fd(device.as_fd().as_raw_fd()))
    }

    /// Asks to be woken again.
    fn read_wake(&mut self) -> Result<(), Errno> {
        let wake = types::Fd(self.queue.wake.as_fd().as_raw_fd());
        let into: *mut u64 = &raw mut *self.woken;
        let read = opcode::Read::new(wake, into.cast(), size_of::<u64>() as u32);
        self.push(Entry128::from(read.build().user_data(WAKE)))
    }

    fn push(&mut self, entry: Entry128) -> Result<(), Errno> {
        // SAFETY: what the entry points to lives as long as its command: the slots and the counter
        // until the ring is gone, the vectors until `grow` has submitted them.
        if unsafe { self.ring.submission().push(&entry) }.is_ok() {
            return Ok(());
        }
        self.submit()?;
        // SAFETY: as above.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| Errno::EBUSY)
    }

    fn submit(&self) -> Result<(), Errno> {
        loop {
            match self.ring.submit().map_err(|error| errno(&error)) {
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
