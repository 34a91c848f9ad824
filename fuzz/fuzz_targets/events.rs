//! See `litefs::properties::events`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| litefs::properties::events(bytes));
