//! The transport over `/dev/fuse`: workers that read a request, serve it, and read the next.
//!
//! A request must be answered through the descriptor that it was read from, and can be answered
//! from any thread; [`Channel`] is such a descriptor. Each worker has one of its own (FUSE_DEV_IOC_CLONE)
//! and two buffers for as long as it lives. A worker waits in read(2), and ends when the mount does.

use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

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
    pub fn another(&self) -> Result<Channel, Errno> {
        let device = open_device()?;
        ioctl::clone(&device, &self.device)?;
        Ok(Channel::new(device))
    }

    /// The next request, waiting for it; how many bytes.
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

/// A descriptor that is not connected to a mount yet.
pub(crate) fn open_device() -> Result<File, Errno> {
    let opened = OpenOptions::new().read(true).write(true).open(DEVICE);
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

/// Serves requests from `channel` until the mount ends.
pub(crate) fn work<V: Volume>(session: &Session<V>, channel: &Arc<Channel>) -> Result<(), Error> {
    let mut request = Buffer::new();
    let mut answer = vec![0; TRANSFER_MAX];
    loop {
        let len = match channel.receive(request.room()) {
            Ok(len) => len,
            // ENOENT: the request was aborted while it was handed over.
            Err(Errno::EINTR | Errno::EAGAIN | Errno::ENOENT) => continue,
            Err(Errno::ENODEV | Errno::ECONNABORTED) => return Ok(()),
            Err(source) => return Err(Error::Session { doing: "read fuse request", source }),
        };
        match Parts::of_message(&request.room()[..len]) {
            Ok(parts) => {
                let responder = Responder::new(channel.clone(), parts.header.unique);
                session.serve(&parts, responder, &mut answer);
            }
            Err(error) => unreadable(channel, &request.room()[..len], error),
        }
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
