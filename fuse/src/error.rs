//! What can go wrong with a mount.

use std::path::PathBuf;

use nix::errno::Errno;

/// Why a directory could not be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The mount point is missing, or no directory.
    #[error("use mount point {dir}", dir = dir.display())]
    Directory {
        /// The mount point.
        dir: PathBuf,
        /// What the system said.
        source: Errno,
    },
    /// Another file system process serves the mount point.
    #[error("{dir} is already mounted; unmount it first", dir = dir.display())]
    AlreadyMounted {
        /// The mount point.
        dir: PathBuf,
    },
    /// The mount point belongs to a process that is gone, and could not or should not be freed.
    #[error(
        "{dir} is a mount of a process that is gone; free it with `umount -l`",
        dir = dir.display()
    )]
    Stale {
        /// The mount point.
        dir: PathBuf,
        /// Why it was not freed; none if that was not wanted.
        source: Option<Errno>,
    },
    /// A file system on the mount point does not answer.
    #[error("the mount at {dir} does not answer", dir = dir.display())]
    Hangs {
        /// The mount point.
        dir: PathBuf,
    },
    /// The system refused the mount.
    #[error("mount {dir}", dir = dir.display())]
    Mount {
        /// The mount point.
        dir: PathBuf,
        /// What the system said.
        source: Errno,
    },
    /// The helper program that mounts for other users than root failed.
    #[error("fusermount3 {dir}: {message}", dir = dir.display())]
    Helper {
        /// The mount point.
        dir: PathBuf,
        /// What it said, or why it could not run.
        message: String,
    },
    /// Somebody still has a file open in it.
    #[error("{dir} is busy: a process has files open in it", dir = dir.display())]
    Busy {
        /// The mount point.
        dir: PathBuf,
    },
    /// The system refused to unmount.
    #[error("unmount {dir}", dir = dir.display())]
    Unmount {
        /// The mount point.
        dir: PathBuf,
        /// What the system said.
        source: Errno,
    },
    /// The kernel speaks an older protocol than 7.36 (Linux 5.17).
    #[error("kernel speaks fuse {major}.{minor}, at least 7.36 is needed")]
    KernelTooOld {
        /// Its major version.
        major: u32,
        /// Its minor version.
        minor: u32,
    },
    /// The kernel does not have FUSE over io_uring.
    #[error("fuse over io_uring needs Linux 6.14 with CONFIG_FUSE_IO_URING")]
    UringMissing,
    /// The kernel has FUSE over io_uring switched off.
    #[error(
        "fuse over io_uring is switched off: set fuse.enable-uring, \
         or echo Y >/sys/module/fuse/parameters/enable_uring"
    )]
    UringOff,
    /// The kernel offers FUSE over io_uring, and it could not be had.
    #[error(
        "use fuse over io_uring: {doing}; seccomp, kernel.io_uring_disabled or a limit may forbid it"
    )]
    Uring {
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: Errno,
    },
    /// Talking to the kernel failed.
    #[error("{doing}")]
    Session {
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: Errno,
    },
}
