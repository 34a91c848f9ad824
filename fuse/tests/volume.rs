//! A volume over a temporary directory: every file stands in it under its own name.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use fuse::{
    Attr, Caller, Conflict, Created, DirEntry, Entry, Errno, FileType, Kernel, LockCall, LockKind,
    Lookup, Mount, MountOptions, OpenMode, Opened, Owner, PassthroughMode, ROOT, Range, Reply,
    SetAttr, StatFs, Transport, Volume, Wait, WaitId, Write,
};
use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;

/// How long a condition may take to become true.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Waits for a condition; panics if it does not come true in time.
#[track_caller]
pub fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "waited in vain: {what}");
        std::thread::yield_now();
    }
}

/// How the volume wants the bytes of its files to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Cached,
    Direct,
    Passthrough,
}

pub struct Node {
    pub ino: u64,
    name: OsString,
    file: File,
}

pub struct Handle {
    id: u64,
    node: Arc<Node>,
}

struct Held {
    ino: u64,
    handle: u64,
    owner: Owner,
    range: Range,
    kind: LockKind,
}

struct Waiting {
    id: WaitId,
    lock: Held,
    reply: Reply<()>,
}

#[derive(Default)]
struct Locks {
    held: Vec<Held>,
    waiting: Vec<Waiting>,
}

pub struct TempVolume {
    way: Way,
    pub backing: PathBuf,
    nodes: Mutex<HashMap<OsString, Arc<Node>>>,
    locks: Mutex<Locks>,
    next: AtomicU64,
    pub kernel: OnceLock<Kernel>,
    /// Calls by name.
    calls: Mutex<HashMap<&'static str, usize>>,
}

impl TempVolume {
    pub fn new(backing: &Path, way: Way) -> TempVolume {
        TempVolume {
            way,
            backing: backing.to_owned(),
            nodes: Mutex::default(),
            locks: Mutex::default(),
            next: AtomicU64::new(2),
            kernel: OnceLock::new(),
            calls: Mutex::default(),
        }
    }

    pub fn calls(&self, name: &str) -> usize {
        self.calls.lock().unwrap().get(name).copied().unwrap_or(0)
    }

    pub fn waiting(&self) -> usize {
        self.locks.lock().unwrap().waiting.len()
    }

    pub fn held(&self) -> usize {
        self.locks.lock().unwrap().held.len()
    }

    pub fn ino(&self, name: &str) -> u64 {
        self.nodes.lock().unwrap()[OsStr::new(name)].ino
    }

    fn count(&self, name: &'static str) {
        *self.calls.lock().unwrap().entry(name).or_default() += 1;
    }

    fn attr(&self, node: &Node) -> Result<Attr, Errno> {
        let metadata = node.file.metadata().map_err(errno)?;
        Ok(Attr {
            ino: node.ino,
            size: metadata.len(),
            blocks: metadata.blocks(),
            mtime: metadata.modified().map_err(errno)?,
            file_type: FileType::Regular,
            perm: 0o644,
            uid: metadata.uid(),
            gid: metadata.gid(),
            ttl: Duration::ZERO,
        })
    }

    fn entry(&self, node: Arc<Node>) -> Result<Entry<Arc<Node>>, Errno> {
        let attr = self.attr(&node)?;
        Ok(Entry { node, attr, ttl: Duration::from_secs(60) })
    }

    fn opened(&self, node: &Arc<Node>) -> Result<Opened<Arc<Handle>>, Errno> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let handle = Arc::new(Handle { id, node: node.clone() });
        let mode = match self.way {
            Way::Cached => OpenMode::Cached,
            Way::Direct => OpenMode::Direct,
            Way::Passthrough => {
                OpenMode::Passthrough(OwnedFd::from(node.file.try_clone().map_err(errno)?))
            }
        };
        Ok(Opened { handle, mode })
    }
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

fn overlap(a: Range, b: Range) -> bool {
    a.start <= b.end && b.start <= a.end
}

impl Locks {
    fn conflict(&self, wanted: &Held) -> Option<Conflict> {
        self.held
            .iter()
            .find(|held| {
                held.ino == wanted.ino
                    && held.owner != wanted.owner
                    && overlap(held.range, wanted.range)
                    && (held.kind == LockKind::Exclusive || wanted.kind == LockKind::Exclusive)
            })
            .map(|held| Conflict { range: held.range, kind: held.kind })
    }

    /// The owner's locks in this range become `wanted`.
    fn set(&mut self, wanted: Held) {
        let (mine, others): (Vec<_>, Vec<_>) = std::mem::take(&mut self.held)
            .into_iter()
            .partition(|held| held.ino == wanted.ino && held.owner == wanted.owner);
        self.held = others;
        for held in mine {
            let Range { start, end } = held.range;
            let keep = |range: Range| Held { range, ..Held { ..held.copy() } };
            if !overlap(held.range, wanted.range) {
                self.held.push(held);
                continue;
            }
            if start < wanted.range.start {
                let end = wanted.range.start - 1;
                self.held.push(keep(Range { start, end }));
            }
            if end > wanted.range.end {
                let start = wanted.range.end + 1;
                self.held.push(keep(Range { start, end }));
            }
        }
        if wanted.kind != LockKind::Unlock {
            self.held.push(wanted);
        }
        self.grant();
    }

    /// Grants waiting locks that have become free.
    fn grant(&mut self) {
        let free = |locks: &Locks| {
            locks.waiting.iter().position(|waiting| locks.conflict(&waiting.lock).is_none())
        };
        while let Some(index) = free(self) {
            let waiting = self.waiting.remove(index);
            self.set(waiting.lock);
            waiting.reply.send(Ok(()));
        }
    }
}

impl Held {
    fn copy(&self) -> Held {
        Held { ..*self }
    }
}

impl Volume for TempVolume {
    type Node = Arc<Node>;
    type Handle = Arc<Handle>;

    fn mounted(&self, kernel: Kernel) {
        assert!(self.kernel.set(kernel).is_ok(), "mounted once");
    }

    fn name_of(&self, _: &Self::Node) -> String {
        String::new()
    }

    fn root(&self) -> Attr {
        let metadata = self.backing.metadata().unwrap();
        Attr {
            ino: ROOT,
            size: 0,
            blocks: 0,
            mtime: metadata.modified().unwrap(),
            file_type: FileType::Directory,
            perm: 0o777,
            uid: 0,
            gid: 0,
            ttl: Duration::from_secs(60),
        }
    }

    fn lookup(&self, name: &OsStr) -> Result<Lookup<Arc<Node>>, Errno> {
        self.count("lookup");
        let node = self.nodes.lock().unwrap().get(name).cloned();
        // So that another process can see it too.
        let node = node.or_else(|| {
            let node = self.nodes.lock().unwrap().get(OsStr::new("db")).cloned();
            node.filter(|_| name == OsStr::new(&format!("waiting-{}", self.waiting())))
        });
        match node {
            Some(node) => self.entry(node).map(Lookup::Found),
            None if name == "remembered-missing" => Ok(Lookup::Missing(Duration::from_secs(60))),
            None => Ok(Lookup::Missing(Duration::ZERO)),
        }
    }

    fn getattr(&self, node: &Arc<Node>) -> Result<Attr, Errno> {
        self.count("getattr");
        self.attr(node)
    }

    fn setattr(&self, node: &Arc<Node>, change: SetAttr, reply: Reply<Attr>) {
        self.count("setattr");
        let resized = change.size.map_or(Ok(()), |size| node.file.set_len(size).map_err(errno));
        reply.send(resized.and_then(|()| self.attr(node)));
    }

    fn open(&self, node: &Arc<Node>, _: Caller) -> Result<Opened<Arc<Handle>>, Errno> {
        self.count("open");
        self.opened(node)
    }

    fn create(
        &self,
        name: &OsStr,
        _: i32,
        _: Caller,
    ) -> Result<Created<Arc<Node>, Arc<Handle>>, Errno> {
        self.count("create");
        assert_ne!(name, "panic", "a panic on purpose");
        let path = self.backing.join(name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let ino = self.next.fetch_add(1, Ordering::Relaxed);
        let node = Arc::new(Node { ino, name: name.to_owned(), file: file.map_err(errno)? });
        self.nodes.lock().unwrap().insert(name.to_owned(), node.clone());
        let opened = self.opened(&node)?;
        Ok((self.entry(node)?, opened))
    }

    fn unlink(&self, name: &OsStr, reply: Reply<()>) {
        let removed = self.nodes.lock().unwrap().remove(name);
        reply.send(match removed {
            Some(node) => nix::unistd::unlink(&self.backing.join(&node.name)),
            None => Err(Errno::ENOENT),
        });
    }

    fn read(&self, handle: &Arc<Handle>, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        self.count("read");
        let mut filled = 0;
        while filled < buf.len() {
            let at = offset + filled as u64;
            match handle.node.file.read_at(&mut buf[filled..], at).map_err(errno)? {
                0 => break,
                len => filled += len,
            }
        }
        Ok(filled)
    }

    fn write(&self, handle: &Arc<Handle>, write: Write<'_>, reply: Reply<u32>) {
        self.count("write");
        let written = handle.node.file.write_all_at(write.data, write.offset);
        reply.send(written.map_err(errno).map(|()| write.data.len() as u32));
    }

    fn flush(&self, handle: &Arc<Handle>, owner: Owner, reply: Reply<()>) {
        self.count("flush");
        let mut locks = self.locks.lock().unwrap();
        locks.held.retain(|held| held.owner != owner || held.ino != handle.node.ino);
        locks.grant();
        reply.send(Ok(()));
    }

    fn release(&self, handle: Arc<Handle>) {
        self.count("release");
        let mut locks = self.locks.lock().unwrap();
        locks.held.retain(|held| held.handle != handle.id);
        locks.grant();
    }

    fn fsync(&self, handle: &Arc<Handle>, data_only: bool, reply: Reply<()>) {
        self.count(if data_only { "fdatasync" } else { "fsync" });
        reply.send(handle.node.file.sync_all().map_err(errno));
    }

    fn fsync_dir(&self, reply: Reply<()>) {
        self.count("fsync_dir");
        reply.send(Ok(()));
    }

    fn getlk(&self, handle: &Arc<Handle>, call: LockCall) -> Result<Option<Conflict>, Errno> {
        let LockCall { owner, range, kind, .. } = call;
        let wanted = Held { ino: handle.node.ino, handle: handle.id, owner, range, kind };
        Ok(self.locks.lock().unwrap().conflict(&wanted))
    }

    fn setlk(&self, handle: &Arc<Handle>, call: LockCall, wait: Wait, reply: Reply<()>) {
        self.count("setlk");
        let LockCall { owner, range, kind, .. } = call;
        let lock = Held { ino: handle.node.ino, handle: handle.id, owner, range, kind };
        let mut locks = self.locks.lock().unwrap();
        if kind == LockKind::Unlock || locks.conflict(&lock).is_none() {
            locks.set(lock);
            reply.send(Ok(()));
            return;
        }
        match wait {
            Wait::No | Wait::Briefly => reply.send(Err(Errno::EAGAIN)),
            Wait::Yes(id) => locks.waiting.push(Waiting { id, lock, reply }),
        }
    }

    fn interrupt(&self, wait: WaitId) -> bool {
        self.count("interrupt");
        let mut locks = self.locks.lock().unwrap();
        let Some(index) = locks.waiting.iter().position(|waiting| waiting.id == wait) else {
            return false;
        };
        locks.waiting.remove(index).reply.send(Err(Errno::EINTR));
        true
    }

    fn readdir(&self) -> Result<Vec<DirEntry>, Errno> {
        let nodes = self.nodes.lock().unwrap();
        let line = |node: &Arc<Node>| DirEntry {
            ino: node.ino,
            name: node.name.clone().into(),
            file_type: FileType::Regular,
        };
        Ok(nodes.values().map(line).collect())
    }

    fn statfs(&self) -> Result<StatFs, Errno> {
        let stat = nix::sys::statvfs::statvfs(&self.backing)?;
        Ok(StatFs {
            blocks: stat.blocks(),
            bfree: stat.blocks_free(),
            bavail: stat.blocks_available(),
            files: stat.files(),
            ffree: stat.files_free(),
            bsize: stat.block_size() as u32,
            namelen: stat.name_max() as u32,
            frsize: stat.fragment_size() as u32,
        })
    }
}

/// A mounted volume with its directories; unmounted in any case.
pub struct Mounted {
    pub volume: Arc<TempVolume>,
    pub mount: Mount,
    pub dir: PathBuf,
    _place: Place,
}

impl Mounted {
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn backing(&self, name: &str) -> PathBuf {
        self.volume.backing.join(name)
    }
}

pub fn options(temp: &Path, transport: Transport) -> MountOptions {
    let mut options = MountOptions::new(temp.join("mount"), probe_file(temp));
    options.transport = transport;
    options.enable_uring = true;
    options
}

fn probe_file(temp: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(temp.join("probe")).unwrap()
}

/// A temporary directory with `mount` and `backing`. Dropped, nothing is mounted there any more: a
/// [`Mount`] that is dropped gives up at once if it is in use, and it is for a moment wherever another test
/// starts a process, which has our files until its exec.
pub struct Place(TempDir);

impl Place {
    pub fn new() -> Place {
        let temp = tempfile::tempdir().unwrap();
        directories(temp.path());
        Place(temp)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Place {
    #[track_caller]
    fn drop(&mut self) {
        let dir = self.path().join("mount");
        let start = Instant::now();
        while is_mounted(&dir) && start.elapsed() < DEADLINE && !std::thread::panicking() {
            let _ = umount2(&dir, MntFlags::empty());
            std::thread::yield_now();
        }
        let is_left = is_mounted(&dir);
        while is_mounted(&dir) && umount2(&dir, MntFlags::MNT_DETACH).is_ok() {}
        assert!(!is_left || std::thread::panicking(), "{} stays in use", dir.display());
    }
}

/// Whether something is mounted there.
fn is_mounted(dir: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mounts").unwrap();
    table.lines().any(|line| line.split(' ').nth(1) == dir.to_str())
}

/// Makes `mount` and `backing` below `temp`.
#[allow(clippy::disallowed_methods, reason = "a test's own directory")]
pub fn directories(temp: &Path) {
    std::fs::create_dir_all(temp.join("mount")).unwrap();
    std::fs::create_dir_all(temp.join("backing")).unwrap();
}

/// Every transport, for tests of one way.
pub const TRANSPORTS: [Transport; 2] = [Transport::Dev, Transport::Uring];

/// Every transport with every way.
pub const EVERY: [(Transport, Way); 6] = [
    (Transport::Dev, Way::Cached),
    (Transport::Dev, Way::Direct),
    (Transport::Dev, Way::Passthrough),
    (Transport::Uring, Way::Cached),
    (Transport::Uring, Way::Direct),
    (Transport::Uring, Way::Passthrough),
];

/// Mounts a new volume whose files are opened in this way.
#[track_caller]
pub fn mounted(transport: Transport, way: Way) -> Mounted {
    let place = Place::new();
    let volume = Arc::new(TempVolume::new(&place.path().join("backing"), way));
    let mut options = options(place.path(), transport);
    if way != Way::Passthrough {
        options.passthrough = PassthroughMode::Off;
    }
    let mount = fuse::mount(volume.clone(), options).unwrap();
    assert_eq!(mount.transport(), transport);
    let dir = place.path().join("mount");
    let passthrough = volume.kernel.get().unwrap().passthrough;
    assert_eq!(passthrough, way == Way::Passthrough, "kernel grants what is asked for");
    Mounted { volume, mount, dir, _place: place }
}
