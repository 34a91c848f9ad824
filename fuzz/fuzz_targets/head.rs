//! See `litefs::properties::head`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| litefs::properties::head(bytes));
