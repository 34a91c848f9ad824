//! SQLite's file formats: bytes in, values out. Nothing here opens a file.
//!
//! Sources: "Database File Format" (<https://www.sqlite.org/fileformat2.html>) and "WAL-mode File
//! Format" (<https://www.sqlite.org/walformat.html>).

pub mod header;
pub mod journal;
pub mod lock_byte;
pub mod wal;
pub mod wal_index;

/// The big-endian word at byte `at`; the caller has checked the length.
fn be_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn put_be_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}
