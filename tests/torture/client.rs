//! SQLite itself as the client of an engine, without a mount: a VFS whose file calls are the calls that
//! a mount would make. So every call of client and engine goes through `os`, and a test can fail it,
//! record it, or stop there.
//!
//! It does what SQLite's own VFS for Unix does with the files, also the order of its locks and the sync
//! of the directory after the first sync of a new journal. Each connection counts as a process of its
//! own. With passthrough the wal-index is mapped and the WAL is written past the engine; without, the
//! wal-index is memory that the engine does not see, as the page cache of a mount is.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, mpsc};
use std::time::Duration;

use litefs::engine::db::{Answer, Patience, Refusal};
use litefs::engine::files::{Backing, FileKind};
use litefs::engine::locks::{Handle, LockKind, Owner, Request};
use litefs::engine::name::is_super_journal;
use litefs::engine::{Db, DbName, Engine, PageCache};
use litefs::os;
use litefs::sqlite::lock_byte::{Lock, LockFile, LockSet};
use litefs::volume::plain::{PlainFile, PlainFiles};
use rusqlite::ffi;

/// The first byte of the locks in the wal-index.
const SHM_LOCKS: u64 = 120;

/// The clients of one engine. Dropped last, after all connections.
pub struct Client {
    shared: Box<Shared>,
    vfs: Box<ffi::sqlite3_vfs>,
    _name: CString,
}

struct Shared {
    engine: Arc<Engine>,
    name: String,
    /// The inodes of wal-indexes that are in [`MEMORY`] for it.
    indexes: Mutex<Vec<u64>>,
    /// The super-journals.
    plain: PlainFiles,
    /// What is open, by the number of its owner.
    open: Mutex<HashMap<u64, Arc<Db>>>,
    /// The process is being killed: none of its calls is made any more.
    is_dead: AtomicBool,
}

/// The wal-indexes by the inodes of their files, where the engine does not see them.
static MEMORY: LazyLock<Mutex<HashMap<u64, Index>>> = LazyLock::new(Mutex::default);

/// One of them: what was in the file when it was read, and what clients have written since.
struct Index {
    file: Arc<Backing>,
    regions: Vec<Box<[u64]>>,
}

impl Index {
    fn of(file: Arc<Backing>) -> Index {
        Index { file, regions: Vec::new() }
    }

    /// Reads `len` bytes at `offset` again, as far as there are regions; what the file does not have is zero.
    fn read(&mut self, offset: u64, len: u64) {
        for (number, region) in self.regions.iter_mut().enumerate() {
            let size = 8 * region.len() as u64;
            let begin = number as u64 * size;
            let (from, to) = (offset.max(begin), offset.saturating_add(len).min(begin + size));
            if from >= to {
                continue;
            }
            let mut bytes = vec![0; (to - from) as usize];
            let mut done = 0;
            while let Ok(read @ 1..) =
                self.file.file.read_at(&mut bytes[done..], from + done as u64)
            {
                done += read;
            }
            let target = region.as_mut_ptr().cast::<u8>();
            // SAFETY: inside the region; clients use it by pointers, as shared memory.
            unsafe {
                let target = target.add((from - begin) as usize);
                ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len());
            }
        }
    }
}

/// A kernel that has nothing cached but wal-indexes.
pub struct Pages;

/// What the kernel drops at once, in bytes.
const PAGE: u64 = 4096;

impl PageCache for Pages {
    fn pages_changed(&self, ino: u64, offset: u64, len: u64) {
        if let Some(index) = MEMORY.lock().unwrap().get_mut(&ino) {
            let (from, to) = (offset / PAGE * PAGE, (offset + len).div_ceil(PAGE) * PAGE);
            index.read(from, to - from);
        }
    }

    fn file_changed(&self, ino: u64) {
        if let Some(index) = MEMORY.lock().unwrap().get_mut(&ino) {
            index.read(0, u64::MAX);
        }
    }

    fn file_grown(&self, _ino: u64, _offset: u64, _bytes: &[u8]) {}
    fn attr_changed(&self, _ino: u64) {}
    fn name_changed(&self, _name: &str) {}
    fn name_gone(&self, _name: &str) {}
    fn file_mistaken(&self, _ino: u64, _name: &str) {}
}

impl Shared {
    fn is_dead(&self) -> bool {
        self.is_dead.load(Ordering::SeqCst)
    }
}

/// What SQLite has instead of an open file.
#[repr(C)]
struct Handle3 {
    base: ffi::sqlite3_file,
    open: *mut Open,
}

struct Open {
    shared: *const Shared,
    db: Arc<Db>,
    backing: Arc<Backing>,
    number: u64,
    owner: Owner,
    via: Handle,
    level: c_int,
    /// The name of the file is not durable yet.
    new_name: bool,
    shm: Option<Arc<Backing>>,
    /// Mapped parts of the wal-index.
    maps: Vec<(*mut c_void, usize)>,
}

impl Open {
    fn shared(&self) -> &Shared {
        // SAFETY: the client outlives the connections through it.
        unsafe { &*self.shared }
    }
}

fn next() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

static METHODS: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    iVersion: 2,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: Some(lock),
    xUnlock: Some(unlock),
    xCheckReservedLock: Some(check_reserved),
    xFileControl: Some(file_control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(characteristics),
    xShmMap: Some(shm_map),
    xShmLock: Some(shm_lock),
    xShmBarrier: Some(shm_barrier),
    xShmUnmap: Some(shm_unmap),
    xFetch: None,
    xUnfetch: None,
};

impl Client {
    pub fn new(engine: &Arc<Engine>) -> Client {
        let name = format!("litefs-{}", next());
        let shared = Box::new(Shared {
            engine: engine.clone(),
            name: name.clone(),
            indexes: Mutex::default(),
            plain: PlainFiles::new(engine.layout().super_journals()),
            open: Mutex::default(),
            is_dead: AtomicBool::new(false),
        });
        let name = CString::new(name).unwrap();
        // SAFETY: SQLite's default VFS exists as long as the process.
        let unix = unsafe { &*ffi::sqlite3_vfs_find(ptr::null()) };
        let mut vfs = Box::new(ffi::sqlite3_vfs {
            iVersion: 2,
            szOsFile: size_of::<Handle3>() as c_int,
            mxPathname: 512,
            pNext: ptr::null_mut(),
            zName: name.as_ptr(),
            pAppData: ptr::from_ref(&*shared).cast_mut().cast(),
            xOpen: Some(open),
            xDelete: Some(delete),
            xAccess: Some(access),
            xFullPathname: Some(full_pathname),
            xSleep: Some(pause),
            ..*unix
        });
        // SAFETY: the VFS stays where it is, and is taken out before it goes.
        assert_eq!(unsafe { ffi::sqlite3_vfs_register(&mut *vfs, 0) }, ffi::SQLITE_OK);
        Client { shared, vfs, _name: name }
    }

    /// A connection that waits for nothing.
    pub fn connect(&self, name: &str) -> rusqlite::Result<rusqlite::Connection> {
        let flags = rusqlite::OpenFlags::default();
        let connection =
            rusqlite::Connection::open_with_flags_and_vfs(name, flags, &*self.shared.name)?;
        connection.busy_timeout(Duration::ZERO)?;
        Ok(connection)
    }

    /// The process of the only connection is killed: the kernel closes its files as they are.
    pub fn kill(&self, connection: rusqlite::Connection) {
        self.shared.is_dead.store(true, Ordering::SeqCst);
        let open = std::mem::take(&mut *self.shared.open.lock().unwrap());
        for (number, db) in open {
            db.flush(Owner::client(number), LockSet::ALL);
            db.release_handle(Handle(number));
        }
        drop(connection);
        self.shared.is_dead.store(false, Ordering::SeqCst);
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // SAFETY: it was registered, and nobody uses it any more.
        unsafe { ffi::sqlite3_vfs_unregister(&mut *self.vfs) };
        let mut memory = MEMORY.lock().unwrap();
        for ino in self.shared.indexes.lock().unwrap().drain(..) {
            memory.remove(&ino);
        }
    }
}

/// The database of a file name, and which of its files.
fn parse(name: &str) -> (&str, FileKind) {
    for kind in [FileKind::Journal, FileKind::Wal, FileKind::Shm] {
        if let Some(base) = name.strip_suffix(kind.suffix()) {
            return (base, kind);
        }
    }
    (name, FileKind::Database)
}

/// SAFETY: `vfs` is one of [`Client::new`], `name` a string of SQLite's.
unsafe fn call<'a>(vfs: *mut ffi::sqlite3_vfs, name: *const c_char) -> (&'a Shared, &'a str) {
    // SAFETY: as said.
    unsafe {
        let shared = &*(*vfs).pAppData.cast::<Shared>();
        (shared, CStr::from_ptr(name).to_str().unwrap())
    }
}

/// SAFETY: `file` is one that [`open`] made.
unsafe fn opened<'a>(file: *mut ffi::sqlite3_file) -> &'a mut Open {
    // SAFETY: as said; SQLite uses a file from one thread at a time.
    unsafe { &mut *(*file.cast::<Handle3>()).open }
}

/// Waits for the answer to a call.
fn asked(call: impl FnOnce(Answer)) -> Result<(), Refusal> {
    let (sender, answer) = mpsc::channel();
    call(Box::new(move |result| sender.send(result).unwrap()));
    answer.recv_timeout(Duration::from_secs(60)).expect("an answer")
}

fn code(result: Result<(), Refusal>, error: c_int) -> c_int {
    match result {
        Ok(()) => ffi::SQLITE_OK,
        Err(Refusal::Os(libc::ENOSPC)) => ffi::SQLITE_FULL,
        Err(_) => error,
    }
}

unsafe extern "C" fn open(
    vfs: *mut ffi::sqlite3_vfs,
    name: ffi::sqlite3_filename,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: SQLite gives memory of `szOsFile` bytes.
    unsafe { (*file).pMethods = ptr::null() };
    if name.is_null() {
        return ffi::SQLITE_CANTOPEN;
    }
    // SAFETY: of our VFS.
    let (shared, name) = unsafe { call(vfs, name) };
    if is_super_journal(name) {
        return open_plain(shared, name, file, flags, out_flags);
    }
    let (base, kind) = parse(name);
    let found =
        shared.engine.database(base).and_then(|db| Some((db.clone(), db.files().get(kind)?)));
    let found = match found {
        Some(found) => Ok(found),
        None if flags & ffi::SQLITE_OPEN_CREATE == 0 => Err(Refusal::NotFound),
        None => create(&shared.engine, base, kind),
    };
    let Ok((db, backing)) = found else { return ffi::SQLITE_CANTOPEN };
    if kind == FileKind::Wal && db.refuse_heap_index().is_err() {
        return ffi::SQLITE_CANTOPEN;
    }
    let number = next();
    shared.open.lock().unwrap().insert(number, db.clone());
    let open = Box::new(Open {
        shared,
        db,
        backing,
        number,
        owner: Owner::client(number),
        via: Handle(number),
        level: ffi::SQLITE_LOCK_NONE,
        // Of these SQLite takes any for new.
        new_name: flags & ffi::SQLITE_OPEN_CREATE != 0 && kind != FileKind::Database,
        shm: None,
        maps: Vec::new(),
    });
    // SAFETY: as above.
    unsafe {
        let handle = file.cast::<Handle3>();
        (*handle).open = Box::into_raw(open);
        (*handle).base.pMethods = &raw const METHODS;
        if !out_flags.is_null() {
            *out_flags = flags;
        }
    }
    ffi::SQLITE_OK
}

fn create(engine: &Engine, base: &str, kind: FileKind) -> Result<(Arc<Db>, Arc<Backing>), Refusal> {
    let name = DbName::new(base).map_err(|_| Refusal::Invalid)?;
    let db = match kind {
        FileKind::Database if !engine.shared().may_begin() => return Err(Refusal::ReadOnly),
        FileKind::Database => engine.database_or_new(&name)?,
        _ => engine.database(base).ok_or(Refusal::NotFound)?,
    };
    let backing = db.create_file(kind)?;
    Ok((db, backing))
}

unsafe extern "C" fn close(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: made by `open`, and not used again.
    let open = unsafe { Box::from_raw((*file.cast::<Handle3>()).open) };
    if open.shared().open.lock().unwrap().remove(&open.number).is_none() {
        return ffi::SQLITE_OK; // It was killed.
    }
    open.db.flush(open.owner, LockSet::ALL);
    open.db.release_handle(open.via);
    ffi::SQLITE_OK
}

unsafe extern "C" fn read(
    file: *mut ffi::sqlite3_file,
    to: *mut c_void,
    len: c_int,
    offset: ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: SQLite's buffer has `len` bytes.
    let (open, to) =
        unsafe { (opened(file), std::slice::from_raw_parts_mut(to.cast::<u8>(), len as usize)) };
    match os::read_up_to("read:client", &open.backing.file, to, offset as u64) {
        Ok(filled) if filled == to.len() => ffi::SQLITE_OK,
        Ok(filled) => {
            to[filled..].fill(0);
            ffi::SQLITE_IOERR_SHORT_READ
        }
        Err(_) => ffi::SQLITE_IOERR_READ,
    }
}

unsafe extern "C" fn write(
    file: *mut ffi::sqlite3_file,
    from: *const c_void,
    len: c_int,
    offset: ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: SQLite's buffer has `len` bytes.
    let (open, data) =
        unsafe { (opened(file), std::slice::from_raw_parts(from.cast::<u8>(), len as usize)) };
    if open.shared().is_dead() {
        return ffi::SQLITE_IOERR_WRITE;
    }
    let (db, backing, offset) = (&open.db, &open.backing, offset as u64);
    let result = match backing.kind {
        FileKind::Database => db.write_database(backing, offset, data),
        FileKind::Journal => asked(|answer| db.write_journal(backing, offset, data, answer)),
        FileKind::Wal
            if open.shared().engine.shared().is_passthrough() && !db.opens_wal_directly() =>
        {
            os::write_at("client:wal", &backing.file, data, offset)
                .map_err(|error| Refusal::Os(error.raw_os_error().unwrap_or(libc::EIO)))
        }
        FileKind::Wal => asked(|answer| db.write_wal(backing, open.via, offset, data, answer)),
        FileKind::Shm => Err(Refusal::Invalid),
    };
    code(result, ffi::SQLITE_IOERR_WRITE)
}

unsafe extern "C" fn truncate(file: *mut ffi::sqlite3_file, size: ffi::sqlite3_int64) -> c_int {
    // SAFETY: one of ours.
    let open = unsafe { opened(file) };
    if open.shared().is_dead() {
        return ffi::SQLITE_IOERR_TRUNCATE;
    }
    let (db, backing, len) = (&open.db, &open.backing, size as u64);
    let result = match backing.kind {
        FileKind::Database => db.truncate_database(backing, len),
        FileKind::Journal => asked(|answer| db.truncate_journal(backing, len, answer)),
        FileKind::Wal => db.truncate_wal(backing, len),
        FileKind::Shm => Err(Refusal::Invalid),
    };
    code(result, ffi::SQLITE_IOERR_TRUNCATE)
}

unsafe extern "C" fn sync(file: *mut ffi::sqlite3_file, _flags: c_int) -> c_int {
    // SAFETY: one of ours.
    let open = unsafe { opened(file) };
    if open.shared().is_dead() {
        return ffi::SQLITE_IOERR_FSYNC;
    }
    if let Err(refusal) = open.db.sync_file(&open.backing, open.via) {
        return code(Err(refusal), ffi::SQLITE_IOERR_FSYNC);
    }
    if std::mem::take(&mut open.new_name) {
        // SQLite does not ask whether this worked.
        let _ = open.shared().engine.sync_names();
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn file_size(
    file: *mut ffi::sqlite3_file,
    size: *mut ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: one of ours, and a place for the answer.
    unsafe {
        *size = opened(file).backing.file.metadata().unwrap().len() as ffi::sqlite3_int64;
    }
    ffi::SQLITE_OK
}

impl Open {
    fn take(&self, set: LockSet, kind: LockKind) -> c_int {
        if self.shared().is_dead() {
            return ffi::SQLITE_IOERR_LOCK;
        }
        // A lock on a removed file keeps nobody out.
        if !self.backing.is_current() {
            return ffi::SQLITE_OK;
        }
        let request = Request { owner: self.owner, via: self.via, set, kind };
        match asked(|answer| self.db.lock(request, Patience::None, answer)) {
            Ok(()) => ffi::SQLITE_OK,
            Err(Refusal::WouldBlock | Refusal::ReadOnly | Refusal::Busy | Refusal::Interrupted) => {
                ffi::SQLITE_BUSY
            }
            Err(_) => ffi::SQLITE_IOERR_LOCK,
        }
    }

    fn give(&self, set: LockSet) {
        if self.shared().is_dead() {
            return;
        }
        let (sender, answer) = mpsc::channel();
        self.db.unlock(self.owner, set, move || sender.send(()).unwrap());
        answer.recv_timeout(Duration::from_secs(60)).expect("an answer");
    }

    fn lock_to(&mut self, level: c_int) -> c_int {
        let (pending, reserved, shared) =
            (LockSet::one(Lock::Pending), LockSet::one(Lock::Reserved), LockSet::one(Lock::Shared));
        if level <= self.level {
            return ffi::SQLITE_OK;
        }
        match level {
            ffi::SQLITE_LOCK_SHARED => {
                let code = self.take(pending, LockKind::Shared);
                if code != ffi::SQLITE_OK {
                    return code;
                }
                let code = self.take(shared, LockKind::Shared);
                self.give(pending);
                if code != ffi::SQLITE_OK {
                    return code;
                }
            }
            ffi::SQLITE_LOCK_RESERVED => {
                let code = self.take(reserved, LockKind::Exclusive);
                if code != ffi::SQLITE_OK {
                    return code;
                }
            }
            _ => {
                if self.level < ffi::SQLITE_LOCK_PENDING {
                    let code = self.take(pending, LockKind::Exclusive);
                    if code != ffi::SQLITE_OK {
                        return code;
                    }
                    self.level = ffi::SQLITE_LOCK_PENDING;
                }
                let code = self.take(shared, LockKind::Exclusive);
                if code != ffi::SQLITE_OK {
                    return code;
                }
            }
        }
        self.level = level;
        ffi::SQLITE_OK
    }
}

unsafe extern "C" fn lock(file: *mut ffi::sqlite3_file, level: c_int) -> c_int {
    // SAFETY: one of ours.
    unsafe { opened(file) }.lock_to(level)
}

unsafe extern "C" fn unlock(file: *mut ffi::sqlite3_file, level: c_int) -> c_int {
    // SAFETY: one of ours.
    let open = unsafe { opened(file) };
    if level >= open.level {
        return ffi::SQLITE_OK;
    }
    let writers = LockSet::one(Lock::Pending).with(Lock::Reserved);
    if open.level > ffi::SQLITE_LOCK_SHARED {
        if level == ffi::SQLITE_LOCK_SHARED {
            open.take(LockSet::one(Lock::Shared), LockKind::Shared);
        }
        open.give(writers);
    }
    if level == ffi::SQLITE_LOCK_NONE {
        open.give(LockSet::DATABASE);
    }
    open.level = level;
    ffi::SQLITE_OK
}

unsafe extern "C" fn check_reserved(file: *mut ffi::sqlite3_file, out: *mut c_int) -> c_int {
    // SAFETY: one of ours.
    let open = unsafe { opened(file) };
    let (set, kind) = (LockSet::one(Lock::Reserved), LockKind::Exclusive);
    let request = Request { owner: open.owner, via: open.via, set, kind };
    let held = open.level >= ffi::SQLITE_LOCK_RESERVED || open.db.query(&request).is_some();
    // SAFETY: a place for the answer.
    unsafe { *out = c_int::from(held) };
    ffi::SQLITE_OK
}

unsafe extern "C" fn file_control(
    _file: *mut ffi::sqlite3_file,
    _op: c_int,
    _arg: *mut c_void,
) -> c_int {
    ffi::SQLITE_NOTFOUND
}

unsafe extern "C" fn sector_size(_file: *mut ffi::sqlite3_file) -> c_int {
    4096
}

unsafe extern "C" fn characteristics(_file: *mut ffi::sqlite3_file) -> c_int {
    ffi::SQLITE_IOCAP_POWERSAFE_OVERWRITE
}

impl Open {
    /// Opens the wal-index: who finds nobody using it makes it empty.
    fn open_shm(&mut self) -> Result<Arc<Backing>, c_int> {
        if let Some(shm) = &self.shm {
            return Ok(shm.clone());
        }
        let shm = match self.db.files().get(FileKind::Shm) {
            Some(shm) => shm,
            None => self.db.create_file(FileKind::Shm).map_err(|_| ffi::SQLITE_CANTOPEN)?,
        };
        let dms = LockSet::one(Lock::Dms);
        if self.take(dms, LockKind::Exclusive) == ffi::SQLITE_OK {
            MEMORY.lock().unwrap().remove(&shm.ino);
            if self.db.truncate_shm(&shm, 3).is_err() {
                self.give(dms);
                return Err(ffi::SQLITE_IOERR_SHMOPEN);
            }
        }
        match self.take(dms, LockKind::Shared) {
            ffi::SQLITE_OK => {}
            code => return Err(code),
        }
        self.shm = Some(shm.clone());
        Ok(shm)
    }

    fn region(&mut self, index: usize, size: usize, extend: bool) -> Result<*mut c_void, c_int> {
        let shm = self.open_shm()?;
        if !self.shared().engine.shared().is_passthrough() {
            let mut memory = MEMORY.lock().unwrap();
            let known = memory.entry(shm.ino).or_insert_with(|| {
                self.shared().indexes.lock().unwrap().push(shm.ino);
                Index::of(shm.clone())
            });
            while extend && known.regions.len() <= index {
                known.regions.push(vec![0; size / 8].into());
                let last = known.regions.len() - 1;
                known.read((last * size) as u64, size as u64);
            }
            let region = known.regions.get_mut(index).map(|region| region.as_mut_ptr().cast());
            return Ok(region.unwrap_or(ptr::null_mut()));
        }
        let end = ((index + 1) * size) as u64;
        if shm.file.metadata().unwrap().len() < end {
            if !extend {
                return Ok(ptr::null_mut());
            }
            if self.db.truncate_shm(&shm, end).is_err() {
                return Err(ffi::SQLITE_IOERR_SHMSIZE);
            }
        }
        let (protection, fd) = (libc::PROT_READ | libc::PROT_WRITE, shm.file.as_raw_fd());
        // SAFETY: a new mapping of a file that is long enough and is not cut below that.
        let map = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size,
                protection,
                libc::MAP_SHARED,
                fd,
                (index * size) as libc::off_t,
            )
        };
        assert_ne!(map, libc::MAP_FAILED);
        self.maps.push((map, size));
        Ok(map)
    }
}

unsafe extern "C" fn shm_map(
    file: *mut ffi::sqlite3_file,
    index: c_int,
    size: c_int,
    extend: c_int,
    out: *mut *mut c_void,
) -> c_int {
    // SAFETY: one of ours.
    let open = unsafe { opened(file) };
    match open.region(index as usize, size as usize, extend != 0) {
        Ok(region) => {
            // SAFETY: a place for the answer.
            unsafe { *out = region };
            ffi::SQLITE_OK
        }
        Err(code) => code,
    }
}

unsafe extern "C" fn shm_lock(
    file: *mut ffi::sqlite3_file,
    offset: c_int,
    n: c_int,
    flags: c_int,
) -> c_int {
    // SAFETY: one of ours.
    let open = unsafe { opened(file) };
    let start = SHM_LOCKS + offset as u64;
    let set = LockSet::in_range(LockFile::Shm, start, start + n as u64 - 1);
    if flags & ffi::SQLITE_SHM_UNLOCK != 0 {
        open.give(set);
        return ffi::SQLITE_OK;
    }
    match flags & ffi::SQLITE_SHM_EXCLUSIVE != 0 {
        true => open.take(set, LockKind::Exclusive),
        false => open.take(set, LockKind::Shared),
    }
}

unsafe extern "C" fn shm_barrier(_file: *mut ffi::sqlite3_file) {
    std::sync::atomic::fence(Ordering::SeqCst);
}

unsafe extern "C" fn shm_unmap(file: *mut ffi::sqlite3_file, delete: c_int) -> c_int {
    // SAFETY: one of ours.
    let open = unsafe { opened(file) };
    for (map, size) in open.maps.drain(..) {
        // SAFETY: mapped by `region`; SQLite does not use it any more.
        unsafe { libc::munmap(map, size) };
    }
    if open.shm.take().is_some() && !open.shared().is_dead() {
        if delete != 0 {
            let _ = open.db.remove_shm();
        }
        open.db.flush(open.owner, LockSet::SHM);
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn delete(
    vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    sync_dir: c_int,
) -> c_int {
    // SAFETY: of our VFS.
    let (shared, name) = unsafe { call(vfs, name) };
    if shared.is_dead() {
        return ffi::SQLITE_IOERR_DELETE;
    }
    if is_super_journal(name) {
        return match shared.plain.remove(name) {
            Ok(()) => ffi::SQLITE_OK,
            Err(_) => ffi::SQLITE_IOERR_DELETE,
        };
    }
    let (base, kind) = parse(name);
    let Some(db) = shared.engine.database(base).filter(|db| db.files().get(kind).is_some()) else {
        return ffi::SQLITE_IOERR_DELETE_NOENT;
    };
    let result = match kind {
        FileKind::Database => db.drop_database(),
        FileKind::Journal => asked(|answer| db.remove_journal(answer)),
        FileKind::Wal => db.remove_wal(),
        FileKind::Shm => db.remove_shm(),
    };
    if let Err(refusal) = result {
        return code(Err(refusal), ffi::SQLITE_IOERR_DELETE);
    }
    match sync_dir != 0 && shared.engine.sync_names().is_err() {
        true => ffi::SQLITE_IOERR_DIR_FSYNC,
        false => ffi::SQLITE_OK,
    }
}

unsafe extern "C" fn access(
    vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    flags: c_int,
    out: *mut c_int,
) -> c_int {
    // SAFETY: of our VFS.
    let (shared, name) = unsafe { call(vfs, name) };
    if is_super_journal(name) {
        // SAFETY: a place for the answer.
        unsafe { *out = c_int::from(shared.plain.get(name).is_some()) };
        return ffi::SQLITE_OK;
    }
    let (base, kind) = parse(name);
    let backing = shared.engine.database(base).and_then(|db| db.files().get(kind));
    let there = backing.is_some_and(|backing| {
        flags != ffi::SQLITE_ACCESS_EXISTS || backing.file.metadata().unwrap().len() > 0
    });
    // SAFETY: a place for the answer.
    unsafe { *out = c_int::from(there) };
    ffi::SQLITE_OK
}

unsafe extern "C" fn full_pathname(
    _vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    len: c_int,
    out: *mut c_char,
) -> c_int {
    // SAFETY: SQLite's buffer has `len` bytes.
    unsafe {
        let name = CStr::from_ptr(name).to_bytes_with_nul();
        if name.len() > len as usize {
            return ffi::SQLITE_CANTOPEN;
        }
        ptr::copy_nonoverlapping(name.as_ptr().cast(), out, name.len());
    }
    ffi::SQLITE_OK
}

/// Nobody that SQLite would wait for goes on meanwhile.
unsafe extern "C" fn pause(_vfs: *mut ffi::sqlite3_vfs, micros: c_int) -> c_int {
    std::thread::yield_now();
    micros
}

/// What SQLite has instead of an open super-journal.
#[repr(C)]
struct PlainHandle {
    base: ffi::sqlite3_file,
    file: *mut Arc<PlainFile>,
}

static PLAIN_METHODS: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    iVersion: 1,
    xClose: Some(close_plain),
    xRead: Some(read_plain),
    xWrite: Some(write_plain),
    xTruncate: Some(truncate_plain),
    xSync: Some(sync_plain),
    xFileSize: Some(size_of_plain),
    ..METHODS
};

fn open_plain(
    shared: &Shared,
    name: &str,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    let found = match shared.plain.get(name) {
        Some(found) => found,
        None if flags & ffi::SQLITE_OPEN_CREATE == 0 || shared.is_dead() => {
            return ffi::SQLITE_CANTOPEN;
        }
        None => match shared.plain.create(name) {
            Ok(made) => made,
            Err(_) => return ffi::SQLITE_CANTOPEN,
        },
    };
    // SAFETY: SQLite gives memory of `szOsFile` bytes, which are as many as for the others.
    unsafe {
        let handle = file.cast::<PlainHandle>();
        (*handle).file = Box::into_raw(Box::new(found));
        (*handle).base.pMethods = &raw const PLAIN_METHODS;
        if !out_flags.is_null() {
            *out_flags = flags;
        }
    }
    ffi::SQLITE_OK
}

/// SAFETY: `file` is one that [`open_plain`] made.
unsafe fn plain<'a>(file: *mut ffi::sqlite3_file) -> &'a PlainFile {
    // SAFETY: as said.
    unsafe { &*(*file.cast::<PlainHandle>()).file }
}

fn plain_code(result: std::io::Result<()>, error: c_int) -> c_int {
    let result = result.map_err(|error| Refusal::Os(error.raw_os_error().unwrap_or(libc::EIO)));
    code(result, error)
}

unsafe extern "C" fn close_plain(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: made by `open_plain`, and not used again.
    drop(unsafe { Box::from_raw((*file.cast::<PlainHandle>()).file) });
    ffi::SQLITE_OK
}

unsafe extern "C" fn read_plain(
    file: *mut ffi::sqlite3_file,
    to: *mut c_void,
    len: c_int,
    offset: ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: SQLite's buffer has `len` bytes.
    let (plain, to) =
        unsafe { (plain(file), std::slice::from_raw_parts_mut(to.cast::<u8>(), len as usize)) };
    match os::read_up_to("read:client", &plain.file, to, offset as u64) {
        Ok(filled) if filled == to.len() => ffi::SQLITE_OK,
        Ok(filled) => {
            to[filled..].fill(0);
            ffi::SQLITE_IOERR_SHORT_READ
        }
        Err(_) => ffi::SQLITE_IOERR_READ,
    }
}

unsafe extern "C" fn write_plain(
    file: *mut ffi::sqlite3_file,
    from: *const c_void,
    len: c_int,
    offset: ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: SQLite's buffer has `len` bytes.
    let (plain, data) =
        unsafe { (plain(file), std::slice::from_raw_parts(from.cast::<u8>(), len as usize)) };
    plain_code(plain.write(offset as u64, data), ffi::SQLITE_IOERR_WRITE)
}

unsafe extern "C" fn truncate_plain(
    file: *mut ffi::sqlite3_file,
    size: ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: one of ours.
    plain_code(unsafe { plain(file) }.truncate(size as u64), ffi::SQLITE_IOERR_TRUNCATE)
}

unsafe extern "C" fn sync_plain(file: *mut ffi::sqlite3_file, _flags: c_int) -> c_int {
    // SAFETY: one of ours.
    plain_code(unsafe { plain(file) }.sync(), ffi::SQLITE_IOERR_FSYNC)
}

unsafe extern "C" fn size_of_plain(
    file: *mut ffi::sqlite3_file,
    size: *mut ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: one of ours, and a place for the answer.
    unsafe { *size = plain(file).file.metadata().unwrap().len() as ffi::sqlite3_int64 };
    ffi::SQLITE_OK
}
