//! FUSE requests as calls on one trait, [`Volume`].

mod volume;

pub use nix::errno::Errno;
pub use volume::{
    Attr, Conflict, DirEntry, Entry, FileType, LockKind, Lookup, OpenMode, Opened, Owner, ROOT,
    Range, Reply, SetAttr, StatFs, Volume, Wait, WaitId, Write,
};

/// The kernel's side of a mount: what it granted, and how to tell it of changes.
#[derive(Debug)]
pub struct Kernel {
    /// Whether files may be opened with [`OpenMode::Passthrough`].
    pub passthrough: bool,
    /// Tells the kernel that cached names, attributes and pages are stale.
    pub notifier: Notifier,
}

/// Tells the kernel that what it caches is stale.
#[derive(Debug, Clone)]
pub struct Notifier;
