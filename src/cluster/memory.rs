//! What a node remembers of the lease from one process to the next, beside its databases.
//!
//! ```text
//! DATA/lease   the session of the lease that this node has, and a newline
//! DATA/term    the last primaryship that this node has reached, a newline, and the names of databases that
//!              lack something of it, each with a newline
//! ```
//!
//! Neither is proof of anything: the session has to be found again in Consul, and the term only says
//! how old the data is.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;

use crate::engine::layout::DataDir;
use crate::os;

/// The memory of one node.
#[derive(Debug)]
pub struct Memory {
    lease: PathBuf,
    term_file: PathBuf,
    reached: Mutex<Reached>,
}

/// A primaryship that a node has reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reached {
    /// Its number; 0 for none.
    pub term: u64,
    /// The databases that lack something of it, because it could not be stored or applied here.
    pub lacking: BTreeSet<String>,
}

impl Reached {
    fn parse(text: &str) -> Option<Reached> {
        let mut lines = text.lines();
        let term = lines.next()?.trim().parse().ok()?;
        Some(Reached { term, lacking: lines.map(str::to_owned).collect() })
    }
}

impl Memory {
    /// What the directory holds. A file that cannot be read is as good as none.
    pub fn load(dir: &DataDir) -> Memory {
        let (lease, term_file) = (dir.lease(), dir.term());
        let text = os::read_to_string("read:term", &term_file).unwrap_or_default();
        let reached = Mutex::new(Reached::parse(&text).unwrap_or_default());
        Memory { lease, term_file, reached }
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

    /// The last primaryship that this node has reached.
    pub fn reached(&self) -> Reached {
        self.reached.lock().unwrap().clone()
    }

    /// Remembers a primaryship; blocking.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set_reached(&self, reached: Reached) -> io::Result<()> {
        if self.reached() == reached {
            return Ok(());
        }
        let mut text = format!("{}\n", reached.term);
        for name in &reached.lacking {
            let _ = writeln!(text, "{name}");
        }
        os::write_atomic("cluster:term", &self.term_file, text.as_bytes())?;
        *self.reached.lock().unwrap() = reached;
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
        let first: Option<u64> =
            text.lines().next().map(str::trim).and_then(|line| line.parse().ok());
        assert_eq!(memory.reached().term, first.unwrap_or_default());
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
        assert_eq!((memory.session(), memory.reached()), (None, Reached::default()));
        memory.set_session("a-session").unwrap();
        for lacking in [vec!["a.db".to_owned(), " b.db".to_owned()], vec![]] {
            let reached = Reached { term: 7, lacking: lacking.into_iter().collect() };
            memory.set_reached(reached.clone()).unwrap();
            let memory = Memory::load(&layout);
            assert_eq!(
                (memory.session().as_deref(), memory.reached()),
                (Some("a-session"), reached)
            );
        }
        memory.forget_session().unwrap();
        memory.forget_session().unwrap();
        assert_eq!(memory.session(), None);
    }
}
