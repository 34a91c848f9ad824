//! Whose databases a node has had in full, and so which of its transactions others have too.
//!
//! A primary with a lease that is kept elsewhere counts its primaryships; of others, the process
//! tells them apart. A node that had everything of a primary, and since then took nothing but from
//! it, has nothing that this primary does not have. Of any other it cannot know, and keeps what a
//! snapshot replaces.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use ltx::{NodeId, Pos};

use super::election::{Record, Standing};
use super::memory::Memory;
use crate::engine::{Db, DbName, Engine};
use crate::http::client::Stream;

/// A primaryship.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// By its number.
    Term(u64),
    /// By its process.
    Process(NodeId),
    /// The primary says neither.
    Unknown,
}

impl Source {
    /// Whose stream it is.
    pub(super) fn of(stream: &Stream) -> Source {
        match (stream.term, stream.node_id) {
            (Some(term), _) => Source::Term(term),
            (None, Some(id)) => Source::Process(id),
            (None, None) => Source::Unknown,
        }
    }
}

/// What one node has of others.
#[derive(Debug)]
pub(super) struct Lineage {
    memory: Arc<Memory>,
    /// The last process of which this process had everything.
    process: Mutex<Option<NodeId>>,
    /// Databases that the last primary did not have: they say nothing about how far a node is.
    foreign: Mutex<BTreeSet<String>>,
}

impl Lineage {
    pub(super) fn new(memory: Arc<Memory>) -> Lineage {
        Lineage { memory, process: Mutex::default(), foreign: Mutex::default() }
    }

    /// Whether everything here is known to come from `source`.
    pub(super) fn is(&self, source: Source) -> bool {
        match source {
            Source::Term(term) => self.memory.term() == term,
            Source::Process(id) => *self.process.lock().unwrap() == Some(id),
            Source::Unknown => false,
        }
    }

    /// Everything that `source` had is here; blocking.
    pub(super) fn reached(&self, source: Source) {
        let process = match source {
            Source::Process(id) => Some(id),
            Source::Term(_) | Source::Unknown => None,
        };
        *self.process.lock().unwrap() = process;
        if let Source::Term(term) = source {
            self.remember(term);
        }
    }

    /// This node begins the primaryship `term`, and all its databases count; blocking.
    pub(super) fn begin(&self, term: u64) {
        self.foreign.lock().unwrap().clear();
        self.remember(term);
    }

    fn remember(&self, term: u64) {
        if let Err(error) = self.memory.set_term(term) {
            // An older term only lets others go first.
            tracing::warn!(%error, term, "remember term");
        }
    }

    /// The primary does not have this database.
    pub(super) fn set_foreign(&self, name: String) {
        self.foreign.lock().unwrap().insert(name);
    }

    /// The primary has this database.
    pub(super) fn set_known(&self, name: &str) {
        self.foreign.lock().unwrap().remove(name);
    }

    /// How far the node is.
    pub(super) fn standing(&self, engine: &Engine) -> Standing {
        Standing::of(self.memory.term(), &self.positions(engine))
    }

    /// What the node, as the primary of `term`, says about itself.
    pub(super) fn record(&self, engine: &Engine, term: u64) -> Record {
        let all = engine.databases();
        let positions: Vec<_> = all.iter().map(|db| (db.name().clone(), db.pos())).collect();
        Record::of(term, &positions)
    }

    /// The positions of the databases of a replica that count: where they stand, and not what is still
    /// to be applied; zero for one that only a snapshot can help.
    pub(super) fn positions(&self, engine: &Engine) -> Vec<(DbName, Pos)> {
        let foreign = self.foreign.lock().unwrap();
        let all = engine.databases().into_iter();
        let known = all.filter(|db| !foreign.contains(db.name().as_str()));
        let pos = |db: &Db| if db.received_pos().is_zero() { Pos::ZERO } else { db.pos() };
        known.map(|db| (db.name().clone(), pos(&db))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::layout::DataDir;

    #[test]
    fn only_what_was_reached_is_the_same_line() {
        let dir = tempfile::tempdir().unwrap();
        let memory = Arc::new(Memory::load(&DataDir::new(dir.path())));
        let lineage = Lineage::new(memory.clone());
        let sources = [Source::Term(3), Source::Process(NodeId(1)), Source::Unknown];
        for source in sources {
            assert!(!lineage.is(source));
            lineage.reached(source);
            assert_eq!(lineage.is(source), source != Source::Unknown);
        }
        assert!(!lineage.is(Source::Process(NodeId(1))), "something else came since");
        assert_eq!(memory.term(), 3);
    }
}
