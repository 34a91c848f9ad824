//! See `litefs::properties::data_dir`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| litefs::properties::data_dir(bytes));
