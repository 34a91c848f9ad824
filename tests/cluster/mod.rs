//! Nodes on loopback: real processes with real mounts, a static lease, node 0 the primary.
//!
//! Every test ends with [`Cluster::check`]: nodes at an equal position have equal pages, and that
//! checksum.

use std::path::PathBuf;

use ltx::{Checksum, Pos};

use crate::support::image::{self, Image};
use crate::support::node::{Member, Node, Settings};
use crate::support::sqlite;

/// A second copy elsewhere.
mod backup;
/// Databases copied in and out by the command line.
mod copies;
/// Nodes that are killed.
mod crash;
/// Damage on the way and in files.
mod damage;
/// What an application does on the primary, and what its replica has then.
mod follow;
/// A primary that is LiteFS.
mod foreign;
/// What is lost between a replica that writes and its primary, or must not be taken.
mod forward;
/// A replica that writes under a HALT lock.
mod halt;
/// Nodes that come late, come back, or do not belong.
mod join;
/// A database beyond 1 GiB.
mod large;
/// Nodes with a lease in Consul.
mod lease;
/// HALT locks at their edges.
mod lent;
/// Replicas that are LiteFS.
mod mixed;
/// Nodes with a lease in Consul, and faults by chance.
mod random;
/// Readers on a replica.
mod readers;
/// Writes on a replica.
mod refuse;
/// Connections that stay open while transactions that they have seen go.
mod remembered;
/// What a node notes while it gets its backup.
mod restore;
/// Nodes that want a token and speak TLS.
mod secure;
/// Nodes for long, and what they use.
mod soak;

/// What nodes say of themselves and of their primary.
mod truth;
/// Uploads to a backup that outlive who began them.
mod uploads;

/// A generator that gives the same numbers for the same seed (xorshift).
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// A primary and its replicas.
pub struct Cluster {
    /// Node 0 is the primary.
    pub nodes: Vec<Node>,
}

impl Cluster {
    /// So many nodes, all ready.
    #[track_caller]
    pub fn of(count: usize) -> Cluster {
        Cluster::with(count, &Settings::default())
    }

    /// So many nodes with these settings, all ready.
    #[track_caller]
    pub fn with(count: usize, settings: &Settings) -> Cluster {
        let mut cluster = Cluster { nodes: vec![Node::new(settings, Member::Primary)] };
        for _ in 1..count {
            cluster.add(settings);
        }
        for node in &mut cluster.nodes {
            node.spawn();
        }
        for node in &cluster.nodes {
            node.wait_ready();
        }
        cluster
    }

    /// Adds a replica that is not started.
    pub fn add(&mut self, settings: &Settings) -> &mut Node {
        let url = self.nodes[0].url();
        self.nodes.push(Node::new(settings, Member::Replica(&url)));
        self.nodes.last_mut().expect("was just added")
    }

    /// The node that takes writes.
    pub fn primary(&self) -> &Node {
        &self.nodes[0]
    }

    /// The first replica.
    pub fn replica(&self) -> &Node {
        &self.nodes[1]
    }

    /// The running replicas.
    pub fn replicas(&self) -> impl Iterator<Item = &Node> {
        self.nodes[1..].iter().filter(|node| node.is_running())
    }

    /// A database file in the primary's mount.
    pub fn file(&self, name: &str) -> PathBuf {
        self.primary().file(name)
    }

    /// Waits until every replica has what the primary has of `name`.
    #[track_caller]
    pub fn sync(&self, name: &str) -> Pos {
        let pos = self.primary().pos(name);
        for replica in self.replicas() {
            replica.wait_for_pos(name, pos);
        }
        pos
    }

    /// Every running node has the same databases at the same position, with the same pages, of that
    /// checksum; SQLite finds them whole, and the chain of each node leads to them. Nobody may be
    /// writing.
    #[track_caller]
    pub fn check(&self) {
        for name in names(self.primary()) {
            let pos = self.sync(&name);
            let ours = check_node(self.primary(), &name, pos);
            for replica in self.replicas() {
                let theirs = check_node(replica, &name, pos);
                assert_same(&name, &ours, &theirs);
            }
        }
        for replica in self.replicas() {
            assert_eq!(replica.databases(), self.primary().databases(), "names in the mount");
        }
    }
}

/// All databases that a node knows, also dropped ones.
fn names(node: &Node) -> Vec<String> {
    let entries = std::fs::read_dir(node.data().join("dbs")).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// One database of one node: its pages, if it has any.
#[track_caller]
pub fn check_node(node: &Node, name: &str, pos: Pos) -> Option<(Image, String)> {
    let dir = node.db_dir(name);
    let image = Image::of_files(&dir);
    let sum = image.as_ref().map_or(Checksum::EMPTY, Image::checksum);
    assert!(pos.is_zero() || sum == pos.checksum, "{name}: pages are {sum}, not {pos}");
    if !pos.is_zero() {
        let replayed = image::replay_chain(&dir, pos);
        if let (Some(replayed), Some(image)) = (&replayed, &image) {
            let differences = image.differences(replayed);
            assert!(replayed == image, "{name}: pages {differences:?} differ from the chain");
        }
    }
    let image = image?;
    let path = node.file(name);
    assert_eq!(sqlite::run(&path, "pragma integrity_check;"), "ok", "{name}");
    let dump = sqlite::run(&path, ".dump");
    let copy = node.scratch("copy.db");
    std::fs::write(&copy, image.bytes()).unwrap();
    assert_eq!(sqlite::run(&copy, ".dump"), dump, "{name}: the mount shows other rows");
    Some((image, dump))
}

#[track_caller]
fn assert_same(name: &str, ours: &Option<(Image, String)>, theirs: &Option<(Image, String)>) {
    match (ours, theirs) {
        (Some((ours, our_dump)), Some((theirs, their_dump))) => {
            let differences = ours.differences(theirs);
            assert!(differences.is_empty(), "{name}: pages {differences:?} differ");
            assert_eq!(ours.pages(), theirs.pages(), "{name}: size in pages");
            assert_eq!(our_dump, their_dump, "{name}: rows");
        }
        (None, None) => {}
        (ours, theirs) => {
            panic!("{name}: primary has it: {}, replica: {}", ours.is_some(), theirs.is_some())
        }
    }
}
