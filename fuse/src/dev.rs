//! The transport over `/dev/fuse`: workers that read a request, serve it, and read the next.
//!
//! A request must be answered through the descriptor that it was read from, and can be answered
//! from any thread; [`Channel`] is such a descriptor. Each worker has two of its own
//! (FUSE_DEV_IOC_CLONE), one that waits and one that does not, and two buffers, for as long as it
//! lives. It ends when the mount does.
//!
//! To wake a worker that sleeps in read(2) costs more than to serve a lock call, most of all if it sleeps
//! on an idle virtual CPU. So while requests come quickly, a worker asks for the next one again and again
//! for a short time, giving its CPU to whoever wants it in between, before it waits. It uses no
//! CPU when nothing comes. On two CPUs this takes a third to two thirds off a lock call when
//! client and worker run apart, and nothing is lost when they run on one (`benches/lock_round_trip`).

use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::uio::writev;
use zerocopy::IntoBytes;

use crate::abi::{InHeader, OutHeader, READ_BUFFER_MIN, WriteIn};
use crate::dispatch::Session;
use crate::error::Error;
use crate::init::TRANSFER_MAX;
use crate::ioctl;
use crate::reply::{Delivery, Responder};
use crate::request::Parts;
use crate::volume::Volume;

/// Where the kernel's requests come from.
pub(crate) const DEVICE: &str = "/dev/fuse";

/// What stands before the data of a write request.
const WRITE_HEAD: usize = size_of::<InHeader>() + size_of::<WriteIn>();
/// To this the data of a write is aligned, so that it can be written on without a copy.
const PAGE: usize = 4096;

/// One open descriptor of a connection to the kernel.
#[derive(Debug)]
pub(crate) struct Channel {
    device: OwnedFd,
}

impl Channel {
    /// A channel over a descriptor that is, or will be, mounted.
    pub fn new(device: impl Into<OwnedFd>) -> Channel {
        Channel { device: device.into() }
    }

    /// One more channel of the same connection.
    pub fn another(&self, blocking: Blocking) -> Result<Channel, Errno> {
        let device = open_device(blocking)?;
        ioctl::clone(&device, &self.device)?;
        Ok(Channel::new(device))
    }

    /// The next request; how many bytes. A channel that does not wait fails with EAGAIN.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        nix::unistd::read(&self.device, buffer)
    }

    /// Answers request `unique`.
    pub fn answer(&self, unique: u64, error: i32, body: &[u8]) -> Delivery {
        match self.write(unique, error, [IoSlice::new(body)]) {
            Ok(()) => Delivery::Taken,
            Err(Errno::ENOENT | Errno::ENODEV | Errno::EPERM | Errno::ECONNABORTED) => {
                Delivery::Gone
            }
            Err(errno) => {
                tracing::error!(unique, error, len = body.len(), %errno, "answer fuse request");
                Delivery::Gone
            }
        }
    }

    /// Sends a notification; the kernel has carried it out when this returns.
    pub fn notify(&self, code: i32, body: [IoSlice<'_>; 3]) -> Result<(), Errno> {
        self.write(0, code, body)
    }

    fn write<const N: usize>(
        &self,
        unique: u64,
        error: i32,
        body: [IoSlice<'_>; N],
    ) -> Result<(), Errno> {
        let body_len: usize = body.iter().map(|part| part.len()).sum();
        let len = u32::try_from(size_of::<OutHeader>() + body_len).map_err(|_| Errno::EINVAL)?;
        let header = OutHeader { len, error, unique };
        let mut parts = [IoSlice::new(header.as_bytes()); 4];
        parts[1..=N].copy_from_slice(&body);
        loop {
            match writev(&self.device, &parts[..=N]) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

/// Whether to wait for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blocking {
    Yes,
    No,
}

/// A descriptor that is not connected to a mount yet.
pub(crate) fn open_device(blocking: Blocking) -> Result<File, Errno> {
    let flags = if blocking == Blocking::Yes { 0 } else { libc::O_NONBLOCK };
    let opened = OpenOptions::new().read(true).write(true).custom_flags(flags).open(DEVICE);
    opened.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
}

/// Room for one request, placed so that a write's data begins on a page.
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    /// Zeroed memory, which costs nothing until used.
    pub fn new() -> Buffer {
        let bytes = vec![0; READ_BUFFER_MIN + 2 * PAGE + TRANSFER_MAX];
        let page = bytes.as_ptr().align_offset(PAGE);
        // Two pages behind the head are more than a page before the next boundary needs.
        let start = (page + PAGE - WRITE_HEAD) % PAGE;
        Buffer { bytes, start }
    }

    /// All of it.
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..]
    }
}

/// How long a worker asks for the next request before it waits. Longer than a client needs from one
/// lock call to the next, wake-up included; short beside a time slice.
const ASK_MAX: Duration = Duration::from_micros(50);
/// After a longer pause than this, requests do not come quickly any more.
const PAUSE_MAX: Duration = Duration::from_micros(100);

/// A worker's way to its requests.
pub(crate) struct Source {
    waiting: Arc<Channel>,
    asking: Option<Arc<Channel>>,
    /// When the last request was served.
    served: Instant,
    is_busy: bool,
}

impl Source {
    /// A source with channels of its own beside `session`. Whoever may mount, by fusermount3, but
    /// not open the device waits at the one channel there is, together with the others.
    pub fn new(session: &Arc<Channel>) -> Source {
        let another = |blocking| session.another(blocking).map(Arc::new);
        let log = |error| tracing::debug!(%error, "clone fuse device");
        Source {
            waiting: another(Blocking::Yes).unwrap_or_else(|_| session.clone()),
            asking: another(Blocking::No).map_err(log).ok(),
            served: Instant::now(),
            is_busy: false,
        }
    }

    /// A source that only waits, at the first channel itself.
    pub fn waiting(session: &Arc<Channel>) -> Source {
        let waiting = session.clone();
        Source { waiting, asking: None, served: Instant::now(), is_busy: false }
    }

    /// The next request: through which channel it came, and how long it is.
    fn next(&mut self, buffer: &mut [u8]) -> Result<(&Arc<Channel>, usize), Errno> {
        if self.is_busy
            && let Some(asking) = &self.asking
        {
            loop {
                match asking.receive(buffer) {
                    Err(Errno::EAGAIN) if self.served.elapsed() < ASK_MAX => thread::yield_now(),
                    Err(Errno::EAGAIN) => break,
                    other => return other.map(|len| (asking, len)),
                }
            }
        }
        let len = self.waiting.receive(buffer)?;
        self.is_busy = self.served.elapsed() < PAUSE_MAX;
        Ok((&self.waiting, len))
    }
}

/// Serves requests until the mount ends.
pub(crate) fn work<V: Volume>(session: &Session<V>, mut source: Source) -> Result<(), Error> {
    let mut request = Buffer::new();
    let mut answer = vec![0; TRANSFER_MAX];
    loop {
        let (channel, len) = match source.next(request.room()) {
            Ok(next) => next,
            // ENOENT: the request was aborted while it was handed over.
            Err(Errno::EINTR | Errno::EAGAIN | Errno::ENOENT) => continue,
            Err(Errno::ENODEV | Errno::ECONNABORTED) => return Ok(()),
            Err(source) => return Err(Error::Session { doing: "read fuse request", source }),
        };
        let message = &request.room()[..len];
        match Parts::of_message(message) {
            Ok(parts) => {
                let responder = Responder::new(channel.clone(), parts.header.unique);
                session.serve(&parts, responder, &mut answer);
            }
            Err(error) => unreadable(channel, message, error),
        }
        source.served = Instant::now();
    }
}

/// A request that is no request is answered all the same if it has a number to answer to.
fn unreadable(channel: &Channel, message: &[u8], error: crate::request::DecodeError) {
    use zerocopy::FromBytes;
    tracing::error!(len = message.len(), %error, "decode fuse request");
    if let Ok((header, _)) = InHeader::read_from_prefix(message) {
        channel.answer(header.unique, -(Errno::EIO as i32), &[]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_of_a_write_begins_on_a_page() {
        let mut buffer = Buffer::new();
        let room = buffer.room();
        assert_eq!(room[WRITE_HEAD..].as_ptr().align_offset(PAGE), 0);
        assert!(room.len() >= WRITE_HEAD + TRANSFER_MAX);
        assert!(room.len() >= READ_BUFFER_MIN);
    }
}
