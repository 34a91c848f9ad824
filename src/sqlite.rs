//! SQLite's file formats: bytes in, values out. Nothing here opens a file.
//!
//! Sources: "Database File Format" (<https://www.sqlite.org/fileformat2.html>) and "WAL-mode File
//! Format" (<https://www.sqlite.org/walformat.html>).

pub mod freelist;
pub mod header;
pub mod journal;
pub mod lock_byte;
pub mod schema;
pub mod wal;
pub mod wal_index;

/// The big-endian word at byte `at`; the caller has checked the length.
fn be_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn put_be_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

/// Random numbers for tests.
#[cfg(test)]
pub(crate) mod test_rng {
    /// SplitMix64.
    pub(crate) struct Rng(u64);

    impl Rng {
        /// Seeded from `LITEFS_TEST_SEED`, else from the clock; the seed is printed.
        pub(crate) fn from_env() -> Rng {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            Rng::from_env_or(now.unwrap().subsec_nanos().into())
        }

        /// Seeded from `LITEFS_TEST_SEED`, else the same each time; the seed is printed.
        pub(crate) fn from_env_or(otherwise: u64) -> Rng {
            let seed = std::env::var("LITEFS_TEST_SEED").ok();
            let seed = seed.map_or(otherwise, |seed| seed.parse().expect("a number"));
            println!("LITEFS_TEST_SEED={seed}");
            Rng(seed)
        }

        /// A number from 0 up to, not including, `end`.
        pub(crate) fn below(&mut self, end: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)) % end
        }
    }
}
