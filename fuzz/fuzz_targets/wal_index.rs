//! See `litefs::properties::wal_index`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| litefs::properties::wal_index(bytes));
