//! Super-journals: plain files that name the journals of a transaction over several databases. SQLite
//! deletes one to commit; recovery looks here whether it still exists.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::engine::files::next_ino;
use crate::os;

/// One such file.
#[derive(Debug)]
pub struct PlainFile {
    /// Its inode number.
    pub ino: u64,
    /// The open file.
    pub file: File,
    dir: PathBuf,
    /// The name is durable.
    is_named: AtomicBool,
}

/// The directory of such files.
pub struct PlainFiles {
    dir: PathBuf,
    /// Those that exist, by name. What a crash left is not shown: nobody needs it but recovery.
    open: Mutex<HashMap<String, Arc<PlainFile>>>,
}

impl PlainFiles {
    /// The files in `dir`.
    pub fn new(dir: PathBuf) -> PlainFiles {
        PlainFiles { dir, open: Mutex::default() }
    }

    /// The file of that name.
    pub fn get(&self, name: &str) -> Option<Arc<PlainFile>> {
        self.open.lock().unwrap().get(name).cloned()
    }

    /// Makes a file; one left by a crash is replaced.
    pub fn create(&self, name: &str) -> io::Result<Arc<PlainFile>> {
        let path = self.dir.join(name);
        os::remove_if_present("super-journal:create", &path)?;
        let file = os::create_new("super-journal:create", &path)?;
        let (dir, is_named) = (self.dir.clone(), AtomicBool::new(false));
        let plain = Arc::new(PlainFile { ino: next_ino(), file, dir, is_named });
        self.open.lock().unwrap().insert(name.to_owned(), plain.clone());
        Ok(plain)
    }

    /// Removes a file for good.
    ///
    /// # Errors
    /// That cannot be made durable. The file is there again then, unless that fails too: SQLite rolls back the transaction in one
    /// database after the other, and until it is through, each journal must find its super-journal.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        let path = self.dir.join(name);
        let gone = self.dir.join(format!("{name}.gone"));
        os::rename("super-journal:remove", &path, &gone)?;
        if let Err(error) = os::sync_dir("super-journal:remove", &self.dir) {
            os::rename("super-journal:restore", &gone, &path)?;
            os::sync_dir("super-journal:restore", &self.dir)?;
            return Err(error);
        }
        self.open.lock().unwrap().remove(name);
        // Under that name it is nothing to anybody.
        let _ = os::remove("super-journal:forget", &gone);
        Ok(())
    }
}

impl PlainFile {
    /// Writes `data` at `offset` bytes.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        os::write_at("super-journal:write", &self.file, data, offset)
    }

    /// Sets the length in bytes.
    pub fn truncate(&self, len: u64) -> io::Result<()> {
        os::truncate("super-journal:truncate", &self.file, len)
    }

    /// Makes it durable, with its name: a journal that names a missing super-journal is one of a
    /// transaction that has committed.
    pub fn sync(&self) -> io::Result<()> {
        os::sync("super-journal:sync", &self.file)?;
        if !self.is_named.load(Ordering::SeqCst) {
            os::sync_dir("super-journal:sync", &self.dir)?;
            self.is_named.store(true, Ordering::SeqCst);
        }
        Ok(())
    }
}
