//! Reads arbitrary bytes as a file. `cargo fuzz run read --sanitizer none` needs no nightly.

#![no_main]

#[path = "../../tests/properties.rs"]
mod properties;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| properties::read(bytes));
