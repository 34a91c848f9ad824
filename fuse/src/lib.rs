//! FUSE requests as calls on one trait, [`Volume`].
//!
//! The crate speaks the kernel's protocol itself. A transport (`dev`, `uring`) takes a request,
//! `request` decodes it, `dispatch` makes one call on the volume, `reply` encodes the answer, and
//! the transport carries it back. `nodes` and `passthrough` hold what the kernel has looked up and
//! opened; `notify` tells it what is stale; `mount` begins and ends it all.
//!
//! `unsafe` stands in `ioctl`, where a descriptor is received, and in `uring` for the memory shared
//! with the kernel and the policy of its threads.

mod abi;
mod dev;
mod disk;
mod dispatch;
mod error;
mod init;
mod interrupt;
mod ioctl;
mod mount;
mod mount_point;
mod nodes;
mod notify;
mod passthrough;
#[doc(hidden)]
pub mod properties;
mod reply;
mod request;
mod uring;
mod volume;
mod watch;

pub use error::Error;
pub use mount::{Mount, MountOptions, PassthroughMode, Transport, mount};
pub use nix::errno::Errno;
pub use notify::Notifier;
pub use uring::{enable_uring, settle_thread, uring_enabled};
pub use volume::{
    Attr, Caller, Conflict, Created, DirEntry, Entry, FileType, LockCall, LockKind, Lookup,
    OpenMode, Opened, Owner, ROOT, Range, Reply, SetAttr, StatFs, Volume, Wait, WaitId, Write,
};

/// The kernel's side of a mount: what it granted, and how to tell it of changes.
#[derive(Debug)]
pub struct Kernel {
    /// Whether files may be opened with [`OpenMode::Passthrough`].
    pub passthrough: bool,
    /// Tells the kernel that cached names, attributes and pages are stale.
    pub notifier: Notifier,
}
