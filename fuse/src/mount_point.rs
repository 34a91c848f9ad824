//! The directory to mount on: what is mounted there already, mount(2) and umount(2) for root, and
//! fusermount3 for everybody else.
//!
//! fusermount3 is run with one end of a socket pair as its standard input and the number of it in
//! `_FUSE_COMMFD`; it sends the mounted device back over it as an SCM_RIGHTS message.
//!
//! A FUSE mount whose process is gone answers every call with ENOTCONN; such a one is taken away
//! before mounting. One that answers is somebody's, and an error. Mounts of other kinds may be
//! mounted over, as a container's volume is.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair,
};
use nix::sys::statvfs::statvfs;
use nix::unistd::{getegid, geteuid};

use crate::dev::{self, Blocking};
use crate::error::Error;

/// The source that `mount` shows, and the type behind `fuse.`.
const NAME: &str = "litefs";
/// The program that may mount for users who may not.
const HELPER: &str = "fusermount3";
/// How long a mount on the mount point may take to answer a statfs(2).
const STATFS_WAIT: Duration = Duration::from_secs(5);
/// How many stale mounts on top of each other are taken away.
const STALE_MAX: usize = 16;

/// What a statfs(2) of a mount point says about the mount.
enum Health {
    Live,
    Gone,
    Silent,
}

/// Whether the mount point can be had: nothing is mounted there, or what is there has no process any
/// more and may be taken away. Its absolute path. A stale mount stays until [`mount`]: an application
/// that is just opening its database must not find an empty directory in its place, and make files there.
pub(crate) fn prepare(dir: &Path, skip_unmount_stale: bool) -> Result<PathBuf, Error> {
    let dir = absolute(dir)?;
    match stale_mounts(&dir)? {
        0 => usable(&dir)?,
        _ if skip_unmount_stale => return Err(Error::Stale { dir, source: None }),
        _ => {}
    }
    Ok(dir)
}

/// How many mounts are on top of each other there; an error if the last one is alive.
fn stale_mounts(dir: &Path) -> Result<usize, Error> {
    let count = fuse_mounts(dir);
    if count == 0 {
        return Ok(0);
    }
    match health(dir) {
        Health::Live => Err(Error::AlreadyMounted { dir: dir.to_owned() }),
        Health::Silent => Err(Error::Hangs { dir: dir.to_owned() }),
        Health::Gone => Ok(count),
    }
}

/// Takes away what is mounted there without a process, but for the last `left`.
fn free(dir: &Path, left: usize) -> Result<(), Error> {
    for _ in 0..STALE_MAX {
        let count = stale_mounts(dir)?;
        if count == 0 {
            return usable(dir);
        }
        if count == left {
            tracing::info!(dir = %dir.display(), "mount over stale mount");
            return Ok(());
        }
        tracing::info!(dir = %dir.display(), "unmount stale mount");
        match detach(dir) {
            // What comes now must follow at once.
            Ok(()) if count == 1 => return Ok(()),
            Ok(()) => {}
            Err(Error::Unmount { dir, source }) => {
                return Err(Error::Stale { dir, source: Some(source) });
            }
            Err(other) => return Err(other),
        }
    }
    Err(Error::Stale { dir: dir.to_owned(), source: None })
}

fn usable(dir: &Path) -> Result<(), Error> {
    let unusable = |source| Error::Directory { dir: dir.to_owned(), source };
    match std::fs::metadata(dir) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err(unusable(Errno::ENOTDIR)),
        Err(error) => Err(unusable(errno(&error))),
    }
}

/// The path as the kernel lists it, found without touching the mount itself.
fn absolute(dir: &Path) -> Result<PathBuf, Error> {
    let failed = |error: std::io::Error| {
        let source = errno(&error);
        Error::Directory { dir: dir.to_owned(), source }
    };
    let dir = std::path::absolute(dir).map_err(failed)?;
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        return dir.canonicalize().map_err(failed);
    };
    let full = parent.canonicalize().map_err(failed)?.join(name);
    match std::fs::read_link(&full) {
        Ok(_) => full.canonicalize().map_err(failed),
        Err(_) => Ok(full),
    }
}

/// How many FUSE file systems are on top of each other at exactly this path.
fn fuse_mounts(dir: &Path) -> usize {
    let Ok(table) = std::fs::read("/proc/self/mountinfo") else { return 0 };
    let mounts: Vec<_> = table.split(|byte| *byte == b'\n').filter_map(mount_of_line).collect();
    let here = mounts.iter().rev().filter(|(mounted_on, _)| mounted_on == dir);
    here.take_while(|(_, kind)| *kind == b"fuse" || kind.starts_with(b"fuse.")).count()
}

/// Mount point and type of a line of mountinfo, see proc(5).
fn mount_of_line(line: &[u8]) -> Option<(PathBuf, &[u8])> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mounted_on = unescape(fields.nth(4)?);
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some((PathBuf::from(OsString::from_vec(mounted_on)), kind))
}

/// Undoes the octal escapes of blanks and backslashes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|_| *first == b'\\');
        let escaped = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &tail[3..] } else { tail };
    }
    bytes
}

/// Asked by statfs(2), which goes to the process, unlike stat(2), whose answer may be cached. A
/// mount whose process is stopped never answers; a thread is given up for it.
fn health(dir: &Path) -> Health {
    let (answer, answered) = mpsc::channel();
    let path = dir.to_owned();
    thread::spawn(move || answer.send(statvfs(&path).err()));
    match answered.recv_timeout(STATFS_WAIT) {
        // The last two while the kernel is still taking the connection down.
        Ok(Some(Errno::ENOTCONN | Errno::ECONNABORTED | Errno::ECANCELED)) => Health::Gone,
        Ok(_) => Health::Live,
        Err(_) => Health::Silent,
    }
}

/// Mounts a new device on `dir`, in the place of one that has no process any more.
pub(crate) fn mount(dir: &Path, allow_other: bool) -> Result<OwnedFd, Error> {
    if geteuid().is_root() {
        mount_directly(dir, allow_other)
    } else {
        mount_by_helper(dir, allow_other)
    }
}

fn mount_directly(dir: &Path, allow_other: bool) -> Result<OwnedFd, Error> {
    let device = dev::open_device(Blocking::Yes)
        .map_err(|source| Error::Session { doing: "open /dev/fuse", source })?;
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={}",
        device.as_raw_fd(),
        geteuid(),
        getegid()
    );
    if allow_other {
        data.push_str(",allow_other");
    }
    let kind = format!("fuse.{NAME}");
    // A stale mount stays below until we unmount: at no moment is the plain directory in sight.
    free(dir, 1)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    nix::mount::mount(Some(NAME), dir, Some(kind.as_str()), flags, Some(data.as_str()))
        .map_err(|source| Error::Mount { dir: dir.to_owned(), source })?;
    Ok(device.into())
}

fn mount_by_helper(dir: &Path, allow_other: bool) -> Result<OwnedFd, Error> {
    let failed = |message: String| Error::Helper { dir: dir.to_owned(), message };
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|error| failed(error.to_string()))?;
    let mut options = format!("fsname={NAME},subtype={NAME},nosuid,nodev");
    // The helper mounts on nothing that it cannot look into.
    free(dir, 0)?;
    if allow_other {
        options.push_str(",allow_other");
    }
    let output = Command::new(HELPER)
        .args(["-o", &options, "--"])
        .arg(dir)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(theirs))
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    receive_device(&ours).map_err(|error| failed(error.to_string()))
}

/// The device that the helper sent. It has ended, so this does not wait.
fn receive_device(socket: &OwnedFd) -> Result<OwnedFd, Errno> {
    let mut byte = [0u8; 1];
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let mut parts = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let sent = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmRights(descriptors) => descriptors.first().copied(),
        _ => None,
    });
    let descriptor = sent.ok_or(Errno::EPROTO)?;
    // SAFETY: the kernel just made this descriptor for us, and nobody else has its number.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Unmounts what nobody uses.
pub(crate) fn unmount(dir: &Path) -> Result<(), Error> {
    if geteuid().is_root() {
        umount2(dir, MntFlags::empty()).map_err(|source| match source {
            Errno::EBUSY => Error::Busy { dir: dir.to_owned() },
            source => Error::Unmount { dir: dir.to_owned(), source },
        })?;
        // The stale mount in whose place this one was.
        return detach_if_gone(dir);
    }
    unmount_by_helper(dir, &["-u"])
}

/// Takes the mount out of sight at once; it ends when nobody uses it any more.
pub(crate) fn detach(dir: &Path) -> Result<(), Error> {
    if geteuid().is_root() {
        return umount2(dir, MntFlags::MNT_DETACH)
            .map_err(|source| Error::Unmount { dir: dir.to_owned(), source });
    }
    unmount_by_helper(dir, &["-u", "-z"])
}

/// Has all calls on the mount fail from now on. It stays where it is: nobody is to find the directory below and write
/// there. Needs root.
pub(crate) fn cut_off(dir: &Path) -> Result<(), Errno> {
    // In use by this, it is not taken away.
    let root = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(dir);
    let _root = root.map_err(|error| errno(&error))?;
    match umount2(dir, MntFlags::MNT_FORCE) {
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Takes away a mount that was cut off from its process, if there is one.
pub(crate) fn detach_if_gone(dir: &Path) -> Result<(), Error> {
    if fuse_mounts(dir) > 0 && matches!(health(dir), Health::Gone) { detach(dir) } else { Ok(()) }
}

fn unmount_by_helper(dir: &Path, options: &[&str]) -> Result<(), Error> {
    let failed = |message: String| Error::Helper { dir: dir.to_owned(), message };
    let output = Command::new(HELPER)
        .args(options)
        .arg("--")
        .arg(dir)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if message.contains("busy") {
        return Err(Error::Busy { dir: dir.to_owned() });
    }
    Err(failed(message))
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn mountinfo_lines_give_mount_point_and_type() {
        let line = b"90 23 0:43 / /mnt/a\\040b\\134c rw,nosuid shared:1 - fuse.litefs litefs rw";
        let (dir, kind) = mount_of_line(line).unwrap();
        assert_eq!(dir.as_os_str().as_bytes(), b"/mnt/a b\\c");
        assert_eq!(kind, b"fuse.litefs");
        assert!(mount_of_line(b"").is_none());
        assert!(mount_of_line(b"90 23 0:43 /").is_none());
        assert_eq!(unescape(b"\\0x\\"), b"\\0x\\");
    }
}
