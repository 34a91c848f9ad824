//! Answers to the kernel: values in, the kernel's structs out, and the [`Responder`] that carries
//! the one answer of a request to wherever its transport wants it.
//!
//! A request has one answer. Whoever holds its `Responder` gives it; dropped, it answers EIO, so a
//! panic in a call is an error to the application and not a process that hangs.

use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use zerocopy::{FromZeros, Immutable, IntoBytes};

use crate::abi;
use crate::dev::Channel;
use crate::disk::Clients;
use crate::uring::{Ring, Slot};
use crate::volume::{self, FileType};
use crate::watch::Watched;

/// Whether the kernel still wanted the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// It took it.
    Taken,
    /// The request was aborted, or the mount is gone.
    Gone,
}

/// The duty to answer one request of the kernel.
#[derive(Debug)]
pub(crate) struct Responder {
    way: Option<Way>,
    unique: u64,
    watched: Option<Watched>,
}

/// Where an answer goes.
#[derive(Debug)]
enum Way {
    /// Out through the descriptor that the request came in by.
    Device(Arc<Channel>),
    /// Into the slot of the ring that holds the request.
    Ring(Arc<Ring>, Slot, Buffer),
}

/// What the buffer is that a request over a ring is served with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Buffer {
    /// The payload of its slot.
    Slot,
    /// Some other memory.
    Other,
}

impl Responder {
    /// The answer to request `unique` goes out through `channel`, which it came in by.
    pub fn new(channel: Arc<Channel>, unique: u64) -> Responder {
        Responder { way: Some(Way::Device(channel)), unique, watched: None }
    }

    /// The answer to request `unique` goes into `slot`, which it came in.
    pub fn over_ring(ring: Arc<Ring>, slot: Slot, unique: u64) -> Responder {
        Responder { way: Some(Way::Ring(ring, slot, Buffer::Other)), unique, watched: None }
    }

    /// The same, of a request that is served with the payload of its slot as the buffer.
    pub fn into_slot(ring: Arc<Ring>, slot: Slot, unique: u64) -> Responder {
        Responder { way: Some(Way::Ring(ring, slot, Buffer::Slot)), unique, watched: None }
    }

    /// Whether a request that waits for long takes away what others need.
    pub fn is_crowded(&self) -> bool {
        matches!(&self.way, Some(Way::Ring(ring, slot, _)) if ring.is_crowded(*slot))
    }

    /// Whom the worker serves that has this request.
    pub fn clients(&self) -> Clients {
        match &self.way {
            Some(Way::Ring(ring, ..)) => ring.clients(),
            _ => Clients::Many,
        }
    }

    /// Whether the kernel may forget to tell that the request was interrupted.
    pub fn may_lose_interrupts(&self) -> bool {
        matches!(&self.way, Some(Way::Ring(..)))
    }

    /// The request is watched until it is answered; with none no more.
    pub fn watch(&mut self, watched: Option<Watched>) {
        self.watched = watched;
    }

    /// Success without a value.
    pub fn done(self) -> Delivery {
        self.finish(0, &[])
    }

    /// Success with a struct.
    pub fn value<T: IntoBytes + Immutable>(self, value: &T) -> Delivery {
        self.finish(0, value.as_bytes())
    }

    /// Success with data.
    pub fn data(self, data: &[u8]) -> Delivery {
        self.finish(0, data)
    }

    /// Success with data: the beginning of the buffer that the request is served with.
    pub fn buffered(mut self, data: &[u8]) -> Delivery {
        match self.way.take() {
            Some(Way::Ring(ring, slot, Buffer::Slot)) => {
                ring.answer_in_place(slot, self.unique, data.len())
            }
            way => {
                self.way = way;
                self.finish(0, data)
            }
        }
    }

    /// Failure. ENOSYS is kept for opcodes that nobody implements: the kernel would stop asking.
    pub fn error(self, errno: Errno) -> Delivery {
        let errno = if errno == Errno::ENOSYS { Errno::EOPNOTSUPP } else { errno };
        self.finish(-(errno as i32), &[])
    }

    /// This opcode is not implemented, or refused for good.
    pub fn refuse(self, errno: Errno) -> Delivery {
        self.finish(-(errno as i32), &[])
    }

    /// The kernel wants no answer to this request.
    pub fn without_answer(mut self) {
        self.way = None;
    }

    /// Success without a value, or failure.
    pub fn empty(self, result: Result<(), Errno>) -> Delivery {
        match result {
            Ok(()) => self.done(),
            Err(errno) => self.error(errno),
        }
    }

    /// Attributes, or failure.
    pub fn attr(self, result: Result<volume::Attr, Errno>) -> Delivery {
        match result {
            Ok(attr) => self.value(&attr_out(&attr)),
            Err(errno) => self.error(errno),
        }
    }

    /// How much was written, or failure.
    pub fn written(self, result: Result<u32, Errno>) -> Delivery {
        match result {
            Ok(size) => self.value(&abi::WriteOut { size, padding: 0 }),
            Err(errno) => self.error(errno),
        }
    }

    fn finish(mut self, error: i32, body: &[u8]) -> Delivery {
        self.send(error, body)
    }

    fn send(&mut self, error: i32, body: &[u8]) -> Delivery {
        match self.way.take() {
            Some(Way::Device(channel)) => channel.answer(self.unique, error, body),
            Some(Way::Ring(ring, slot, _)) => ring.answer(slot, self.unique, error, body),
            None => Delivery::Gone,
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.send(-(Errno::EIO as i32), &[]);
    }
}

/// `attr` for the kernel.
pub(crate) fn attr_out(attr: &volume::Attr) -> abi::AttrOut {
    abi::AttrOut {
        attr_valid: attr.ttl.as_secs(),
        attr_valid_nsec: attr.ttl.subsec_nanos(),
        dummy: 0,
        attr: kernel_attr(attr),
    }
}

/// A found name for the kernel. The inode number is also the node's id.
pub(crate) fn entry_out(attr: &volume::Attr, ttl: Duration) -> abi::EntryOut {
    abi::EntryOut {
        nodeid: attr.ino,
        generation: 0,
        entry_valid: ttl.as_secs(),
        attr_valid: attr.ttl.as_secs(),
        entry_valid_nsec: ttl.subsec_nanos(),
        attr_valid_nsec: attr.ttl.subsec_nanos(),
        attr: kernel_attr(attr),
    }
}

/// A missing name that the kernel may remember for `ttl`: an entry without a node.
pub(crate) fn missing_out(ttl: Duration) -> abi::EntryOut {
    abi::EntryOut {
        entry_valid: ttl.as_secs(),
        entry_valid_nsec: ttl.subsec_nanos(),
        ..abi::EntryOut::new_zeroed()
    }
}

fn kernel_attr(attr: &volume::Attr) -> abi::Attr {
    let (seconds, nanos) = seconds_and_nanos(attr.mtime);
    let (kind, nlink) = match attr.file_type {
        FileType::Directory => (libc::S_IFDIR, 2),
        FileType::Regular => (libc::S_IFREG, 1),
    };
    abi::Attr {
        ino: attr.ino,
        size: attr.size,
        blocks: attr.blocks,
        atime: seconds,
        mtime: seconds,
        ctime: seconds,
        atimensec: nanos,
        mtimensec: nanos,
        ctimensec: nanos,
        mode: kind | u32::from(attr.perm & 0o7777),
        nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// The time as the kernel has it: seconds since 1970 in two's complement, nanoseconds after them.
fn seconds_and_nanos(time: SystemTime) -> (u64, u32) {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => (after.as_secs(), after.subsec_nanos()),
        Err(error) => {
            let before = error.duration();
            match before.subsec_nanos() {
                0 => (before.as_secs().wrapping_neg(), 0),
                nanos => ((before.as_secs() + 1).wrapping_neg(), 1_000_000_000 - nanos),
            }
        }
    }
}

/// The numbers of statfs(2) for the kernel.
pub(crate) fn statfs_out(stat: &volume::StatFs) -> abi::StatfsOut {
    abi::StatfsOut {
        blocks: stat.blocks,
        bfree: stat.bfree,
        bavail: stat.bavail,
        files: stat.files,
        ffree: stat.ffree,
        bsize: stat.bsize,
        namelen: stat.namelen,
        frsize: stat.frsize,
        padding: 0,
        spare: [0; 6],
    }
}

/// A lock for the kernel; its process is not known.
pub(crate) fn lock_out(conflict: Option<volume::Conflict>) -> abi::LkOut {
    let (range, number) = match conflict {
        None => (volume::Range { start: 0, end: 0 }, libc::F_UNLCK),
        Some(lock) => (lock.range, lock_number(lock.kind)),
    };
    let pid = if conflict.is_some() { u32::MAX } else { 0 };
    let r#type = number.cast_unsigned();
    abi::LkOut { lk: abi::FileLock { start: range.start, end: range.end, r#type, pid } }
}

fn lock_number(kind: volume::LockKind) -> i32 {
    match kind {
        volume::LockKind::Shared => libc::F_RDLCK,
        volume::LockKind::Exclusive => libc::F_WRLCK,
        volume::LockKind::Unlock => libc::F_UNLCK,
    }
}

/// The lines of a listing from line `first` on, as many as fit into `buffer`; their length.
/// The offset of a line is its number plus one: where the kernel goes on reading.
pub(crate) fn fill_directory(entries: &[volume::DirEntry], first: u64, buffer: &mut [u8]) -> usize {
    let first = usize::try_from(first).unwrap_or(usize::MAX);
    let mut filled = 0;
    for (index, entry) in entries.iter().enumerate().skip(first) {
        let name = entry.name.as_bytes();
        let len = size_of::<abi::Dirent>() + name.len();
        let Some(room) = buffer.get_mut(filled..filled + len.next_multiple_of(8)) else {
            break;
        };
        room.fill(0);
        let (fixed, rest) = room.split_at_mut(size_of::<abi::Dirent>());
        fixed.copy_from_slice(dirent(entry, index).as_bytes());
        rest[..name.len()].copy_from_slice(name);
        filled += room.len();
    }
    filled
}

fn dirent(entry: &volume::DirEntry, index: usize) -> abi::Dirent {
    abi::Dirent {
        ino: entry.ino,
        off: index as u64 + 1,
        namelen: entry.name.len() as u32,
        r#type: match entry.file_type {
            FileType::Directory => u32::from(libc::DT_DIR),
            FileType::Regular => u32::from(libc::DT_REG),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use zerocopy::FromBytes;

    use super::*;

    #[test]
    fn times_before_1970_count_back_from_it() {
        let check = |time, expected: (i64, u32)| {
            let (seconds, nanos) = seconds_and_nanos(time);
            assert_eq!((seconds.cast_signed(), nanos), expected);
        };
        check(UNIX_EPOCH + Duration::new(5, 7), (5, 7));
        check(UNIX_EPOCH - Duration::new(5, 0), (-5, 0));
        check(UNIX_EPOCH - Duration::new(5, 1), (-6, 999_999_999));
    }

    #[test]
    fn a_listing_goes_on_where_it_stopped() {
        let entry = |name: &str, ino| volume::DirEntry {
            ino,
            name: OsStr::new(name).into(),
            file_type: FileType::Regular,
        };
        let entries = [entry("a", 2), entry("bb", 3), entry("a-longer-name", 4)];
        let mut buffer = [0xffu8; 70];
        assert_eq!(fill_directory(&entries, 0, &mut buffer), 64);
        let (second, name) = abi::Dirent::read_from_prefix(&buffer[32..]).unwrap();
        assert_eq!((second.ino, second.off, second.namelen), (3, 2, 2));
        assert_eq!(&name[..8], b"bb\0\0\0\0\0\0");
        assert_eq!(fill_directory(&entries, second.off, &mut buffer), 40);
        assert_eq!(fill_directory(&entries, 3, &mut buffer), 0);
        assert_eq!(fill_directory(&entries, u64::MAX, &mut buffer), 0);
    }
}
