//! See `litefs::properties::config`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| litefs::properties::config(bytes));
