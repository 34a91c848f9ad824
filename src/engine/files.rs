//! The four files of a database as the mount shows them: which exist, and as which inode.
//!
//! A file that is removed and made again is a new inode; who still has the old one open goes on with
//! the old one, and nothing done through it touches the database any more.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::error::{Error, Result};
use super::layout::DbDir;
use crate::os;

/// Which of a database's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// `NAME`
    Database,
    /// `NAME-journal`
    Journal,
    /// `NAME-wal`
    Wal,
    /// `NAME-shm`
    Shm,
}

impl FileKind {
    /// All of them, in the order of the listing.
    pub const ALL: [FileKind; 4] =
        [FileKind::Database, FileKind::Journal, FileKind::Shm, FileKind::Wal];

    /// What the name in the mount ends with.
    pub fn suffix(self) -> &'static str {
        match self {
            FileKind::Database => "",
            FileKind::Journal => "-journal",
            FileKind::Wal => "-wal",
            FileKind::Shm => "-shm",
        }
    }

    fn path(self, dir: &DbDir) -> PathBuf {
        match self {
            FileKind::Database => dir.database(),
            FileKind::Journal => dir.journal(),
            FileKind::Wal => dir.wal(),
            FileKind::Shm => dir.shm(),
        }
    }
}

/// One incarnation of a file.
#[derive(Debug)]
pub struct Backing {
    /// Its inode number in the mount.
    pub ino: u64,
    /// Which file.
    pub kind: FileKind,
    /// The open file in the data directory.
    pub file: Arc<File>,
    /// Nobody may use it any more, whatever else has the file.
    turned_out: AtomicBool,
    /// Its name stands for another incarnation, or for none. Written under the lock of the slots.
    gone: AtomicBool,
}

impl Backing {
    fn new(kind: FileKind, file: Arc<File>) -> Arc<Backing> {
        let (turned_out, gone) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Backing { ino: next_ino(), kind, file, turned_out, gone })
    }

    /// Whether it is what its name stands for now.
    pub fn is_current(&self) -> bool {
        !self.gone.load(Ordering::SeqCst)
    }

    /// Refuses everything to who has it open.
    pub fn turn_out(&self) {
        self.turned_out.store(true, Ordering::SeqCst);
    }

    /// Whether everything is refused to who has it open.
    pub fn is_turned_out(&self) -> bool {
        self.turned_out.load(Ordering::SeqCst)
    }
}

/// Hands out inode numbers; 1 is the root.
pub fn next_ino() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(2);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The files of one database.
#[derive(Debug)]
pub struct Files {
    dir: DbDir,
    /// The incarnation of each file that exists now, by `FileKind as usize`.
    slots: Mutex<[Option<Arc<Backing>>; 4]>,
    /// Held over the file calls that make and remove files, so that the directory and the slots
    /// change together.
    naming: Mutex<()>,
    /// How many names were made and removed.
    names: AtomicU64,
    /// How many of them are durable. Held while the directory is synced: who comes meanwhile may rely on just that.
    durable_names: Mutex<u64>,
    /// Files that do not exist any more could not be removed from the directory.
    has_leftovers: AtomicBool,
}

impl Files {
    /// The files that stand in `dir` now.
    pub fn open(dir: DbDir) -> Result<Files> {
        let files = Files::none(dir);
        files.find()?;
        Ok(files)
    }

    /// No file, whatever stands in `dir`.
    pub fn none(dir: DbDir) -> Files {
        Files {
            dir,
            slots: Mutex::default(),
            naming: Mutex::default(),
            names: AtomicU64::new(0),
            durable_names: Mutex::default(),
            has_leftovers: AtomicBool::new(false),
        }
    }

    /// Opens the files that stand in the directory and are not known.
    pub fn find(&self) -> Result<()> {
        let _naming = self.naming.lock().unwrap();
        for kind in FileKind::ALL.into_iter().filter(|kind| self.get(*kind).is_none()) {
            let path = kind.path(&self.dir);
            match os::open("files:open", &path) {
                Ok(file) => drop(self.set(kind, Some(file))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io("open", &path)(error)),
            }
        }
        Ok(())
    }

    /// The file as it exists now.
    pub fn get(&self, kind: FileKind) -> Option<Arc<Backing>> {
        self.slots.lock().unwrap()[kind as usize].clone()
    }

    /// Makes a file that does not exist (`AlreadyExists` otherwise).
    pub fn create(&self, kind: FileKind) -> Result<Arc<Backing>> {
        let _naming = self.naming.lock().unwrap();
        self.make(kind)
    }

    /// The file, made if it does not exist.
    pub fn get_or_create(&self, kind: FileKind) -> Result<Arc<Backing>> {
        let _naming = self.naming.lock().unwrap();
        match self.get(kind) {
            Some(backing) => Ok(backing),
            None => self.make(kind),
        }
    }

    fn make(&self, kind: FileKind) -> Result<Arc<Backing>> {
        self.remove_leftovers()?;
        let path = kind.path(&self.dir);
        let file = os::create_new("files:create", &path).map_err(Error::io("create", &path))?;
        // Before anybody can find the file.
        self.name_changed();
        let backing = self.set(kind, Some(file));
        Ok(backing.expect("a file was given"))
    }

    /// Removes a file; one that does not exist is fine. Whether it existed.
    pub fn remove(&self, kind: FileKind) -> Result<bool> {
        let _naming = self.naming.lock().unwrap();
        let path = kind.path(&self.dir);
        os::remove_if_present("files:remove", &path).map_err(Error::io("remove", &path))?;
        let existed = self.get(kind).is_some();
        if existed {
            self.name_changed();
        }
        self.set(kind, None);
        Ok(existed)
    }

    /// Takes all files away. They are gone even if they cannot be removed from the directory yet:
    /// then that is done before another file is made.
    pub fn discard(&self) -> Result<()> {
        let _naming = self.naming.lock().unwrap();
        for kind in FileKind::ALL {
            self.set(kind, None);
        }
        self.has_leftovers.store(true, Ordering::SeqCst);
        self.remove_leftovers()
    }

    /// A log beside another database than its own would be taken for that one's.
    fn remove_leftovers(&self) -> Result<()> {
        if !self.has_leftovers.load(Ordering::SeqCst) {
            return Ok(());
        }
        // A journal goes before what it would be played back to.
        for kind in [FileKind::Journal, FileKind::Database, FileKind::Wal, FileKind::Shm] {
            let path = kind.path(&self.dir);
            os::remove_if_present("files:remove", &path).map_err(Error::io("remove", &path))?;
            self.name_changed();
        }
        self.has_leftovers.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Gives a file that exists another inode, and refuses everything to who has it open as the old
    /// one; that inode.
    pub fn renew(&self, kind: FileKind) -> Option<u64> {
        let _naming = self.naming.lock().unwrap();
        let mut slots = self.slots.lock().unwrap();
        let slot = &mut slots[kind as usize];
        let old = slot.as_ref()?.clone();
        // First, so that nobody finds the old one to be gone and may go on with it.
        old.turn_out();
        put(slot, Some(Backing::new(kind, old.file.clone())));
        Some(old.ino)
    }

    /// Makes the names durable, if any changed: what SQLite asks for by a sync of the directory once
    /// it has made a journal or a WAL. Returns when they are, also if somebody else makes them so.
    pub fn sync_names(&self) -> Result<()> {
        let mut durable = self.durable_names.lock().unwrap();
        let names = self.names.load(Ordering::SeqCst);
        if *durable < names {
            os::sync_dir("files:dir", self.dir.path())
                .map_err(Error::io("sync database directory", self.dir.path()))?;
            *durable = names;
        }
        Ok(())
    }

    fn name_changed(&self) {
        self.names.fetch_add(1, Ordering::SeqCst);
    }

    /// Where a file stands.
    pub fn path(&self, kind: FileKind) -> PathBuf {
        kind.path(&self.dir)
    }

    /// For `map_err` on a call on one of the files: what was being done, to which.
    pub fn error(&self, what: &'static str, kind: FileKind) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { what, path: self.path(kind), source }
    }

    fn set(&self, kind: FileKind, file: Option<File>) -> Option<Arc<Backing>> {
        let backing = file.map(|file| Backing::new(kind, Arc::new(file)));
        put(&mut self.slots.lock().unwrap()[kind as usize], backing.clone());
        backing
    }
}

/// Has a file's name stand for `backing` from now on.
fn put(slot: &mut Option<Arc<Backing>>, backing: Option<Arc<Backing>>) {
    if let Some(old) = std::mem::replace(slot, backing) {
        old.gone.store(true, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::fault::{self, Fault};

    /// An applier makes the WAL at the moment in which a client does.
    #[test]
    fn files_made_by_two_at_a_time_are_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let files = &Files::open(DbDir::new(dir.path())).unwrap();
        for _ in 0..300 {
            let make = || files.get_or_create(FileKind::Wal).unwrap().ino;
            let (one, other) = std::thread::scope(|scope| {
                let other = scope.spawn(make);
                (make(), other.join().unwrap())
            });
            assert_eq!(one, other);
            assert!(files.remove(FileKind::Wal).unwrap());
        }
    }

    /// A commit is reported when its log has a durable name, not when somebody has begun to see to that.
    #[test]
    fn who_asks_for_durable_names_during_a_sync_waits_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let files = Arc::new(Files::open(DbDir::new(dir.path())).unwrap());
        files.create(FileKind::Wal).unwrap();
        let others = files.clone();
        fault::meanwhile("files:dir", move || {
            assert!(others.durable_names.try_lock().is_err(), "another one is answered now");
        });
        files.sync_names().unwrap();

        // What failed is tried again by each that asks.
        files.remove(FileKind::Wal).unwrap();
        for _ in 0..2 {
            fault::arm_here(Fault { label: "files:dir".into(), after: 0, errno: nix::libc::EIO });
            assert!(files.sync_names().is_err());
            assert!(!fault::disarm_here());
        }
        files.sync_names().unwrap();

        // With nothing new there is nothing to sync.
        fault::arm_here(Fault { label: "files:dir".into(), after: 0, errno: nix::libc::EIO });
        files.sync_names().unwrap();
        assert!(fault::disarm_here());
    }
}
