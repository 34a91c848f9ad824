//! Each label in `src/` is one that a script comes to, or stands in a short list with a reason.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use super::disk::Called;
use super::faults::{self, Calm, calms};
use super::{lent, start};

/// Calls that take a label first.
const CALLS: [&str; 5] =
    ["os::", "FileCursor::new", "FileCursor::at", "Labelled::new", "read_zero_extended"];

/// The labels in the sources below `dir`, each with a file that has it.
fn labels(dir: &Path, found: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            labels(&path, found);
        } else if name.ends_with(".rs") && !["tests.rs", "properties.rs"].contains(&name) {
            let text = fs::read_to_string(&path).unwrap();
            let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
            for label in labels_in(text) {
                found.insert(label.to_owned(), path.display().to_string());
            }
        }
    }
}

/// The first argument of each call that takes a label, where it is a text.
fn labels_in(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for call in CALLS {
        for (at, _) in text.match_indices(call) {
            let Some((name, rest)) = text[at + call.len()..].split_once('(') else { continue };
            if !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_') {
                continue;
            }
            let label = rest.trim_start().strip_prefix('"').and_then(|rest| rest.split_once('"'));
            found.extend(label.map(|(label, _)| label));
        }
    }
    found
}

/// Labels that no script comes to, and why.
const ELSEWHERE: [(&str, &str); 41] = [
    ("cluster:lease", LEASE),
    ("cluster:term", LEASE),
    ("read:lease", LEASE),
    ("read:term", LEASE),
    ("export:dir", COMMAND),
    ("export:rename", COMMAND),
    ("export:stale", COMMAND),
    ("export:temporary", COMMAND),
    ("run:lock", COMMAND),
    ("mount:dir", MOUNT),
    ("mount:probe", MOUNT),
    ("read:mount", MOUNT),
    ("shm:write", MOUNT),
    ("trace:dir", TRACE),
    ("trace:file", TRACE),
    ("trace:full", TRACE),
    ("trace:gzip", TRACE),
    ("trace:old", TRACE),
    ("read:spool", SPOOL),
    ("spool:clean", SPOOL),
    ("spool:create", SPOOL),
    ("spool:unlink", SPOOL),
    ("spool:write", SPOOL),
    ("forward", "a transaction of more than 4 MiB under a HALT lock: tests/cluster"),
    ("fence:remove", "only after a call before it has failed"),
    ("chain:withdraw", CHANCE),
    ("read:chain", CHANCE),
    ("read:positions", CHANCE),
    ("read:apply-index", CHANCE),
    ("read:apply-database", "page 1 of a replica's database that is not in its WAL"),
    ("read:repair", "pages of a start that explains a database by its file"),
    ("backup:restoring", "a note of the task that keeps a backup: tests/cluster/restore.rs"),
    ("read:restore", "page 1 at a restore over older data: tests/cluster/backup.rs"),
    ("read:rolled-back", "free pages after a rollback at a start: src/engine/recover/tests.rs"),
    ("super-journal:restore", "only after a call before it has failed"),
    ("unsynced:mark", UNSYNCED),
    ("unsynced:open", UNSYNCED),
    ("unsynced:sync", UNSYNCED),
    ("unsynced:write", UNSYNCED),
    ("read:unsynced", UNSYNCED),
    ("super-journal:truncate", "SQLite never does that"),
];
const UNSYNCED: &str = "only after a sync has failed";
const LEASE: &str = "what a node remembers of its lease proves nothing";
const COMMAND: &str = "a command of a person, not the node";
const MOUNT: &str = "only with a mount";
const TRACE: &str = "the trace log";
const SPOOL: &str = "what is on its way to a peer, in a file without a name";
const CHANCE: &str = "not in every run: it depends on the pace of the threads";

/// Whether a script comes to this label in some runs only.
pub fn comes_by_chance(label: &str) -> bool {
    ELSEWHERE.contains(&(label, CHANCE))
}

#[test]
fn every_label_is_come_to_or_has_a_reason() {
    let mut all = BTreeMap::new();
    labels(Path::new("src"), &mut all);
    let mut reached: BTreeSet<String> = BTreeSet::new();
    let mut note = |called: &mut dyn Iterator<Item = Called>| {
        reached.extend(called.map(|called| called.label));
    };
    note(&mut faults::reached().into_iter());
    note(&mut lent::reached().into_iter());
    note(&mut start::reached().into_iter());
    for Calm { calls, reads, .. } in calms() {
        note(&mut calls.iter().chain(reads).cloned());
    }
    println!("{} labels, {reached:?}", all.len());
    // With a part of the scripts nothing can be said.
    if std::env::var_os("LITEFS_TEST_SCRIPT").is_some() {
        return;
    }
    let elsewhere = |label: &String| ELSEWHERE.iter().any(|(known, _)| known == label);
    let missing: Vec<_> =
        all.iter().filter(|(label, _)| !reached.contains(*label) && !elsewhere(label)).collect();
    assert!(missing.is_empty(), "no script comes to {missing:#?}");
    let gone: Vec<_> = ELSEWHERE.iter().filter(|(label, _)| !all.contains_key(*label)).collect();
    assert!(gone.is_empty(), "no label any more: {gone:?}");
}
