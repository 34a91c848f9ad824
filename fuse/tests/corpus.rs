//! The saved inputs of the fuzz target, once each.

use std::path::Path;

#[test]
fn saved_fuzz_inputs_keep_the_properties() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/request");
    let entries = std::fs::read_dir(dir).unwrap();
    let replayed = entries
        .map(|entry| fuse::properties::request(&std::fs::read(entry.unwrap().path()).unwrap()))
        .count();
    assert!(replayed > 50, "only {replayed} inputs");
}
