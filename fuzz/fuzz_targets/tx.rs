//! See `litefs::properties::tx`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| litefs::properties::tx(bytes));
