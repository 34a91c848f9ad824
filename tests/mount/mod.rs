//! SQLite on the mount of a real primary: everything an application does to a database must come
//! out as the right transactions, and a chain of LTX files that leads to the very same pages.

use litefs::engine::layout::DbDir;
use ltx::{Pos, Txid};
use rusqlite::Connection;

use crate::support::image::{self, Image};
use crate::support::node::{Node, Settings};
use crate::support::sqlite;

/// File calls that SQLite does not make.
mod calls;
/// What a commit, a read and a page cost.
mod cost;
/// A node that is killed while applications write.
mod crash;
/// What stays open.
mod descriptors;
/// What shells and scripts do to files.
mod files;
/// A disk that does not answer.
mod frozen;
/// A disk without room.
mod full;
/// Locks as fcntl(2) has them.
mod locks;
/// Journal modes, page sizes, locking modes, attached databases.
mod modes;
/// A primary that becomes something else while applications write.
mod roles;
/// A data directory on a small disk that fills up and grows.
mod small_disk;
/// Every journal mode, page size and way of the bytes, through the life of a database.
mod table;
/// Other users, and a mount of a user without rights.
mod users;

/// The database of most tests.
const DB: &str = "app.db";

/// A primary that compares the whole database with its checksums after each commit.
fn strict(passthrough: &'static str) -> Node {
    strict_over("auto", passthrough)
}

/// [`strict`] with a transport.
fn strict_over(transport: &'static str, passthrough: &'static str) -> Node {
    let lines = "strict-verify: true";
    Node::primary(&Settings { transport, passthrough, lines, ..Settings::default() })
}

/// A database on the mount of a node, with the number of transactions that it should have.
struct Watched<'a> {
    node: &'a Node,
    name: &'a str,
    txid: u64,
}

impl<'a> Watched<'a> {
    fn new(node: &'a Node, name: &'a str) -> Watched<'a> {
        Watched { node, name, txid: node.pos(name).txid.0 }
    }

    fn dir(&self) -> DbDir {
        self.node.db_dir(self.name)
    }

    /// Runs `sql`, which must make `transactions` transactions; then the files are the position.
    #[track_caller]
    fn run(&mut self, connection: &Connection, sql: &str, transactions: u64) {
        connection.execute_batch(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
        self.expect(sql, transactions);
    }

    /// `sql` was run and made `transactions` transactions; the files are the position.
    #[track_caller]
    fn expect(&mut self, sql: &str, transactions: u64) {
        self.txid += transactions;
        assert_eq!(self.node.pos(self.name).txid, Txid(self.txid), "after {sql}");
        self.check_files(sql);
    }

    /// The pages in the files have the checksum of the position. Nobody may be writing.
    #[track_caller]
    fn check_files(&self, sql: &str) -> Option<Image> {
        let pos = self.node.pos(self.name);
        let image = Image::of_files(&self.dir());
        if let Some(image) = &image {
            assert_eq!(image.checksum(), pos.checksum, "pages after {sql}");
        }
        image
    }

    /// The chain applied to nothing leads to the pages in the files and to the position.
    #[track_caller]
    fn check_chain(&self) {
        check_chain(&self.dir(), self.node.pos(self.name));
    }
}

/// The chain applied to nothing leads to the pages in the files of a database and to `pos`.
#[track_caller]
fn check_chain(dir: &DbDir, pos: Pos) {
    let replayed = image::replay_chain(dir, pos).map(|image| image.bytes().to_vec());
    let found = Image::of_files(dir).map(|image| image.bytes().to_vec());
    assert!(replayed == found, "the chain leads to other pages than the files hold");
}

/// What a database stopped at after the node was stopped; chain and file say so too.
#[track_caller]
fn check_stopped(dir: &DbDir) -> Pos {
    let (_, max, path) = image::chain_files(dir).pop().expect("a chain");
    let file = std::io::BufReader::new(std::fs::File::open(path).unwrap());
    let (_, trailer) = ltx::verify(file).unwrap();
    let pos = Pos { txid: max, checksum: trailer.post_apply };
    assert!(!dir.wal().exists(), "a wal is left");
    let journal = std::fs::read(dir.journal()).unwrap_or_default();
    assert!(journal.first().is_none_or(|byte| *byte == 0), "a hot journal is left");
    check_chain(dir, pos);
    pos
}

/// A strict node has nothing to say, but that its machine is slow; how slow it may be, [`Node`] itself checks.
#[track_caller]
fn check_silent(node: &Node) {
    let log = node.log();
    let loud = log.lines().filter(|line| line.contains("ERROR") || line.contains("WARN"));
    let loud = loud.filter(|line| !line.contains("is not answered yet"));
    let loud: Vec<&str> = loud.collect();
    assert!(loud.is_empty(), "the log should be silent: {loud:#?}");
}

#[track_caller]
fn check_integrity(connection: &Connection) {
    let found: String = sqlite::value(connection, "pragma integrity_check");
    assert_eq!(found, "ok");
}
