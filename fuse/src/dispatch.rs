//! One request of the kernel, one call on [`Volume`], one answer. No decisions about files here:
//! only which node and which handle a request means.

use std::ffi::OsStr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;

use crate::abi;
use crate::disk::Disk;
use crate::interrupt::{Client, Waits};
use crate::nodes::{Handles, Nodes};
use crate::passthrough::{Way, Ways};
use crate::reply::{self, Delivery, Responder};
use crate::request::{Forgets, Lock, Operation, Parts, Span};
use crate::volume::{
    Caller, DirEntry, Entry, FileType, LockKind, Lookup, Opened, Owner, ROOT, Reply, SetAttr,
    Volume, Wait, WaitId, Write,
};
use crate::watch::{Stuck, TICK, Watch};

/// Whether each request is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trace {
    /// At level debug.
    On,
    /// Not at all.
    Off,
}

/// A mounted volume: what every transport hands its requests to.
pub(crate) struct Session<V: Volume> {
    pub volume: Arc<V>,
    pub waits: Arc<Waits>,
    pub watch: Arc<Watch>,
    disk: Arc<Disk>,
    nodes: Nodes<V::Node>,
    files: Handles<File<V::Handle>>,
    directories: Handles<Directory>,
    ways: Ways,
    trace: Trace,
}

/// An open file.
struct File<H> {
    handle: H,
    way: Way,
}

/// An open directory with the listing that was made when it was first read.
type Directory = Arc<Mutex<Option<Vec<DirEntry>>>>;

impl<V: Volume> Session<V> {
    /// A session that knows only the root.
    pub fn new(volume: Arc<V>, ways: Ways, disk: Arc<Disk>, trace: Trace) -> Session<V> {
        Session {
            volume,
            waits: Arc::default(),
            watch: Arc::new(Watch::new()),
            disk,
            nodes: Nodes::new(),
            files: Handles::new(),
            directories: Handles::new(),
            ways,
            trace,
        }
    }

    /// The mount has ended: releases what the kernel did not, because it was cut off.
    pub fn end(&self) {
        for file in self.files.drain() {
            self.volume.release(file.handle);
        }
    }

    /// Answers one request, perhaps later. A panic in it is logged, and answers EIO.
    /// `buffer` is for data on its way to the kernel.
    pub fn serve(&self, parts: &Parts<'_>, mut responder: Responder, buffer: &mut [u8]) {
        let header = &parts.header;
        responder.watch(self.watch.begin(header));
        if self.trace == Trace::On {
            let (opcode, node, pid) = (header.opcode, header.nodeid, header.pid);
            tracing::debug!(unique = header.unique, opcode, node, pid, "fuse request");
        }
        let operation = match parts.decode() {
            Ok(operation) => operation,
            Err(error) => {
                tracing::error!(opcode = header.opcode, %error, "decode fuse request");
                responder.error(Errno::EIO);
                return;
            }
        };
        let call = AssertUnwindSafe(|| self.call(header, operation, responder, buffer));
        if catch_unwind(call).is_err() {
            tracing::error!(opcode = header.opcode, node = header.nodeid, "fuse call panicked");
        }
    }

    fn call(
        &self,
        header: &abi::InHeader,
        operation: Operation<'_>,
        to: Responder,
        buffer: &mut [u8],
    ) {
        let id = header.nodeid;
        match operation {
            Operation::Lookup { name } => self.lookup(id, name, to),
            Operation::Forget { lookups } => self.forget(id, lookups, to),
            Operation::BatchForget(forgets) => self.forget_many(forgets, to),
            Operation::Getattr => self.getattr(id, to),
            Operation::Setattr { size } => self.setattr(id, SetAttr { size }, to),
            Operation::Unlink { name } => self.unlink(id, name, to),
            Operation::Open => self.open(header, to),
            Operation::Create { name, flags } => self.create(header, name, flags, to),
            Operation::Read(span) => self.read(span, to, buffer),
            Operation::Write { fh, offset, from_cache, data } => {
                self.write(fh, Write { offset, data, from_cache }, to);
            }
            Operation::Statfs => self.statfs(to),
            Operation::Release { fh } => self.release(id, fh, to),
            Operation::Flush { fh, owner } => self.flush(fh, owner, to),
            Operation::Fsync { fh, data_only } => self.fsync(fh, data_only, to),
            Operation::Opendir => self.opendir(id, to),
            Operation::Readdir(span) => self.readdir(span, to, buffer),
            Operation::Releasedir { fh } => self.releasedir(fh, to),
            Operation::Fsyncdir => self.volume.fsync_dir(empty(to)),
            Operation::Getlk(lock) => self.getlk(lock, to),
            Operation::Setlk(lock) => self.setlk(lock, to),
            Operation::Setlkw(lock) => self.setlkw(header, lock, to),
            Operation::Interrupt { unique } => {
                to.without_answer();
                self.waits.interrupt(unique, &*self.volume);
            }
            Operation::Destroy => {
                to.done();
            }
            // The first one was answered before there was a session.
            Operation::Init(_) => {
                to.error(Errno::EIO);
            }
            Operation::Refused(errno) => {
                to.refuse(errno);
            }
        }
    }

    fn lookup(&self, parent: u64, name: &OsStr, to: Responder) {
        if parent != ROOT {
            to.error(Errno::ENOTDIR);
            return;
        }
        match self.volume.lookup(name) {
            Ok(Lookup::Found(entry)) => self.found(entry, to),
            Ok(Lookup::Missing(ttl)) if ttl.is_zero() => {
                to.error(Errno::ENOENT);
            }
            Ok(Lookup::Missing(ttl)) => {
                to.value(&reply::missing_out(ttl));
            }
            Err(errno) => {
                to.error(errno);
            }
        }
    }

    /// The node is remembered before the kernel hears of it, and forgotten if it does not.
    fn found(&self, entry: Entry<V::Node>, to: Responder) {
        let id = entry.attr.ino;
        let answer = reply::entry_out(&entry.attr, entry.ttl);
        self.nodes.remember(id, entry.node);
        if to.value(&answer) == Delivery::Gone {
            self.nodes.forget(id, 1);
        }
    }

    fn forget(&self, id: u64, lookups: u64, to: Responder) {
        to.without_answer();
        self.nodes.forget(id, lookups);
    }

    fn forget_many(&self, forgets: Forgets<'_>, to: Responder) {
        to.without_answer();
        forgets.iter().for_each(|(id, lookups)| self.nodes.forget(id, lookups));
    }

    fn getattr(&self, id: u64, to: Responder) {
        if id == ROOT {
            to.attr(Ok(self.volume.root()));
            return;
        }
        match self.nodes.get(id) {
            Some(node) => to.attr(self.volume.getattr(&node)),
            None => to.error(Errno::ESTALE),
        };
    }

    fn setattr(&self, id: u64, change: SetAttr, to: Responder) {
        if id == ROOT {
            to.attr(Ok(self.volume.root()));
            return;
        }
        let Some(node) = self.nodes.get(id) else {
            to.error(Errno::ESTALE);
            return;
        };
        let reply = Reply::new(move |result| {
            to.attr(result);
        });
        if change.size.is_none() {
            self.volume.setattr(&node, change, reply);
            return;
        }
        // The end of a truncated journal is a commit.
        let volume = self.volume.clone();
        self.disk.call(move || volume.setattr(&node, change, reply));
    }

    fn unlink(&self, parent: u64, name: &OsStr, to: Responder) {
        if parent != ROOT {
            to.error(Errno::ENOTDIR);
            return;
        }
        // ENOSYS of an unlink is not remembered by the kernel, so it may say so.
        let reply = Reply::new(move |result: Result<(), Errno>| {
            match result {
                Ok(()) => to.done(),
                Err(errno) => to.refuse(errno),
            };
        });
        // The end of a deleted journal is a commit.
        let (volume, name) = (self.volume.clone(), name.to_owned());
        self.disk.call(move || volume.unlink(&name, reply));
    }

    fn open(&self, header: &abi::InHeader, to: Responder) {
        let (id, thread) = (header.nodeid, Caller(header.pid));
        let Some(node) = self.nodes.get(id) else {
            to.error(Errno::ESTALE);
            return;
        };
        match self.volume.open(&node, thread).and_then(|opened| self.admit(id, opened)) {
            Ok(answer) => {
                if to.value(&answer) == Delivery::Gone {
                    self.close(id, answer.fh);
                }
            }
            Err(errno) => {
                to.error(errno);
            }
        }
    }

    fn create(&self, header: &abi::InHeader, name: &OsStr, flags: i32, to: Responder) {
        if header.nodeid != ROOT {
            to.error(Errno::ENOTDIR);
            return;
        }
        match self.volume.create(name, flags, Caller(header.pid)) {
            Ok((entry, opened)) => self.created(entry, opened, to),
            Err(errno) => {
                to.error(errno);
            }
        }
    }

    fn created(&self, entry: Entry<V::Node>, opened: Opened<V::Handle>, to: Responder) {
        let id = entry.attr.ino;
        let open = match self.admit(id, opened) {
            Ok(open) => open,
            Err(errno) => {
                to.error(errno);
                return;
            }
        };
        let answer = abi::CreateOut { entry: reply::entry_out(&entry.attr, entry.ttl), open };
        self.nodes.remember(id, entry.node);
        if to.value(&answer) == Delivery::Gone {
            self.close(id, open.fh);
            self.nodes.forget(id, 1);
        }
    }

    /// Keeps an opened file, in the way that its node allows.
    fn admit(&self, id: u64, opened: Opened<V::Handle>) -> Result<abi::OpenOut, Errno> {
        match self.ways.open(id, opened.mode) {
            Ok(granted) => {
                let file = File { handle: opened.handle, way: granted.way };
                let fh = self.files.insert(file);
                let (open_flags, backing_id) = (granted.open_flags, granted.backing_id);
                Ok(abi::OpenOut { fh, open_flags, backing_id })
            }
            Err(errno) => {
                self.volume.release(opened.handle);
                Err(errno)
            }
        }
    }

    fn close(&self, id: u64, fh: u64) {
        if let Some(file) = self.files.remove(fh) {
            self.volume.release(file.handle);
            self.ways.close(id, file.way);
        }
    }

    fn release(&self, id: u64, fh: u64, to: Responder) {
        self.close(id, fh);
        to.done();
    }

    fn read(&self, span: Span, to: Responder, buffer: &mut [u8]) {
        let Some(handle) = self.handle(span.fh) else {
            to.error(Errno::ESTALE);
            return;
        };
        let room = room(buffer, span.size);
        match self.volume.read(&handle, span.offset, room) {
            Ok(len) => to.buffered(room.get(..len).unwrap_or(room)),
            Err(errno) => to.error(errno),
        };
    }

    fn write(&self, fh: u64, write: Write<'_>, to: Responder) {
        let Some(handle) = self.handle(fh) else {
            to.error(Errno::ESTALE);
            return;
        };
        let reply = Reply::new(move |result| {
            to.written(result);
        });
        self.volume.write(&handle, write, reply);
    }

    fn statfs(&self, to: Responder) {
        match self.volume.statfs() {
            Ok(stat) => to.value(&reply::statfs_out(&stat)),
            Err(errno) => to.error(errno),
        };
    }

    fn flush(&self, fh: u64, owner: Owner, to: Responder) {
        match self.handle(fh) {
            Some(handle) => self.volume.flush(&handle, owner, empty(to)),
            None => {
                to.error(Errno::ESTALE);
            }
        }
    }

    fn fsync(&self, fh: u64, data_only: bool, to: Responder) {
        match self.handle(fh) {
            Some(handle) => {
                let clients = to.clients();
                let (volume, reply) = (self.volume.clone(), empty(to));
                self.disk.sync(clients, move || volume.fsync(&handle, data_only, reply));
            }
            None => {
                to.error(Errno::ESTALE);
            }
        }
    }

    fn opendir(&self, id: u64, to: Responder) {
        if id != ROOT {
            to.error(Errno::ENOTDIR);
            return;
        }
        let fh = self.directories.insert(Directory::default());
        if to.value(&abi::OpenOut { fh, ..abi::OpenOut::default() }) == Delivery::Gone {
            self.directories.remove(fh);
        }
    }

    fn readdir(&self, span: Span, to: Responder, buffer: &mut [u8]) {
        let Some(directory) = self.directories.get(span.fh, Directory::clone) else {
            to.error(Errno::ESTALE);
            return;
        };
        let mut listing = directory.lock().unwrap();
        if span.offset == 0 || listing.is_none() {
            match self.listing() {
                Ok(entries) => *listing = Some(entries),
                Err(errno) => {
                    to.error(errno);
                    return;
                }
            }
        }
        let room = room(buffer, span.size);
        let len = reply::fill_directory(listing.as_deref().unwrap_or(&[]), span.offset, room);
        to.data(&room[..len]);
    }

    fn listing(&self) -> Result<Vec<DirEntry>, Errno> {
        let own = |name: &str| DirEntry {
            ino: ROOT,
            name: OsStr::new(name).into(),
            file_type: FileType::Directory,
        };
        let mut entries = vec![own("."), own("..")];
        entries.extend(self.volume.readdir()?);
        Ok(entries)
    }

    fn releasedir(&self, fh: u64, to: Responder) {
        self.directories.remove(fh);
        to.done();
    }

    fn getlk(&self, lock: Lock, to: Responder) {
        let Some(handle) = self.handle(lock.fh) else {
            to.error(Errno::ESTALE);
            return;
        };
        match self.volume.getlk(&handle, lock.call) {
            Ok(conflict) => to.value(&reply::lock_out(conflict)),
            Err(errno) => to.error(errno),
        };
    }

    fn setlk(&self, lock: Lock, to: Responder) {
        match self.handle(lock.fh) {
            Some(handle) => {
                let wait = if to.is_crowded() { Wait::No } else { Wait::Briefly };
                let reply = Reply::new(move |result| locked(to, result));
                self.volume.setlk(&handle, lock.call, wait, reply);
            }
            None => {
                to.error(Errno::ESTALE);
            }
        }
    }

    /// A lock call that may wait. Giving up a lock never does, however it is asked for. Where
    /// waiting calls would leave no room for others, it fails with ENOLCK instead.
    fn setlkw(&self, header: &abi::InHeader, lock: Lock, mut to: Responder) {
        if lock.call.kind == LockKind::Unlock {
            self.setlk(lock, to);
            return;
        }
        let Some(handle) = self.handle(lock.fh) else {
            to.error(Errno::ESTALE);
            return;
        };
        if to.is_crowded() {
            let reply = Reply::new(move |result: Result<(), Errno>| {
                let crowded = |errno| if errno == Errno::EAGAIN { Errno::ENOLCK } else { errno };
                locked(to, result.map_err(crowded));
            });
            self.volume.setlk(&handle, lock.call, Wait::No, reply);
            return;
        }
        to.watch(None);
        let unique = header.unique;
        let unsure = to.may_lose_interrupts().then_some(Client(header.pid));
        self.waits.begin(unique, unsure);
        let waits = self.waits.clone();
        let reply = Reply::new(move |result| {
            waits.end(unique);
            locked(to, result);
        });
        self.volume.setlk(&handle, lock.call, Wait::Yes(WaitId(unique)), reply);
        self.waits.begun(unique, &*self.volume);
    }

    /// Logs a request that is not answered.
    pub fn report(&self, stuck: Stuck) {
        let name = |node| self.volume.name_of(&node);
        let file = self.nodes.get(stuck.node).map_or_else(|| "/".to_owned(), name);
        let (request, age) = (abi::op::name(stuck.opcode), stuck.ticks * TICK);
        let (pid, seconds) = (stuck.pid, age.as_secs());
        tracing::warn!(request, file, pid, seconds, "fuse request is not answered yet");
    }

    fn handle(&self, fh: u64) -> Option<V::Handle> {
        self.files.get(fh, |file| file.handle.clone())
    }
}

impl<V: Volume> Drop for Session<V> {
    fn drop(&mut self) {
        self.disk.stop();
    }
}

/// The call's own reply, for an answer without a value.
fn empty(to: Responder) -> Reply<()> {
    Reply::new(move |result| {
        to.empty(result);
    })
}

/// The answer to a lock call, after whose ENOSYS the kernel goes on asking.
fn locked(to: Responder, result: Result<(), Errno>) {
    match result {
        Ok(()) => to.done(),
        Err(errno) => to.refuse(errno),
    };
}

/// As much of the buffer as is asked for, at most all of it.
fn room(buffer: &mut [u8], size: u32) -> &mut [u8] {
    let len = buffer.len().min(usize::try_from(size).unwrap_or(usize::MAX));
    &mut buffer[..len]
}
