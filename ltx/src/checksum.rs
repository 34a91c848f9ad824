//! CRC-64/GO-ISO: page checksums and the checksum of a file.
//!
//! The CRC is reflected, with all ones before and after. In a state, bit 63 is the coefficient of
//! x^0 and bit 0 that of x^63; the polynomial is x^64 + x^4 + x^3 + x + 1. So few terms that a few
//! bytes are fed in with four shifts; whole pages go through `crc-fast` (carry-less multiplication
//! where the processor has it).
//!
//! A page record of a file (number, then data) is exactly what a page checksum covers, and a CRC is
//! linear: `crc(A B) = crc(A) * x^(8 |B|) + crc(B)`. So each byte of a page goes through the CRC
//! once, for its page checksum, and [`FileCrc::append`] puts the result into the file checksum.

use crc_fast::{CrcAlgorithm, Digest};

use crate::types::{Checksum, PageSize, Pgno};

/// The size of a page number in a page record, in bytes.
pub(crate) const PGNO_SIZE: usize = 4;

/// The coefficients of x^4, x^3, x and 1 at x^3 of a reflected state, as shifts (bit 60 is x^3).
const REDUCE_NIBBLE: [u32; 4] = [60, 59, 57, 56];

/// The checksum of page `pgno` with the image `data`, which is one page.
pub fn page_checksum(pgno: Pgno, data: &[u8]) -> Checksum {
    Checksum::flagged(record_crc(pgno, data))
}

/// The checksums of consecutive pages, `first` and those after it, into `sums`; without allocating.
///
/// The lock page gets [`Checksum::NONE`]: it has no part in the checksum of a database.
///
/// # Panics
/// If `data` is not `sums.len()` whole pages.
pub fn page_checksums(first: Pgno, page_size: PageSize, data: &[u8], sums: &mut [Checksum]) {
    assert_eq!(data.len(), sums.len() * page_size.bytes(), "whole pages");
    let pages = data.chunks_exact(page_size.bytes());
    for ((pgno, page), sum) in (first.0..).zip(pages).zip(sums) {
        let pgno = Pgno(pgno);
        *sum = match pgno == page_size.lock_pgno() {
            true => Checksum::NONE,
            false => page_checksum(pgno, page),
        };
    }
}

/// The CRC of a page record: the page number and the page.
pub(crate) fn record_crc(pgno: Pgno, data: &[u8]) -> u64 {
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc64GoIso, feed_pgno(pgno));
    digest.update(data);
    digest.finalize()
}

/// The state after the four bytes of a page number.
fn feed_pgno(pgno: Pgno) -> u64 {
    let low = (u64::MAX ^ u64::from(pgno.0.swap_bytes())) & 0xffff_ffff;
    (u64::MAX >> 32) ^ (low << 32) ^ (low << 31) ^ (low << 29) ^ (low << 28)
}

/// The CRC of a file while it is written or read. Starts as the CRC of nothing.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct FileCrc(u64);

impl FileCrc {
    /// Takes in `bytes`.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc64GoIso, !self.0);
        digest.update(bytes);
        self.0 = digest.finalize();
    }

    /// Takes in bytes whose CRC is `crc` and whose number is that of `shift`.
    pub(crate) fn append(&mut self, crc: u64, shift: &Shift) {
        self.0 = shift.apply(self.0) ^ crc;
    }

    /// The checksum of what was taken in.
    pub(crate) fn checksum(self) -> Checksum {
        Checksum::flagged(self.0)
    }
}

/// Multiplication by x^(8 n): what n more bytes do to a CRC. Holds the multiples by each nibble.
#[derive(Debug, Clone)]
pub(crate) struct Shift([u64; 16]);

impl Shift {
    /// The shift by `bytes` bytes.
    pub(crate) fn new(bytes: usize) -> Shift {
        let factor = power(bytes);
        let times_x = multiply_x(factor);
        let times_x2 = multiply_x(times_x);
        let times_x3 = multiply_x(times_x2);
        let mut table = [0; 16];
        for (nibble, product) in table.iter_mut().enumerate() {
            for (bit, multiple) in [times_x3, times_x2, times_x, factor].into_iter().enumerate() {
                *product ^= multiple * (nibble as u64 >> bit & 1);
            }
        }
        Shift(table)
    }

    /// `crc` times x^(8 n): Horner's rule, four coefficients a step, the highest first.
    fn apply(&self, crc: u64) -> u64 {
        (0..16).fold(0, |product, i| multiply_x4(product) ^ self.0[(crc >> (4 * i) & 15) as usize])
    }
}

/// x^(8 bytes), by repeated squaring.
fn power(bytes: usize) -> u64 {
    let mut result = 1 << 63;
    let mut square = 1 << (63 - 8);
    let mut left = bytes;
    while left > 0 {
        if left & 1 == 1 {
            result = multiply(result, square);
        }
        square = multiply(square, square);
        left >>= 1;
    }
    result
}

fn multiply(a: u64, b: u64) -> u64 {
    (0..64).fold(0, |product, i| multiply_x(product) ^ (b * (a >> i & 1)))
}

fn multiply_x(a: u64) -> u64 {
    (a >> 1) ^ ((a & 1) * 0xD800_0000_0000_0000)
}

fn multiply_x4(a: u64) -> u64 {
    REDUCE_NIBBLE.into_iter().fold(a >> 4, |product, shift| product ^ (a & 15) << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crc(bytes: &[u8]) -> u64 {
        crc_fast::checksum(CrcAlgorithm::Crc64GoIso, bytes)
    }

    #[test]
    fn crc_has_the_published_check_value() {
        assert_eq!(crc(b"123456789"), 0xB909_56C7_75A4_1001);
        assert_eq!(crc(b""), 0);
        assert_eq!(crc(&[0; 4]), 0x6FFF_FFFF_9000_0000);
    }

    #[test]
    fn page_checksums_are_the_known_ones() {
        assert_eq!(page_checksum(Pgno(1), &[0; 512]).get(), 0xefb1_f44f_ecd9_9000);
        assert_eq!(page_checksum(Pgno(1), &[0; 4096]).get(), 0xd932_8f59_2d9e_733d);
    }

    #[test]
    fn a_page_number_counts_as_its_four_bytes() {
        let data: Vec<u8> = (0..512).map(|i| ((i * 31) >> 2) as u8).collect();
        for pgno in [1, 2, 255, 256, 0x0102_0304, u32::MAX] {
            let mut record = pgno.to_be_bytes().to_vec();
            record.extend(&data);
            assert_eq!(record_crc(Pgno(pgno), &data), crc(&record), "page {pgno}");
        }
    }

    #[test]
    fn appending_a_crc_equals_taking_in_its_bytes() {
        let bytes: Vec<u8> =
            (0..70_000_u32).map(|i| (i.wrapping_mul(2654435761) >> 9) as u8).collect();
        for split in [0, 1, 7, 100, 616, 69_999, 70_000] {
            let mut file = FileCrc::default();
            file.update(&bytes[..split]);
            file.append(crc(&bytes[split..]), &Shift::new(bytes.len() - split));
            assert_eq!(file.0, crc(&bytes), "split at {split}");
        }
    }

    #[test]
    fn a_batch_leaves_out_the_lock_page() {
        let page_size = PageSize::MAX;
        let lock = page_size.lock_pgno();
        let data = vec![7; 3 * page_size.bytes()];
        let mut sums = [Checksum::EMPTY; 3];
        page_checksums(Pgno(lock.0 - 1), page_size, &data, &mut sums);
        let page = &data[..page_size.bytes()];
        let (before, after) = (Pgno(lock.0 - 1), Pgno(lock.0 + 1));
        assert_eq!(sums, [page_checksum(before, page), Checksum::NONE, page_checksum(after, page)]);
    }
}
