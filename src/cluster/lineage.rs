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
use super::memory::{Memory, Reached};
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

/// A connection to a primary.
#[derive(Debug, Clone, Copy)]
pub(super) struct Connection {
    source: Source,
    number: u64,
}

/// What one node has of others.
#[derive(Debug)]
pub(super) struct Lineage {
    memory: Arc<Memory>,
    line: Mutex<Line>,
    /// Held by who writes a term, so that the word of an earlier connection is never the last one.
    in_order: Mutex<()>,
    foreign: Mutex<Foreign>,
}

/// Databases that a primary does not have.
#[derive(Debug, Default)]
struct Foreign {
    /// The last primary that said so: they say nothing about how far a node is.
    last: BTreeSet<String>,
    /// Named over the present connection, which names them all before it is ready.
    named: BTreeSet<String>,
}

#[derive(Debug, Default)]
struct Line {
    /// The number of the present connection.
    connection: u64,
    /// The last process of which this process had everything.
    process: Option<NodeId>,
}

impl Lineage {
    pub(super) fn new(memory: Arc<Memory>) -> Lineage {
        let (line, in_order, foreign) = Default::default();
        Lineage { memory, line, in_order, foreign }
    }

    /// A connection to `source` begins, and counts from now on instead of all before.
    pub(super) fn connect(&self, source: Source) -> Connection {
        self.foreign.lock().unwrap().named.clear();
        let mut line = self.line.lock().unwrap();
        line.connection += 1;
        // The same process may be primary again later, when something of another is here.
        line.process = line.process.filter(|process| source == Source::Process(*process));
        Connection { source, number: line.connection }
    }

    /// Whether no other connection has begun since.
    pub(super) fn is_present(&self, connection: Connection) -> bool {
        self.line.lock().unwrap().connection == connection.number
    }

    /// Whether everything here is known to come from `source`.
    pub(super) fn is(&self, source: Source) -> bool {
        match source {
            Source::Term(term) => self.memory.reached() == Reached { term, ..Reached::default() },
            Source::Process(id) => self.line.lock().unwrap().process == Some(id),
            Source::Unknown => false,
        }
    }

    /// Everything that the primary had is here but for what the databases `lacking` lack, unless another connection
    /// has begun since; blocking.
    pub(super) fn reached(&self, connection: Connection, lacking: BTreeSet<String>) {
        let _in_order = self.in_order.lock().unwrap();
        {
            let mut line = self.line.lock().unwrap();
            if line.connection != connection.number {
                return;
            }
            line.process = match connection.source {
                Source::Process(id) if lacking.is_empty() => Some(id),
                _ => None,
            };
        }
        if let Source::Term(term) = connection.source {
            self.remember(Reached { term, lacking });
        }
    }

    /// This node begins the primaryship `term`, and all its databases count; blocking.
    pub(super) fn begin(&self, term: u64) {
        let _in_order = self.in_order.lock().unwrap();
        self.foreign.lock().unwrap().last.clear();
        self.connect(Source::Term(term));
        self.remember(Reached { term, ..Reached::default() });
    }

    fn remember(&self, reached: Reached) {
        let term = reached.term;
        if let Err(error) = self.memory.set_reached(reached) {
            // An older term only lets others go first.
            tracing::warn!(%error, term, "remember term");
        }
    }

    /// The primary does not have this database.
    pub(super) fn set_foreign(&self, name: String) {
        let mut foreign = self.foreign.lock().unwrap();
        foreign.named.insert(name.clone());
        foreign.last.insert(name);
    }

    /// The primary has this database.
    pub(super) fn set_known(&self, name: &str) {
        let mut foreign = self.foreign.lock().unwrap();
        foreign.named.remove(name);
        foreign.last.remove(name);
    }

    /// The primary has named everything that it does not have: what a primary before it did not have, it has.
    pub(super) fn ready(&self) {
        let mut foreign = self.foreign.lock().unwrap();
        foreign.last = foreign.named.clone();
    }

    /// Whether the primary does not have this database.
    pub(super) fn is_foreign(&self, name: &str) -> bool {
        self.foreign.lock().unwrap().last.contains(name)
    }

    /// How far the node is.
    pub(super) fn standing(&self, engine: &Engine) -> Standing {
        Standing::of(self.memory.reached().term, &self.positions(engine))
    }

    /// What the node, as the primary of `term`, says about itself.
    pub(super) fn record(&self, engine: &Engine, term: u64) -> Record {
        let all = engine.databases();
        let positions: Vec<_> = all.iter().map(|db| (db.name().clone(), db.pos())).collect();
        Record::of(term, &positions)
    }

    /// The positions of the databases of a replica that count: where they stand, and not what is still
    /// to be applied; zero for one that only a snapshot can help, or that lacks something of the last primaryship: what
    /// stands there may be of another history.
    pub(super) fn positions(&self, engine: &Engine) -> Vec<(DbName, Pos)> {
        let foreign = self.foreign.lock().unwrap();
        let all = engine.databases().into_iter();
        let known = all.filter(|db| !foreign.last.contains(db.name().as_str()));
        let lacking = self.memory.reached().lacking;
        let is_old = |db: &Db| db.awaits_snapshot() || lacking.contains(db.name().as_str());
        let pos = |db: &Db| if is_old(db) { Pos::ZERO } else { db.pos() };
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
            let connection = lineage.connect(source);
            assert!(!lineage.is(source));
            lineage.reached(connection, BTreeSet::new());
            assert_eq!(lineage.is(source), source != Source::Unknown);
        }
        assert!(!lineage.is(Source::Process(NodeId(1))), "something else came since");
        assert_eq!(memory.reached().term, 3);
    }

    #[test]
    fn a_connection_says_nothing_after_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let memory = Arc::new(Memory::load(&DataDir::new(dir.path())));
        let lineage = Lineage::new(memory.clone());
        let before = lineage.connect(Source::Term(3));
        let present = lineage.connect(Source::Term(4));
        lineage.reached(present, BTreeSet::new());
        lineage.reached(before, BTreeSet::new());
        assert_eq!((lineage.is_present(before), memory.reached().term), (false, 4));
        lineage.begin(5);
        lineage.reached(present, BTreeSet::new());
        assert_eq!((lineage.is_present(present), memory.reached().term), (false, 5));
    }

    #[test]
    fn what_the_last_primary_did_not_have_counts_if_the_present_one_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let lineage = Lineage::new(Arc::new(Memory::load(&DataDir::new(dir.path()))));
        lineage.connect(Source::Term(3));
        lineage.set_foreign("x.db".to_owned());
        lineage.ready();
        lineage.connect(Source::Term(4));
        assert!(lineage.is_foreign("x.db"), "nothing is known of this one yet");
        lineage.ready();
        assert!(!lineage.is_foreign("x.db"));
    }

    #[test]
    fn a_process_that_comes_again_after_another_is_not_the_same_line() {
        let dir = tempfile::tempdir().unwrap();
        let lineage = Lineage::new(Arc::new(Memory::load(&DataDir::new(dir.path()))));
        let [first, second] = [1, 2].map(|id| Source::Process(NodeId(id)));
        lineage.reached(lineage.connect(first), BTreeSet::new());
        lineage.connect(first);
        assert!(lineage.is(first), "nothing else came since");
        // Something of it may be here, if not all.
        lineage.connect(second);
        lineage.connect(first);
        assert!(!lineage.is(first));
    }
}
