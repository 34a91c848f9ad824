//! The calls on `/dev/fuse` that are neither read nor write.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

use crate::abi::BackingMap;

/// The number that all ioctls of FUSE share (FUSE_DEV_IOC_MAGIC).
const MAGIC: u8 = 229;

mod raw {
    use super::{BackingMap, MAGIC};

    nix::ioctl_read!(clone, MAGIC, 0, u32);
    nix::ioctl_write_ptr!(backing_open, MAGIC, 1, BackingMap);
    nix::ioctl_write_ptr!(backing_close, MAGIC, 2, u32);
}

/// Makes `device`, just opened, one more way to the connection of `session`.
pub(crate) fn clone(device: impl AsFd, session: impl AsFd) -> Result<(), Errno> {
    let mut source = session.as_fd().as_raw_fd().cast_unsigned();
    // SAFETY: the kernel reads one u32, which lives until the call returns.
    unsafe { raw::clone(device.as_fd().as_raw_fd(), &raw mut source) }.map(|_| ())
}

/// Registers `file` as what stands behind opened files; its backing id.
pub(crate) fn backing_open(device: impl AsFd, file: impl AsFd) -> Result<u32, Errno> {
    let map = BackingMap { fd: file.as_fd().as_raw_fd(), flags: 0, padding: 0 };
    // SAFETY: the kernel reads one struct of this layout, which lives until the call returns.
    let id = unsafe { raw::backing_open(device.as_fd().as_raw_fd(), &raw const map) }?;
    Ok(id.cast_unsigned())
}

/// Gives up a backing id; files opened with it keep what they have.
pub(crate) fn backing_close(device: impl AsFd, id: u32) -> Result<(), Errno> {
    // SAFETY: the kernel reads one u32, which lives until the call returns.
    unsafe { raw::backing_close(device.as_fd().as_raw_fd(), &raw const id) }.map(|_| ())
}
