//! Decodes arbitrary bytes as a request. `cargo fuzz run request --sanitizer none` needs no nightly.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuse::properties::request(bytes));
