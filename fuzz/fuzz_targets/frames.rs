//! See `litefs::properties::frames`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| litefs::properties::frames(bytes));
