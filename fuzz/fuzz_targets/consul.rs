//! See `litefs::properties::consul`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| litefs::properties::consul(bytes));
