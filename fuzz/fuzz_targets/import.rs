//! See `litefs::properties::import`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| litefs::properties::import(bytes));
