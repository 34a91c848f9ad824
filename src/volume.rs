//! File names and file calls of the mount to databases of the engine.
//!
//! The mount is one flat directory. `NAME` is a database; `NAME-journal`, `NAME-wal`, `NAME-shm` are
//! SQLite's files beside it; `NAME-pos` says where it stands and `NAME-lock` is for the HALT lock;
//! `.primary` and `.lag` speak of the node. A name that SQLite gives to a super-journal is a plain
//! file. Errors become an errno here and nowhere else.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use fuse::{
    Attr, Caller, Conflict, Created, DirEntry, Entry, Errno, FileType, Kernel, LockCall, LockKind,
    Lookup, Notifier, OpenMode, Opened, Owner, Range, Reply, SetAttr, StatFs, Wait, WaitId, Write,
};

use crate::engine::db::{Answer, Db, Patience, Refusal};
use crate::engine::files::{Backing, FileKind, next_ino};
use crate::engine::halt::HaltId;
use crate::engine::locks::{self, Request};
use crate::engine::name::is_super_journal;
use crate::engine::{DbName, Engine, PageCache, Role};
use crate::sqlite::lock_byte::{Lock, LockFile, LockSet};

mod halt;
mod past;
pub mod plain;
mod shown;
mod text;

use past::Past;
use plain::PlainFiles;
use shown::Shown;

/// What the kernel may remember until it is told otherwise.
const KEEP: Duration = Duration::from_secs(60);
/// What it has to ask for each time.
const ASK: Duration = Duration::ZERO;

/// The mount of an engine.
pub struct EngineVolume {
    engine: Arc<Engine>,
    notifier: OnceLock<Notifier>,
    /// The super-journals.
    plain: PlainFiles,
    shown: Shown,
    /// Lock calls that wait, by their id: whom to ask.
    waiting: Arc<Mutex<HashMap<u64, Waiting>>>,
    /// Who has a WAL open that is written past us.
    past: Past,
}

/// Who ends a lock call that waits.
#[derive(Clone)]
enum Waiting {
    /// One of SQLite's locks.
    Table(Arc<Db>),
    /// A HALT lock.
    Halt(HaltId),
}

/// Takes the result of a call that changes something.
type Done = Box<dyn FnOnce(Result<(), Errno>) + Send>;

/// The same, for the engine.
fn answer(done: Done) -> Answer {
    Box::new(move |result| done(result.map_err(refused)))
}

/// What a name stands for.
#[derive(Clone)]
pub enum Node {
    /// One of SQLite's files of a database.
    File(Arc<Db>, Arc<Backing>),
    /// `NAME-pos`
    Pos(Arc<Db>),
    /// `NAME-lock`
    Lock(Arc<Db>),
    /// `.primary`
    Primary,
    /// `.lag`
    Lag,
    /// A super-journal.
    Plain(Arc<plain::PlainFile>),
}

impl Node {
    fn is_turned_out(&self) -> bool {
        matches!(self, Node::File(_, backing) if backing.is_turned_out())
    }
}

/// An open file.
pub struct OpenFile {
    id: locks::Handle,
    node: Node,
    /// The HALT lock that was taken through it, if it is a `NAME-lock`.
    halt: halt::Held,
    /// The content of `.primary` and `.lag`, made at the first read.
    text: OnceLock<String>,
}

impl OpenFile {
    /// Whether its file was removed: what its name stands for now is another file, or none.
    fn is_stale(&self) -> bool {
        matches!(&self.node, Node::File(db, backing) if !backing.is_current())
    }

    /// Whether it belongs to a connection that must not go on.
    fn is_turned_out(&self) -> bool {
        self.node.is_turned_out()
    }
}

/// A name, taken apart.
enum Name {
    Db(DbName, FileKind),
    Pos(DbName),
    Lock(DbName),
    Primary,
    Lag,
    SuperJournal(String),
}

impl Name {
    fn parse(name: &OsStr) -> Option<Name> {
        let name = name.to_str()?;
        match name {
            ".primary" => return Some(Name::Primary),
            ".lag" => return Some(Name::Lag),
            _ if is_super_journal(name) => return Some(Name::SuperJournal(name.to_owned())),
            _ => {}
        }
        let db = |base: &str| DbName::new(base).ok();
        for kind in [FileKind::Journal, FileKind::Wal, FileKind::Shm] {
            if let Some(base) = name.strip_suffix(kind.suffix()) {
                return db(base).map(|name| Name::Db(name, kind));
            }
        }
        if let Some(base) = name.strip_suffix("-pos") {
            return db(base).map(Name::Pos);
        }
        if let Some(base) = name.strip_suffix("-lock") {
            return db(base).map(Name::Lock);
        }
        db(name).map(|name| Name::Db(name, FileKind::Database))
    }
}

impl EngineVolume {
    /// The mount of `engine`.
    pub fn new(engine: Arc<Engine>) -> EngineVolume {
        EngineVolume {
            plain: PlainFiles::new(engine.layout().super_journals()),
            shown: Shown::new(engine.clone()),
            engine,
            notifier: OnceLock::new(),
            waiting: Arc::default(),
            past: Past::default(),
        }
    }

    fn node(&self, name: &OsStr) -> Option<Node> {
        match Name::parse(name)? {
            Name::Db(name, kind) => {
                let db = self.engine.database(name.as_str())?;
                let backing = db.files().get(kind)?;
                Some(Node::File(db, backing))
            }
            Name::Pos(name) => self.engine.database(name.as_str()).map(Node::Pos),
            Name::Lock(name) => self.engine.database(name.as_str()).map(Node::Lock),
            Name::Primary => {
                matches!(self.engine.role(), Role::Replica(_)).then_some(Node::Primary)
            }
            Name::Lag => Some(Node::Lag),
            Name::SuperJournal(name) => self.plain.get(&name).map(Node::Plain),
        }
    }

    fn entry(&self, node: Node) -> Result<Entry<Node>, Errno> {
        let attr = self.shown.attr(&node)?;
        let ttl = match &node {
            Node::Primary => ASK,
            // SQLite removes what is left beside a new database, and takes it for a disk I/O error if nothing is
            // left any more. The kernel hears of a WAL that went with its database only after the call that
            // removed that. Who works with a WAL has it open.
            Node::File(_, backing) if backing.kind == FileKind::Wal => ASK,
            _ => KEEP,
        };
        Ok(Entry { node, attr, ttl })
    }

    fn opened(&self, node: &Node, thread: Caller) -> Result<Opened<Arc<OpenFile>>, Errno> {
        let id = locks::Handle(next_ino());
        let mode = match node {
            Node::File(db, backing) => self.mode(db, backing, id, thread)?,
            Node::Plain(_) => OpenMode::Cached,
            Node::Lock(db) => {
                self.expect_halt(db)?;
                OpenMode::Direct
            }
            Node::Pos(_) | Node::Primary | Node::Lag => OpenMode::Direct,
        };
        let (node, halt, text) = (node.clone(), halt::Held::default(), OnceLock::new());
        Ok(Opened { handle: Arc::new(OpenFile { id, node, halt, text }), mode })
    }

    fn mode(
        &self,
        db: &Db,
        backing: &Backing,
        id: locks::Handle,
        thread: Caller,
    ) -> Result<OpenMode, Errno> {
        let passthrough = self.engine.shared().is_passthrough();
        match backing.kind {
            // A WAL grows while its readers ask how long it is, and the kernel may keep an answer from
            // before: a reader would find the end of the file where a frame is.
            FileKind::Wal if !passthrough => return Ok(OpenMode::Direct),
            FileKind::Wal => {}
            FileKind::Shm if passthrough => {}
            _ => return Ok(OpenMode::Cached),
        }
        let file = backing.file.try_clone().map_err(|error| os_errno(&error))?;
        if backing.kind == FileKind::Wal && !self.past.admit(db, id, thread) {
            return Ok(OpenMode::Direct);
        }
        Ok(OpenMode::Passthrough(file.into()))
    }

    /// Has the kernel forget what somebody wrote into a mapping of the database file, and what was refused: it keeps the
    /// page otherwise, and SQLite would read it.
    fn forget_mapped(&self, db: &Db, backing: &Backing) {
        if let Some(cache) = self.engine.shared().page_cache() {
            cache.file_mistaken(backing.ino, db.name().as_str());
        }
    }

    fn text<'a>(&self, file: &'a OpenFile) -> std::borrow::Cow<'a, str> {
        match &file.node {
            Node::Pos(db) => text::pos(db).into(),
            Node::Primary => file.text.get_or_init(|| text::primary(&self.engine)).as_str().into(),
            Node::Lag => file.text.get_or_init(|| text::lag(&self.engine)).as_str().into(),
            _ => "".into(),
        }
    }

    fn create_node(&self, name: &OsStr) -> Result<Node, Errno> {
        match Name::parse(name).ok_or(Errno::EINVAL)? {
            Name::Db(name, FileKind::Database) => {
                let known = self.engine.database(name.as_str());
                let may_begin =
                    known.map_or_else(|| self.engine.shared().may_begin(), |db| db.may_begin());
                if !may_begin {
                    return Err(Errno::EACCES);
                }
                let db =
                    self.engine.database_or_new(&name).map_err(|error| refused(error.into()))?;
                let backing = db.create_file(FileKind::Database).map_err(refused)?;
                Ok(Node::File(db, backing))
            }
            Name::Db(name, kind) => {
                let db = self.engine.database(name.as_str()).ok_or(Errno::ENOENT)?;
                let backing = db.create_file(kind).map_err(refused)?;
                Ok(Node::File(db, backing))
            }
            Name::SuperJournal(name) => {
                if !self.engine.shared().is_writable() {
                    return Err(Errno::EACCES);
                }
                self.plain.create(&name).map(Node::Plain).map_err(|error| os_errno(&error))
            }
            Name::Pos(_) | Name::Lock(_) | Name::Primary | Name::Lag => Err(Errno::EACCES),
        }
    }

    fn truncate(&self, node: &Node, size: u64, done: Done) {
        if node.is_turned_out() {
            return done(Err(Errno::ESTALE));
        }
        let result = match node {
            Node::File(db, backing) => match backing.kind {
                FileKind::Database => db.truncate_database(backing, size),
                FileKind::Journal => {
                    return db.truncate_journal(backing, size, answer(done));
                }
                FileKind::Wal => db.truncate_wal(backing, size),
                FileKind::Shm => db.truncate_shm(backing, size),
            }
            .map_err(refused),
            Node::Plain(file) => file.truncate(size).map_err(|error| os_errno(&error)),
            _ => Err(Errno::EACCES),
        };
        done(result);
    }

    fn remove(&self, name: &OsStr, done: Done) {
        let result = match Name::parse(name) {
            Some(Name::Db(name, kind)) => match self.engine.database(name.as_str()) {
                Some(db) if db.files().get(kind).is_some() => match kind {
                    FileKind::Database => db.drop_database().map_err(refused),
                    FileKind::Journal => return db.remove_journal(answer(done)),
                    FileKind::Wal => db.remove_wal().map_err(refused),
                    FileKind::Shm => db.remove_shm().map_err(refused),
                },
                _ => Err(Errno::ENOENT),
            },
            // SQLite commits a transaction over several databases by this.
            Some(Name::SuperJournal(_)) if self.engine.shared().is_fenced() => Err(Errno::EIO),
            Some(Name::SuperJournal(name)) => {
                self.plain.remove(&name).map_err(|error| os_errno(&error))
            }
            Some(Name::Pos(_) | Name::Lock(_) | Name::Primary | Name::Lag) => Err(Errno::EACCES),
            None => Err(Errno::ENOENT),
        };
        done(result);
    }

    fn call<'a>(
        &self,
        file: &'a OpenFile,
        call: LockCall,
    ) -> Result<(&'a Arc<Db>, Request), Errno> {
        let LockCall { owner, range, kind, .. } = call;
        let Node::File(db, backing) = &file.node else { return Err(Errno::ENOTSUP) };
        let lock_file = lock_file(backing.kind).ok_or(Errno::ENOTSUP)?;
        let set = LockSet::in_range(lock_file, range.start, range.end);
        let kind = match kind {
            LockKind::Exclusive => locks::LockKind::Exclusive,
            LockKind::Shared | LockKind::Unlock => locks::LockKind::Shared,
        };
        let owner = locks::Owner::client(owner.0);
        Ok((db, Request { owner, via: file.id, set, kind }))
    }
}

impl fuse::Volume for EngineVolume {
    type Node = Node;
    type Handle = Arc<OpenFile>;

    fn mounted(&self, kernel: Kernel) {
        let cache = Arc::new(KernelCache(kernel.notifier.clone()));
        self.engine.mounted(cache, kernel.passthrough);
        // Mounted once.
        let _ = self.notifier.set(kernel.notifier);
    }

    fn root(&self) -> Attr {
        self.shown.root()
    }

    fn name_of(&self, node: &Node) -> String {
        match node {
            Node::File(db, backing) => format!("{}{}", db.name(), backing.kind.suffix()),
            Node::Pos(db) => format!("{}-pos", db.name()),
            Node::Lock(db) => format!("{}-lock", db.name()),
            Node::Primary => ".primary".to_owned(),
            Node::Lag => ".lag".to_owned(),
            Node::Plain(_) => "a super-journal".to_owned(),
        }
    }

    fn lookup(&self, name: &OsStr) -> Result<Lookup<Node>, Errno> {
        if let Some(node) = self.node(name) {
            return self.entry(node).map(Lookup::Found);
        }
        // SQLite asks for these before each transaction; who makes one does it through the kernel,
        // or tells it.
        let often =
            matches!(Name::parse(name), Some(Name::Db(_, FileKind::Journal | FileKind::Wal)));
        Ok(Lookup::Missing(if often { KEEP } else { ASK }))
    }

    fn getattr(&self, node: &Node) -> Result<Attr, Errno> {
        self.shown.attr(node)
    }

    fn setattr(&self, node: &Node, change: SetAttr, reply: Reply<Attr>) {
        let (shown, shown_node) = (self.shown.clone(), node.clone());
        let done = move |result: Result<(), Errno>| {
            reply.send(result.and_then(|()| shown.attr(&shown_node)));
        };
        match change.size {
            Some(size) => self.truncate(node, size, Box::new(done)),
            None => done(Ok(())),
        }
    }

    fn open(&self, node: &Node, thread: Caller) -> Result<Opened<Arc<OpenFile>>, Errno> {
        // The kernel hears of a name that is gone after the call that removed it, so a client may come
        // here by a name it still knows. On ESTALE the kernel asks for the name again.
        if let Node::File(_, backing) = node
            && !backing.is_current()
        {
            return Err(Errno::ESTALE);
        }
        if let Node::File(db, backing) = node
            && backing.kind == FileKind::Wal
        {
            db.refuse_heap_index().map_err(refused)?;
        }
        self.opened(node, thread)
    }

    fn create(
        &self,
        name: &OsStr,
        flags: i32,
        thread: Caller,
    ) -> Result<Created<Node, Arc<OpenFile>>, Errno> {
        let node = match self.node(name) {
            Some(_) if flags & libc::O_EXCL != 0 => return Err(Errno::EEXIST),
            Some(node) => node,
            None => match self.create_node(name) {
                // The applier makes files too, and was quicker.
                Err(Errno::EEXIST) if flags & libc::O_EXCL == 0 => {
                    self.node(name).ok_or(Errno::ENOENT)?
                }
                made => made?,
            },
        };
        let opened = self.opened(&node, thread)?;
        Ok((self.entry(node)?, opened))
    }

    fn unlink(&self, name: &OsStr, reply: Reply<()>) {
        self.remove(name, Box::new(move |result| reply.send(result)));
    }

    fn read(&self, handle: &Arc<OpenFile>, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let file = match &handle.node {
            Node::File(_, backing) => &backing.file,
            Node::Plain(plain) => &plain.file,
            _ => {
                let text = self.text(handle);
                let rest = text.as_bytes().get(offset as usize..).unwrap_or_default();
                let len = rest.len().min(buf.len());
                buf[..len].copy_from_slice(&rest[..len]);
                return Ok(len);
            }
        };
        crate::os::read_up_to("read:mount", file, buf, offset).map_err(|error| os_errno(&error))
    }

    fn write(&self, handle: &Arc<OpenFile>, write: Write<'_>, reply: Reply<u32>) {
        let Write { offset, data, from_cache } = write;
        let len = data.len() as u32;
        let done: Done = Box::new(move |result| reply.send(result.map(|()| len)));
        if handle.is_turned_out() {
            // Of a wal-index the kernel writes back what it still has.
            return done(Err(Errno::ESTALE));
        }
        let result = match &handle.node {
            Node::File(db, backing) => match backing.kind {
                FileKind::Database => {
                    let written = db.write_database(backing, offset, data).map_err(refused);
                    let is_refused = written.is_err();
                    done(written);
                    if is_refused && from_cache {
                        self.forget_mapped(db, backing);
                    }
                    return;
                }
                FileKind::Journal => {
                    return db.write_journal(backing, offset, data, answer(done));
                }
                FileKind::Wal => {
                    return db.write_wal(backing, handle.id, offset, data, answer(done));
                }
                FileKind::Shm if from_cache => db.write_back_shm(backing, offset, data),
                FileKind::Shm => db.write_shm(backing, handle.id, offset, data),
            }
            .map_err(refused),
            Node::Plain(plain) => plain.write(offset, data).map_err(|error| os_errno(&error)),
            _ => Err(Errno::EIO),
        };
        done(result);
    }

    fn flush(&self, handle: &Arc<OpenFile>, owner: Owner, reply: Reply<()>) {
        if let Node::File(db, backing) = &handle.node
            && let Some(file) = lock_file(backing.kind)
        {
            match backing.is_current() {
                true => db.flush(locks::Owner::client(owner.0), LockSet::file(file)),
                // Its owner may have locked the file that has its name now.
                false => db.release_handle(handle.id),
            }
        }
        reply.send(Ok(()));
    }

    fn release(&self, handle: Arc<OpenFile>) {
        match &handle.node {
            Node::File(db, backing) => {
                db.release_handle(handle.id);
                if backing.kind == FileKind::Wal {
                    self.past.forget(handle.id);
                }
            }
            Node::Lock(db) => self.close_halt(&handle, db),
            _ => {}
        }
    }

    fn fsync(&self, handle: &Arc<OpenFile>, _data_only: bool, reply: Reply<()>) {
        reply.send(match &handle.node {
            Node::File(db, backing) => db.sync_file(backing, handle.id).map_err(refused),
            Node::Plain(plain) => plain.sync().map_err(|error| os_errno(&error)),
            _ => Ok(()),
        });
    }

    fn fsync_dir(&self, reply: Reply<()>) {
        reply.send(self.engine.sync_names().map_err(|error| refused(error.into())));
    }

    fn getlk(&self, handle: &Arc<OpenFile>, call: LockCall) -> Result<Option<Conflict>, Errno> {
        if let Node::Lock(db) = &handle.node {
            return halt::query(db, call.range);
        }
        let (db, call) = self.call(handle, call)?;
        if handle.is_stale() {
            return Ok(None);
        }
        Ok(db.query(&call).map(|conflict| {
            let (start, end) = conflict.lock.range();
            let kind = match conflict.kind {
                locks::LockKind::Exclusive => LockKind::Exclusive,
                locks::LockKind::Shared => LockKind::Shared,
            };
            Conflict { range: Range { start, end }, kind }
        }))
    }

    fn setlk(&self, handle: &Arc<OpenFile>, call: LockCall, wait: Wait, reply: Reply<()>) {
        if let Node::Lock(db) = &handle.node {
            return self.halt_call(handle, db, call, wait, reply);
        }
        let LockCall { kind, process, .. } = call;
        let (db, call) = match self.call(handle, call) {
            Ok(found) => found,
            Err(errno) => return reply.send(Err(errno)),
        };
        if handle.is_stale() {
            if kind == LockKind::Unlock {
                // It may have been granted before the file went.
                db.unlock_handle(&call);
            }
            let may_go_on = kind == LockKind::Unlock || !handle.is_turned_out();
            return reply.send(if may_go_on { stale_lock(&call) } else { Err(Errno::ESTALE) });
        }
        if kind == LockKind::Unlock {
            return db.unlock(call.owner, call.set, move || reply.send(Ok(())));
        }
        if self.past.writes_past(db, &call, process) {
            return reply.send(Err(Errno::EAGAIN));
        }
        let mut waiting = None;
        let patience = match wait {
            Wait::No => Patience::None,
            Wait::Briefly => Patience::WithEngine,
            Wait::Yes(WaitId(id)) => {
                self.waiting.lock().unwrap().insert(id, Waiting::Table(db.clone()));
                waiting = Some((id, self.waiting.clone()));
                Patience::Any(id)
            }
        };
        let answer = move |result: Result<(), Refusal>| {
            if let Some((id, waiting)) = waiting {
                waiting.lock().unwrap().remove(&id);
            }
            reply.send(result.map_err(refused));
        };
        db.lock(call, patience, Box::new(answer));
    }

    fn interrupt(&self, wait: WaitId) -> bool {
        // It stays until the call is answered: one that does not wait yet is interrupted again.
        let waiting = self.waiting.lock().unwrap().get(&wait.0).cloned();
        match waiting {
            Some(Waiting::Table(db)) => db.interrupt(wait.0),
            Some(Waiting::Halt(id)) => {
                self.engine.shared().forward().is_some_and(|forward| forward.cancel(id))
            }
            None => false,
        }
    }

    fn readdir(&self) -> Result<Vec<DirEntry>, Errno> {
        let mut entries = vec![line(".lag", self.shown.inos[1])];
        if matches!(self.engine.role(), Role::Replica(_)) {
            entries.push(line(".primary", self.shown.inos[0]));
        }
        for db in self.engine.databases() {
            if db.view().pages == 0 {
                continue;
            }
            for kind in FileKind::ALL {
                if let Some(backing) = db.files().get(kind) {
                    entries.push(line(&format!("{}{}", db.name(), kind.suffix()), backing.ino));
                }
            }
            entries.push(line(&format!("{}-pos", db.name()), db.virtual_inos()[0]));
        }
        Ok(entries)
    }

    fn statfs(&self) -> Result<StatFs, Errno> {
        let stat = nix::sys::statvfs::statvfs(self.engine.data_dir())?;
        Ok(StatFs {
            blocks: stat.blocks(),
            bfree: stat.blocks_free(),
            bavail: stat.blocks_available(),
            files: stat.files(),
            ffree: stat.files_free(),
            bsize: stat.block_size() as u32,
            namelen: 255,
            frsize: stat.fragment_size() as u32,
        })
    }
}

fn line(name: &str, ino: u64) -> DirEntry {
    DirEntry { ino, name: OsStr::new(name).into(), file_type: FileType::Regular }
}

fn lock_file(kind: FileKind) -> Option<LockFile> {
    match kind {
        FileKind::Database => Some(LockFile::Database),
        FileKind::Shm => Some(LockFile::Shm),
        FileKind::Journal | FileKind::Wal => None,
    }
}

/// A lock on a removed file: nobody else can have one on it. What would be committed to a removed WAL
/// would be lost, so nobody may write one; of a removed database file SQLite finds out by itself.
fn stale_lock(call: &Request) -> Result<(), Errno> {
    // With the whole database locked SQLite checkpoints, and then removes by their names a WAL and a
    // wal-index that may be those of another database by now.
    let all = call.set.contains(Lock::Write) || call.set.contains(Lock::Shared);
    let writes = all && call.kind == locks::LockKind::Exclusive;
    if writes { Err(Errno::EAGAIN) } else { Ok(()) }
}

/// The errno of a refused call.
fn refused(refusal: Refusal) -> Errno {
    match refusal {
        Refusal::ReadOnly => Errno::EACCES,
        Refusal::WouldBlock => Errno::EAGAIN,
        Refusal::Interrupted => Errno::EINTR,
        Refusal::Busy => Errno::EBUSY,
        Refusal::Exists => Errno::EEXIST,
        Refusal::NotFound => Errno::ENOENT,
        Refusal::Invalid => Errno::EINVAL,
        Refusal::NoTransaction => Errno::EIO,
        Refusal::Os(code) => Errno::from_raw(code),
    }
}

fn os_errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// The engine's way to the kernel's caches.
struct KernelCache(Notifier);

impl PageCache for KernelCache {
    fn pages_changed(&self, ino: u64, offset: u64, len: u64) {
        log_failure(self.0.inval_inode(ino, offset as i64, len as i64));
    }

    fn file_grown(&self, ino: u64, offset: u64, bytes: &[u8]) {
        log_failure(self.0.store(ino, offset, bytes));
    }

    fn file_changed(&self, ino: u64) {
        log_failure(self.0.inval_inode(ino, 0, 0));
    }

    fn attr_changed(&self, ino: u64) {
        self.0.post_inval_attr(ino);
    }

    fn name_changed(&self, name: &str) {
        self.0.post_inval_entry(OsStr::new(name));
    }

    fn name_gone(&self, name: &str) {
        log_failure(self.0.inval_entry(OsStr::new(name)));
    }

    fn file_mistaken(&self, ino: u64, name: &str) {
        self.0.post_inval_inode(ino, 0, 0);
        self.0.post_inval_entry(OsStr::new(name));
    }
}

fn log_failure(result: Result<(), Errno>) {
    if let Err(errno) = result {
        // The mount is gone, or about to be.
        tracing::debug!(%errno, "tell the kernel of a change");
    }
}
