//! How the bytes of each open node move: the kernel's rules about it, kept here.
//!
//! The kernel allows one way per inode at a time. While an inode is open with a backing file, each
//! further open must name the same backing id, must not keep the cache, and a cached open fails
//! with EIO. So the first open of a node decides and the later ones follow it until the last
//! handle is released; one backing id per node is kept as long. A direct open fits beside both: beside
//! a backing file it is marked as both, which sends reads and writes to us and maps the file.
//!
//! The kernel ends its own state when a file is closed, before it tells us by RELEASE, so an id is
//! never given up too early here.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;

use crate::abi::fopen;
use crate::dev::Channel;
use crate::ioctl;
use crate::volume::OpenMode;

/// How one handle is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Through the page cache.
    Cached,
    /// To us. Holds neither cache nor backing file.
    Direct,
    /// With the backing file.
    Backed,
}

/// What an open is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Granted {
    pub way: Way,
    pub open_flags: u32,
    pub backing_id: i32,
}

/// The nodes that are open, and how.
#[derive(Debug)]
pub(crate) struct Ways {
    channel: Arc<Channel>,
    granted: bool,
    /// By node: how it is open, and by how many handles that are not direct.
    open: Mutex<HashMap<u64, Open>>,
}

#[derive(Debug)]
struct Open {
    backing: Option<u32>,
    handles: usize,
}

impl Ways {
    /// Nothing is open. Without `granted` a backing file is refused.
    pub fn new(channel: Arc<Channel>, granted: bool) -> Ways {
        Ways { channel, granted, open: Mutex::default() }
    }

    /// One more handle of `node`, wanted in `mode`.
    pub fn open(&self, node: u64, mode: OpenMode) -> Result<Granted, Errno> {
        let mut nodes = self.open.lock().unwrap();
        let backing = nodes.get(&node).map(|open| open.backing);
        let (way, open_flags, backing) = match (backing, mode) {
            (Some(Some(id)), OpenMode::Direct) => {
                (Way::Backed, fopen::PASSTHROUGH | fopen::DIRECT_IO, Some(id))
            }
            (_, OpenMode::Direct) => (Way::Direct, fopen::DIRECT_IO, None),
            (Some(Some(id)), _) => (Way::Backed, fopen::PASSTHROUGH, Some(id)),
            (Some(None), _) | (None, OpenMode::Cached) => (Way::Cached, fopen::KEEP_CACHE, None),
            (None, OpenMode::Passthrough(file)) => {
                (Way::Backed, fopen::PASSTHROUGH, Some(self.register(file)?))
            }
        };
        if way != Way::Direct {
            nodes.entry(node).or_insert(Open { backing, handles: 0 }).handles += 1;
        }
        let backing_id = backing.unwrap_or(0).cast_signed();
        Ok(Granted { way, open_flags, backing_id })
    }

    /// A handle of `node` was released.
    pub fn close(&self, node: u64, way: Way) {
        if way == Way::Direct {
            return;
        }
        let mut nodes = self.open.lock().unwrap();
        let Some(open) = nodes.get_mut(&node) else { return };
        open.handles -= 1;
        if open.handles == 0
            && let Some(Open { backing: Some(id), .. }) = nodes.remove(&node)
            && let Err(error) = ioctl::backing_close(&self.channel, id)
        {
            tracing::warn!(node, id, %error, "close backing file");
        }
    }

    fn register(&self, file: OwnedFd) -> Result<u32, Errno> {
        if !self.granted {
            tracing::error!("backing file without passthrough");
            return Err(Errno::EIO);
        }
        ioctl::backing_open(&self.channel, file).inspect_err(|error| {
            tracing::error!(%error, "register backing file");
        })
    }
}

/// Whether the kernel takes a file of the file system that `probe` is on as a backing file: it
/// refuses with EPERM without CAP_SYS_ADMIN, and with ELOOP on stacked file systems.
pub(crate) fn probe(channel: &Channel, probe: &File) -> Result<(), Errno> {
    let id = ioctl::backing_open(channel, probe)?;
    ioctl::backing_close(channel, id)
}
