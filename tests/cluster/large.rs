//! A database beyond 1 GiB, whose lock page SQLite never uses.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::BufReader;
use std::path::Path;
use std::process::Command;

use litefs::engine::layout::DbDir;
use ltx::{Checksum, Decoder, PageSize, Pos};

use super::Cluster;
use crate::support::image::chain_files;
use crate::support::node::{Member, Node, Settings};
use crate::support::sqlite;

const DB: &str = "large.db";

/// The largest pages make the fewest.
const PAGE_SIZE: u32 = 65536;

/// Rows of zeros, which take no room in a sparse file, that end a little before the lock page.
const SETUP: &str = "pragma page_size = 65536; pragma synchronous = off; create table t(n, b); \
    insert into t values (1, zeroblob(536000000)), (2, zeroblob(536000000))";

#[test]
fn a_database_grows_beyond_its_lock_page() {
    // Compressed, the zeros are next to nothing on the wire.
    let settings = Settings::default();
    let mut cluster = Cluster { nodes: vec![Node::new(&settings, Member::Primary)] };
    let dir = cluster.primary().db_dir(DB);
    fs::create_dir_all(dir.path()).unwrap();
    let made = cluster.primary().scratch("made.db");
    sqlite::run(&made, SETUP);
    copy(&made, &dir.database());
    fs::remove_file(made).unwrap();
    cluster.nodes[0].start();
    cluster.add(&settings).start();
    cluster.sync(DB);
    let file = cluster.file(DB);
    let lock = PageSize::new(PAGE_SIZE).unwrap().lock_pgno().0;
    let pages = || sqlite::run(&file, "pragma page_count").parse::<u32>().unwrap();
    assert!((lock - 100..lock).contains(&pages()), "{} pages", pages());
    for (mode, n) in [("delete", 3), ("wal", 4)] {
        let sql = format!("pragma journal_mode = {mode}; insert into t values");
        sqlite::run(&file, &format!("{sql} ({n}, randomblob(4000000))"));
        assert!(pages() > lock, "{} pages", pages());
        sqlite::run(&file, &format!("update t set b = randomblob(5000000 + n) where n = {n}"));
        cluster.sync(DB);
    }
    let pos = cluster.sync(DB);
    for node in &mut cluster.nodes {
        node.kill();
        // It computes the checksum of all pages anew.
        node.start();
    }
    for node in &cluster.nodes {
        assert_eq!(node.pos(DB), pos);
        let sql = "select group_concat(length(b)) from t where n > 2";
        assert_eq!(sqlite::run(&node.file(DB), sql), "5000003,5000004");
        assert!(!node.db_dir(DB).lost_found().exists());
    }
    assert_eq!(replay(&cluster.primary().db_dir(DB)), pos);
}

/// Copies a file, and leaves the zeros in it out.
fn copy(from: &Path, to: &Path) {
    let mut copy = Command::new("cp");
    copy.arg("--sparse=always").arg(from).arg(to);
    assert!(copy.status().unwrap().success());
}

/// Where the chain leads, by the pages in its files; the lock page is in none.
fn replay(dir: &DbDir) -> Pos {
    let mut sums = HashMap::new();
    let mut at = Pos::ZERO;
    for (_, _, path) in chain_files(dir) {
        let mut decoder = Decoder::new(BufReader::new(File::open(&path).unwrap())).unwrap();
        let header = *decoder.header();
        let mut page = vec![0; PAGE_SIZE as usize];
        while let Some(pgno) = decoder.next_page(&mut page).unwrap() {
            assert_ne!(pgno, header.page_size.lock_pgno());
            sums.insert(pgno, decoder.page_checksum());
        }
        let post = decoder.finish().unwrap().post_apply;
        sums.retain(|pgno, _| pgno.0 <= header.commit);
        let sum = sums.values().fold(Checksum::EMPTY, |all, sum| all.toggle(*sum));
        assert_eq!(sum, post, "{}", path.display());
        at = Pos { txid: header.max_txid, checksum: post };
    }
    at
}
