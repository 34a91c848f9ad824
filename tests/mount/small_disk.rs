//! A data directory on a small disk: who writes gets an error, who reads goes on, nothing that was
//! acknowledged is lost, and all goes on when there is room again.

use std::process::Command;

use test_case::test_matrix;

use super::{DB, Node, check_chain, check_integrity, sqlite};
use crate::support::disk::Disk;
use crate::support::node::{Member, Settings};
use crate::support::shell::Shell;
use crate::support::wait;

/// Another database of the node.
const OTHER: &str = "other.db";

/// How many rows there are, by a program that opens the database now.
fn count(node: &Node, name: &str) -> u64 {
    sqlite::run(&node.file(name), "select count(*) from t").parse().unwrap()
}

#[test_matrix(["delete", "truncate", "persist", "wal"], ["auto", "off"])]
fn a_full_disk_loses_nothing_and_keeps_nobody_from_reading(mode: &str, passthrough: &'static str) {
    let settings = Settings { passthrough, ..Settings::default() };
    let mut node = Node::new(&settings, Member::Primary);
    let disk = Disk::mount(&node.data(), "20m");
    node.start();
    for name in [DB, OTHER] {
        let setup = format!("pragma journal_mode={mode}; create table t(x);");
        sqlite::run(&node.file(name), &format!("{setup} insert into t values (1)"));
    }
    let mut writer = Shell::open(&node.file(DB));
    writer.run("pragma wal_autocheckpoint=100000");
    let mut acknowledged = 1;
    let complaint = loop {
        let before = writer.complaints().len();
        writer.attempt("insert into t values (randomblob(300000))");
        let complaint = writer.complaints().split_off(before);
        if !complaint.is_empty() {
            break complaint;
        }
        acknowledged += 1;
        assert!(acknowledged < 200, "the disk is larger than thought");
    };
    assert!(complaint.contains("full") || complaint.contains("locked"), "{complaint}");
    assert_eq!(count(&node, DB), acknowledged);
    assert_eq!(count(&node, OTHER), 1);
    let mut other = Shell::open(&node.file(OTHER));
    // As the first one's log and LTX files come and go, there may be room for a small one.
    other.attempt("insert into t values (2)");
    assert_eq!(other.run("select min(x) from t"), "1");
    disk.resize("200m");
    for (shell, name) in [(&mut writer, DB), (&mut other, OTHER)] {
        let before = count(&node, name);
        wait::until_true("a writer to be let in", || {
            shell.attempt("insert into t values ('there is room')");
            count(&node, name) == before + 1
        });
        check_chain(&node.db_dir(name), node.pos(name));
    }
    writer.close();
    other.close();
    let pos = node.pos(DB);
    node.stop();
    node.start();
    assert_eq!(node.pos(DB), pos);
    check_integrity(&sqlite::open(&node.file(DB)));
    assert_eq!(count(&node, DB), acknowledged + 1);
    node.stop();
}

/// Who cannot start cannot be mended either: people look at a node's databases to find what to remove.
#[test_matrix(["delete", "wal"])]
fn a_node_starts_on_a_full_disk(mode: &str) {
    let mut node = Node::new(&Settings::default(), Member::Primary);
    let disk = Disk::mount(&node.data(), "20m");
    node.start();
    let setup = format!("pragma journal_mode={mode}; create table t(x);");
    sqlite::run(&node.file(DB), &format!("{setup} insert into t values (randomblob(300000))"));
    let pos = node.pos(DB);
    let filler = node.data().join("filler");
    for starts in 2..4 {
        node.kill();
        let fill = "cat /dev/zero > \"$0\" 2>/dev/null || true";
        assert!(Command::new("sh").args(["-c", fill]).arg(&filler).status().unwrap().success());
        node.start();
        assert_eq!(node.pos(DB), pos);
        if mode == "delete" {
            // In WAL mode SQLite makes a wal-index first, which needs room on any file system.
            assert_eq!(count(&node, DB), 1);
        }
        let refused = sqlite::try_run(&node.file(DB), "insert into t values (2)");
        assert!(refused.is_err(), "there is no room");
        let ids = std::fs::read_to_string(node.data().join("node-ids")).unwrap();
        assert_eq!(ids.lines().filter(|line| line.len() == 16).count(), starts);
    }
    disk.resize("200m");
    wait::until_true("a writer to be let in", || {
        sqlite::try_run(&node.file(DB), "insert into t values (2)").is_ok()
    });
    check_chain(&node.db_dir(DB), node.pos(DB));
    node.stop();
    node.start();
    check_integrity(&sqlite::open(&node.file(DB)));
    assert_eq!(count(&node, DB), 2);
    node.stop();
}
