//! See `litefs::properties::backup`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| litefs::properties::backup(bytes));
