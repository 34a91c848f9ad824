//! What a node has open must not grow with the transactions that it has seen.

use std::fs;

use test_case::test_case;

use super::{DB, check_chain, sqlite, strict};

/// The last program that closes a database in WAL mode removes the WAL.
#[test_case("wal", "auto")]
#[test_case("wal", "off")]
#[test_case("delete", "auto")]
fn removed_files_do_not_stay_open(mode: &str, passthrough: &'static str) {
    let node = strict(passthrough);
    let file = node.file(DB);
    sqlite::run(&file, &format!("pragma journal_mode={mode}; create table t(x);"));
    for row in 0..20 {
        sqlite::run(&file, &format!("insert into t values ({row})"));
    }
    let open = fs::read_dir(format!("/proc/{}/fd", node.pid())).unwrap();
    let targets = open.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    let data = node.data();
    let removed = targets.filter(|target| {
        target.starts_with(&data) && target.to_string_lossy().ends_with(" (deleted)")
    });
    let removed: Vec<_> = removed.collect();
    assert!(removed.len() < 5, "{removed:?}");
    check_chain(&node.db_dir(DB), node.pos(DB));
}
