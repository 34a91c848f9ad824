//! See `litefs::properties::wal`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| litefs::properties::wal(bytes));
