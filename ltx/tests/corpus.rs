//! The saved inputs of the fuzz target, and small files of the reference programs, once each.

use std::fs;
use std::path::Path;

use crate::properties;
use crate::util::fixtures;

#[test]
fn saved_fuzz_inputs_keep_the_properties() {
    let replayed = replay(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/read"));
    assert!(replayed > 100, "only {replayed} inputs");
}

#[test]
fn files_of_a_litefs_node_keep_the_properties() {
    for compression in ["lz4", "raw"] {
        for database in ["delete.db", "gone.db", "wal.db"] {
            assert!(replay(&fixtures().join("chains").join(compression).join(database)) > 0);
        }
    }
}

fn replay(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).unwrap();
    entries.map(|entry| properties::read(&fs::read(entry.unwrap().path()).unwrap())).count()
}
