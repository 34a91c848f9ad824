//! The note that a node without data has begun to take over what its backup has.
//!
//! ```text
//! DATA/restoring   empty: a node without data restores its backup, and may not have all of it yet
//! ```
//!
//! Invariant: there is one, durably, from before the first database is restored until the last one is. A node
//! that dies in between has data, but not what its backup has.

use std::path::PathBuf;

use crate::engine::error::{Error, Result};
use crate::engine::layout::DataDir;
use crate::os;

/// The note of one node. Its calls block.
#[derive(Debug, Clone)]
pub struct Begun {
    path: PathBuf,
}

impl Begun {
    /// The note in this data directory, be it there or not.
    pub fn new(dir: &DataDir) -> Begun {
        Begun { path: dir.restoring() }
    }

    /// Whether it is there, or nobody can say.
    pub fn is_noted(&self) -> bool {
        self.path.try_exists().unwrap_or(true)
    }

    /// Writes it, also if it is there: its name may not be durable.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn note(&self) -> Result<()> {
        os::write_atomic("backup:restoring", &self.path, b"")
            .map_err(Error::io("note restore", &self.path))
    }

    /// Removes it. It need not be durable: a note that comes back makes the node look once more.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn forget(&self) -> Result<()> {
        if !self.is_noted() {
            return Ok(());
        }
        os::remove_if_present("backup:restoring", &self.path)
            .map_err(Error::io("forget restore", &self.path))
    }
}
