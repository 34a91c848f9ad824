//! See `litefs::properties::locks`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| litefs::properties::locks(bytes));
