//! Telling the kernel that what it caches is stale.
//!
//! A notification is a write to `/dev/fuse`. The kernel carries it out before the write returns,
//! and may need a page or a directory that is locked by a request which waits for our answer. So
//! the calls that wait ([`Notifier::inval_inode`] and its like) must never be made from within a
//! call on `Volume`, nor with a lock held that such a call could want. The `post_` variants may be
//! made from anywhere: a thread of the mount carries them out later, in no particular order, what
//! is posted twice in the meantime once.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::IoSlice;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Condvar, Mutex};

use nix::errno::Errno;
use zerocopy::{Immutable, IntoBytes};

use crate::abi::{self, notify};
use crate::dev::Channel;
use crate::volume::ROOT;

/// Tells the kernel that what it caches is stale. Clones are the same.
#[derive(Clone)]
pub struct Notifier {
    shared: Option<Arc<Shared>>,
}

pub(crate) struct Shared {
    channel: Arc<Channel>,
    posted: Mutex<Posted>,
    changed: Condvar,
}

/// What is to be told, once for each file: bounded by how many files there are.
#[derive(Default)]
struct Posted {
    inodes: HashMap<u64, Span>,
    entries: HashSet<OsString>,
    ended: bool,
}

/// Which pages of an inode, besides its attributes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Span {
    None,
    /// From the first byte up to, not including, the second; to the end without it.
    Pages(i64, Option<i64>),
}

impl Notifier {
    /// A notifier that tells nobody, for a volume that is used without a mount.
    pub fn disconnected() -> Notifier {
        Notifier { shared: None }
    }

    pub(crate) fn connected(channel: Arc<Channel>) -> (Notifier, Arc<Shared>) {
        let posted = Mutex::default();
        let shared = Arc::new(Shared { channel, posted, changed: Condvar::new() });
        (Notifier { shared: Some(shared.clone()) }, shared)
    }

    /// The attributes of inode `ino` are stale, and its pages from byte `offset` on, `len` bytes of
    /// them, or all if `len` is 0. An inode that the kernel does not know is no error.
    pub fn inval_inode(&self, ino: u64, offset: i64, len: i64) -> Result<(), Errno> {
        let body = abi::NotifyInvalInode { ino, off: offset, len };
        self.tell(notify::INVAL_INODE, &body, [b"", b""])
    }

    /// Inode `ino` has these `bytes` from byte `offset` on, and is long enough for them. The size is
    /// known when this returns: an invalidation only has the kernel ask for it, and it drops an
    /// answer that overlaps with another invalidation.
    pub fn store(&self, ino: u64, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let size = u32::try_from(bytes.len()).map_err(|_| Errno::EINVAL)?;
        let body = abi::NotifyStore { nodeid: ino, offset, size, padding: 0 };
        self.tell(notify::STORE, &body, [bytes, b""])
    }

    /// What the kernel knows of `name`, found or missing, is stale.
    pub fn inval_entry(&self, name: &OsStr) -> Result<(), Errno> {
        let namelen = name_len(name)?;
        let body = abi::NotifyInvalEntry { parent: ROOT, namelen, flags: 0 };
        self.tell(notify::INVAL_ENTRY, &body, [name.as_bytes(), b"\0"])
    }

    /// [`Notifier::inval_inode`] later.
    pub fn post_inval_inode(&self, ino: u64, offset: i64, len: i64) {
        let end = (len > 0).then(|| offset.saturating_add(len));
        let span = if offset < 0 { Span::None } else { Span::Pages(offset, end) };
        self.post(|posted| {
            let before = posted.inodes.entry(ino).or_insert(Span::None);
            *before = before.union(span);
        });
    }

    /// The attributes of inode `ino` are stale, its pages are not: told later.
    pub fn post_inval_attr(&self, ino: u64) {
        self.post_inval_inode(ino, -1, 0);
    }

    /// [`Notifier::inval_entry`] later.
    pub fn post_inval_entry(&self, name: &OsStr) {
        self.post(|posted| {
            posted.entries.insert(name.to_owned());
        });
    }

    fn tell<T: IntoBytes + Immutable>(
        &self,
        code: i32,
        body: &T,
        [more, end]: [&[u8]; 2],
    ) -> Result<(), Errno> {
        let Some(shared) = &self.shared else { return Ok(()) };
        let parts = [IoSlice::new(body.as_bytes()), IoSlice::new(more), IoSlice::new(end)];
        match shared.channel.notify(code, parts) {
            // Not known to the kernel, or nobody is mounted any more: nothing is stale.
            Err(Errno::ENOENT | Errno::ENOTCONN | Errno::ENODEV | Errno::EPERM) => Ok(()),
            // A directory that is not empty, or a name in use as a mount point.
            other => other,
        }
    }

    fn post(&self, add: impl FnOnce(&mut Posted)) {
        let Some(shared) = &self.shared else { return };
        let mut posted = shared.posted.lock().unwrap();
        let was_empty = posted.is_empty();
        add(&mut posted);
        drop(posted);
        if was_empty {
            shared.changed.notify_one();
        }
    }
}

impl Shared {
    /// Carries out what is posted, until [`Shared::stop`].
    pub fn carry_out(self: Arc<Self>) {
        let notifier = Notifier { shared: Some(self.clone()) };
        loop {
            let idle = |posted: &mut Posted| !posted.ended && posted.is_empty();
            let posted = self.posted.lock().unwrap();
            let mut posted = self.changed.wait_while(posted, idle).unwrap();
            if posted.ended {
                return;
            }
            let batch = std::mem::take(&mut *posted);
            drop(posted);
            batch.tell(&notifier);
        }
    }

    /// Ends [`Shared::carry_out`]; what is still posted is dropped with the mount.
    pub fn stop(&self) {
        self.posted.lock().unwrap().ended = true;
        self.changed.notify_all();
    }
}

impl Posted {
    fn is_empty(&self) -> bool {
        self.inodes.is_empty() && self.entries.is_empty()
    }

    fn tell(self, notifier: &Notifier) {
        for (ino, span) in self.inodes {
            let (offset, len) = span.offset_and_len();
            log_failure(notifier.inval_inode(ino, offset, len), ino);
        }
        for name in self.entries {
            log_failure(notifier.inval_entry(&name), 0);
        }
    }
}

impl Span {
    fn union(self, other: Span) -> Span {
        match (self, other) {
            (Span::None, span) | (span, Span::None) => span,
            (Span::Pages(a, end_a), Span::Pages(b, end_b)) => {
                Span::Pages(a.min(b), end_a.zip(end_b).map(|(a, b)| a.max(b)))
            }
        }
    }

    fn offset_and_len(self) -> (i64, i64) {
        match self {
            Span::None => (-1, 0),
            Span::Pages(start, end) => (start, end.map_or(0, |end| end - start)),
        }
    }
}

fn log_failure(result: Result<(), Errno>, ino: u64) {
    if let Err(error) = result {
        tracing::warn!(ino, %error, "invalidate kernel cache");
    }
}

fn name_len(name: &OsStr) -> Result<u32, Errno> {
    u32::try_from(name.len()).map_err(|_| Errno::ENAMETOOLONG)
}

impl fmt::Debug for Notifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = if self.shared.is_some() { "connected" } else { "disconnected" };
        f.debug_tuple("Notifier").field(&state).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_posted_together_become_one_that_holds_both() {
        let check = |a: Span, b: Span, expected| {
            assert_eq!(a.union(b).offset_and_len(), expected);
            assert_eq!(b.union(a).offset_and_len(), expected);
        };
        check(Span::None, Span::None, (-1, 0));
        check(Span::None, Span::Pages(0, Some(10)), (0, 10));
        check(Span::Pages(4096, Some(8192)), Span::Pages(0, Some(10)), (0, 8192));
        check(Span::Pages(4096, None), Span::Pages(8192, Some(9000)), (4096, 0));
    }

    #[test]
    fn a_disconnected_notifier_succeeds() {
        let notifier = Notifier::disconnected();
        assert_eq!(notifier.inval_inode(2, 0, 0), Ok(()));
        notifier.post_inval_entry(OsStr::new("db"));
    }
}
