//! See `litefs::properties::journal`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| litefs::properties::journal(bytes));
