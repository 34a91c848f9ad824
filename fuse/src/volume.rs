//! What a file system must answer: the trait [`Volume`] with its small types.
//!
//! The mount is one flat directory. Each call carries what the kernel sent, decoded, and is
//! answered with a value, or through a [`Reply`] that may be moved to whoever finishes the work: a
//! call that gets a `Reply` may return before it is answered. No call may block on a lock, a peer
//! or another request; waiting is done by keeping the `Reply`.

use std::ffi::OsStr;
use std::fmt;
use std::os::fd::OwnedFd;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;

/// The inode number of the root directory.
pub const ROOT: u64 = 1;

/// A lock owner as the kernel names it: a process for POSIX locks, an open file for OFD locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner(pub u64);

/// A range of bytes, both ends included, as in `struct fuse_file_lock`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first byte.
    pub start: u64,
    /// The last byte; `i64::MAX` for "to the end".
    pub end: u64,
}

/// What a lock call asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockKind {
    /// F_RDLCK
    Shared,
    /// F_WRLCK
    Exclusive,
    /// F_UNLCK
    Unlock,
}

/// A thread or process that calls, by its number in the process namespace of the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Caller(pub u32);

/// A lock call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LockCall {
    /// Whose lock it is.
    pub owner: Owner,
    /// The process that calls; zero where the kernel does not say it.
    pub process: Caller,
    /// Which bytes.
    pub range: Range,
    /// What is asked for.
    pub kind: LockKind,
}

/// Names one waiting lock call, so that an interrupt can end it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WaitId(pub u64);

/// Whether a lock call may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// F_SETLK: answer EAGAIN at once if the lock is not free.
    No,
    /// F_SETLK, where there is room to keep the reply: answer EAGAIN at once if another client is in the way. What
    /// the volume itself holds for a while it may wait for.
    Briefly,
    /// F_SETLKW: keep the reply until the lock is granted or [`Volume::interrupt`] names this id.
    Yes(WaitId),
}

/// The lock that stands in the way of a queried one (F_GETLK).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conflict {
    /// Its bytes.
    pub range: Range,
    /// Its kind, never `Unlock`.
    pub kind: LockKind,
}

/// What stands behind a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// The root.
    Directory,
    /// Everything else.
    Regular,
}

/// The attributes of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// The inode number, unique among all nodes that live at one time.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Size in blocks of 512 bytes.
    pub blocks: u64,
    /// Last change of the content.
    pub mtime: SystemTime,
    /// Directory or file.
    pub file_type: FileType,
    /// The permission bits.
    pub perm: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// For how long the kernel may keep the attributes without asking again.
    pub ttl: Duration,
}

/// A node that a name was found to stand for.
#[derive(Debug)]
pub struct Entry<N> {
    /// The node; equal inode numbers are the same node.
    pub node: N,
    /// Its attributes.
    pub attr: Attr,
    /// For how long the kernel may keep the name without asking again.
    pub ttl: Duration,
}

/// The answer to a look-up.
#[derive(Debug)]
pub enum Lookup<N> {
    /// There is such a name.
    Found(Entry<N>),
    /// There is none, and the kernel may remember that for so long (zero: not at all).
    Missing(Duration),
}

/// How the kernel moves the bytes of an open file.
#[derive(Debug)]
pub enum OpenMode {
    /// Through its page cache, which is kept across opens (FOPEN_KEEP_CACHE).
    Cached,
    /// Each call comes to [`Volume::read`] and [`Volume::write`] (FOPEN_DIRECT_IO).
    Direct,
    /// Between the application and this file, past us (FOPEN_PASSTHROUGH). Every open of one node
    /// must hand out the same file; the first one counts until the last handle is released.
    Passthrough(OwnedFd),
}

/// An opened file.
#[derive(Debug)]
pub struct Opened<H> {
    /// What later calls on this open file carry.
    pub handle: H,
    /// How its bytes move.
    pub mode: OpenMode,
}

/// A file that was made and opened in one step.
pub type Created<N, H> = (Entry<N>, Opened<H>);

/// The attributes that a SETATTR changes; everything else about it is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SetAttr {
    /// The new size in bytes, if the size is to change.
    pub size: Option<u64>,
}

/// A write request.
#[derive(Debug)]
pub struct Write<'a> {
    /// Where in the file, in bytes.
    pub offset: u64,
    /// What.
    pub data: &'a [u8],
    /// Whether it comes from the kernel's page cache (a dirty mapped page) rather than from a call.
    pub from_cache: bool,
}

/// A line of the directory listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The inode number.
    pub ino: u64,
    /// The name.
    pub name: Box<OsStr>,
    /// Directory or file.
    pub file_type: FileType,
}

/// The numbers of statfs(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatFs {
    /// Size of the file system in blocks of `frsize` bytes.
    pub blocks: u64,
    /// Free blocks.
    pub bfree: u64,
    /// Free blocks for unprivileged users.
    pub bavail: u64,
    /// Inodes.
    pub files: u64,
    /// Free inodes.
    pub ffree: u64,
    /// Preferred transfer size in bytes.
    pub bsize: u32,
    /// Longest name in bytes.
    pub namelen: u32,
    /// Fragment size in bytes.
    pub frsize: u32,
}

/// The duty to answer one request. Dropped unanswered, it answers EIO.
pub struct Reply<T> {
    answer: Option<Answer<T>>,
}

type Answer<T> = Box<dyn FnOnce(Result<T, Errno>) + Send>;

impl<T> Reply<T> {
    /// A reply that hands its one answer to `answer`.
    pub fn new(answer: impl FnOnce(Result<T, Errno>) + Send + 'static) -> Reply<T> {
        Reply { answer: Some(Box::new(answer)) }
    }

    /// Answers the request.
    pub fn send(mut self, result: Result<T, Errno>) {
        if let Some(answer) = self.answer.take() {
            answer(result);
        }
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        if let Some(answer) = self.answer.take() {
            answer(Err(Errno::EIO));
        }
    }
}

impl<T> fmt::Debug for Reply<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reply")
    }
}

/// A flat directory of files, called by the transports. Every method may be called from several
/// threads at once. An error is the errno that the application sees.
pub trait Volume: Send + Sync + 'static {
    /// A file known to the kernel; kept until the kernel forgets it.
    type Node: Clone + Send + Sync + 'static;
    /// An open file; kept until its release.
    type Handle: Clone + Send + Sync + 'static;

    /// The file system is mounted, before any other call: how to reach the kernel, and whether
    /// passthrough was granted. Without it [`OpenMode::Passthrough`] must not be answered.
    fn mounted(&self, kernel: crate::Kernel);
    /// The attributes of the root directory.
    fn root(&self) -> Attr;
    /// What a node is called, for messages.
    fn name_of(&self, node: &Self::Node) -> String;
    /// What `name` stands for.
    fn lookup(&self, name: &OsStr) -> Result<Lookup<Self::Node>, Errno>;
    /// The attributes of a node.
    fn getattr(&self, node: &Self::Node) -> Result<Attr, Errno>;
    /// Changes the size; all other changes succeed without effect.
    fn setattr(&self, node: &Self::Node, change: SetAttr, reply: Reply<Attr>);
    /// Opens a node for a thread.
    fn open(&self, node: &Self::Node, thread: Caller) -> Result<Opened<Self::Handle>, Errno>;
    /// Makes and opens `name` for a thread; `flags` are those of open(2).
    fn create(
        &self,
        name: &OsStr,
        flags: i32,
        thread: Caller,
    ) -> Result<Created<Self::Node, Self::Handle>, Errno>;
    /// Removes a name.
    fn unlink(&self, name: &OsStr, reply: Reply<()>);
    /// Fills `buf` from `offset`; how many bytes, fewer only at the end of the file.
    fn read(&self, handle: &Self::Handle, offset: u64, buf: &mut [u8]) -> Result<usize, Errno>;
    /// Writes; the answer is how many bytes.
    fn write(&self, handle: &Self::Handle, write: Write<'_>, reply: Reply<u32>);
    /// One descriptor of `owner` was closed: its POSIX locks on the file go.
    fn flush(&self, handle: &Self::Handle, owner: Owner, reply: Reply<()>);
    /// The last descriptor was closed: what was locked through this handle goes, whoever's it was.
    fn release(&self, handle: Self::Handle);
    /// Makes a file durable; `data_only` is fdatasync(2).
    fn fsync(&self, handle: &Self::Handle, data_only: bool, reply: Reply<()>);
    /// Makes the directory durable.
    fn fsync_dir(&self, reply: Reply<()>);
    /// The first lock that would stand in the way, or none.
    fn getlk(&self, handle: &Self::Handle, call: LockCall) -> Result<Option<Conflict>, Errno>;
    /// Takes or gives up a lock. ENOSYS is no answer for good here.
    fn setlk(&self, handle: &Self::Handle, call: LockCall, wait: Wait, reply: Reply<()>);
    /// A waiting lock call was interrupted: answer it with EINTR. `false` if no call with that id
    /// waits (any more, or yet).
    fn interrupt(&self, wait: WaitId) -> bool;
    /// The listing of the root, without `.` and `..`.
    fn readdir(&self) -> Result<Vec<DirEntry>, Errno>;
    /// statfs(2).
    fn statfs(&self) -> Result<StatFs, Errno>;
}
