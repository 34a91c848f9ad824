//! Programs that people use, on real nodes, with the settings that they come with: what SQLite's
//! drivers and the frameworks above them do must come out on a replica as the same pages.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::image::Image;
use crate::support::node::{Member, Node, Settings};
use crate::support::{program, sqlite};

/// A driver or framework on a primary, then on its replica.
pub mod drivers;
/// The status page in a browser.
pub mod page;
/// WordPress, with its database on a mount.
pub mod wordpress;

/// A primary and its replica.
pub struct Pair {
    /// Takes writes.
    pub primary: Node,
    /// Follows it.
    pub replica: Node,
}

impl Pair {
    /// Two nodes with these settings, ready.
    #[track_caller]
    pub fn new(settings: &Settings) -> Pair {
        let primary = Node::new(settings, Member::Primary);
        let replica = Node::new(settings, Member::Replica(&primary.url()));
        Pair::start(primary, replica)
    }

    /// Starts two nodes, and waits until they are ready.
    #[track_caller]
    pub fn start(mut primary: Node, mut replica: Node) -> Pair {
        primary.spawn();
        replica.spawn();
        primary.wait_ready();
        replica.wait_ready();
        Pair { primary, replica }
    }

    /// Waits until the replica has what the primary has of `name`.
    #[track_caller]
    pub fn sync(&self, name: &str) {
        self.replica.wait_for_pos(name, self.primary.pos(name));
    }

    /// Both nodes have the same pages, with the checksum of the position, and SQLite finds them
    /// whole. Nobody may be writing.
    #[track_caller]
    pub fn check(&self, name: &str) {
        self.sync(name);
        let pos = self.primary.pos(name);
        let pages = |node: &Node| Image::of_files(&node.db_dir(name)).expect("a database");
        let (ours, theirs) = (pages(&self.primary), pages(&self.replica));
        assert_eq!(ours.checksum(), pos.checksum, "{name}: pages of the primary");
        let differences = ours.differences(&theirs);
        assert!(differences.is_empty(), "{name}: pages {differences:?} differ");
        assert_eq!(ours.pages(), theirs.pages(), "{name}: size in pages");
        for node in [&self.primary, &self.replica] {
            assert_eq!(sqlite::run(&node.file(name), "pragma integrity_check;"), "ok", "{name}");
        }
    }
}

/// A file beside the tests.
pub fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apps").join(name)
}

/// Runs a program to its end, which must be a good one; what it printed.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let Output { status, stdout, stderr } =
        program::output(command).unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}: {status}\n{stdout}{stderr}");
    stdout.trim_end().to_owned()
}
