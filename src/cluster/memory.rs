//! What a node remembers of the lease from one process to the next, beside its databases.
//!
//! ```text
//! DATA/lease   the session of the lease that this node has, and a newline
//! DATA/term    the last primaryship of which this node had everything, and a newline
//! ```
//!
//! Neither is proof of anything: the session has to be found again in Consul, and the term only says
//! how old the data is.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::engine::layout::DataDir;
use crate::os;

/// The memory of one node.
#[derive(Debug)]
pub struct Memory {
    lease: PathBuf,
    term_file: PathBuf,
    term: AtomicU64,
}

impl Memory {
    /// What the directory holds. A file that cannot be read is as good as none.
    pub fn load(dir: &DataDir) -> Memory {
        let (lease, term_file) = (dir.lease(), dir.term());
        let term = os::read_to_string("read:term", &term_file)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        Memory { lease, term_file, term: AtomicU64::new(term.unwrap_or_default()) }
    }

    /// The session of the lease that this node had.
    pub fn session(&self) -> Option<String> {
        let text = os::read_to_string("read:lease", &self.lease).ok()?;
        Some(text.trim().to_owned()).filter(|session| !session.is_empty())
    }

    /// Remembers a session; blocking.
    ///
    /// # Errors
    /// The file cannot be written; then the lease cannot be taken up again after a crash.
    pub fn set_session(&self, session: &str) -> io::Result<()> {
        os::write_atomic("cluster:lease", &self.lease, format!("{session}\n").as_bytes())
    }

    /// Forgets the session; blocking.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn forget_session(&self) -> io::Result<()> {
        os::remove_if_present("cluster:lease", &self.lease)
    }

    /// The last primaryship of which this node had everything; 0 for none.
    pub fn term(&self) -> u64 {
        self.term.load(Ordering::SeqCst)
    }

    /// Remembers a term; blocking.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set_term(&self, term: u64) -> io::Result<()> {
        if self.term() != term {
            os::write_atomic("cluster:term", &self.term_file, format!("{term}\n").as_bytes())?;
            self.term.store(term, Ordering::SeqCst);
        }
        Ok(())
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) mod properties {
    use super::*;

    /// The bytes as the content of both files.
    pub(crate) fn memory(content: &[u8]) {
        let dir = crate::properties::ram_dir();
        let layout = DataDir::new(dir.path());
        for path in [layout.lease(), layout.term()] {
            os::write_atomic("cluster:lease", &path, content).expect("memory takes it");
        }
        let memory = Memory::load(&layout);
        let text = std::str::from_utf8(content).map(str::trim).unwrap_or_default();
        assert_eq!(memory.session().unwrap_or_default(), text);
        assert_eq!(memory.term(), text.parse::<u64>().unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_remembers_its_session_and_term() {
        let dir = tempfile::tempdir().unwrap();
        let layout = DataDir::new(dir.path());
        let memory = Memory::load(&layout);
        assert_eq!((memory.session(), memory.term()), (None, 0));
        memory.set_session("a-session").unwrap();
        memory.set_term(7).unwrap();
        let memory = Memory::load(&layout);
        assert_eq!((memory.session().as_deref(), memory.term()), (Some("a-session"), 7));
        memory.forget_session().unwrap();
        memory.forget_session().unwrap();
        assert_eq!(memory.session(), None);
    }
}
