//! Each rule of the format, and the error that names it.

use std::io::{self, Write};

use ltx::{AnyReader, Checksum, Compression, Decoder, Encoder, Error, Header, Pgno, Txid};

use crate::util::{fixture, header, page};

const SUM: Checksum = Checksum::EMPTY;

#[track_caller]
fn refuses_header(header: Header, expected: &str) {
    let error = Encoder::new(io::sink(), header).err().unwrap();
    assert_eq!(error.to_string(), expected);
    assert_eq!(Header::decode(&header.encode()).unwrap_err().to_string(), expected);
}

#[test]
fn bad_headers_are_neither_written_nor_read() {
    let good = header(512, 2, 9, SUM);
    let id = |min, max| Header { min_txid: Txid(min), max_txid: Txid(max), ..good };
    refuses_header(id(0, 2), "minimum transaction id required");
    refuses_header(id(2, 0), "maximum transaction id required");
    refuses_header(id(3, 2), "transaction ids out of order: 0000000000000003 to 0000000000000002");
    refuses_header(id(1 << 63, 1 << 63), "transaction id 8000000000000000 is too large");
    refuses_header(Header { wal_offset: -1, ..good }, "negative wal offset -1");
    refuses_header(Header { wal_size: -5, wal_offset: 1, ..good }, "negative wal size -5");
    refuses_header(Header { wal_size: 1, ..good }, "wal offset required");
    refuses_header(Header { wal_salt1: 1, ..good }, "wal offset required");
    refuses_header(Header { wal_salt2: 1, ..good }, "wal offset required");
    refuses_header(Header { wal_offset: 32, wal_salt1: 1, ..good }, "wal size required");
    refuses_header(id(1, 2), "pre-apply checksum must be zero on snapshots");
    refuses_header(Header { pre_apply: Checksum::NONE, ..good }, "pre-apply checksum required");
}

#[track_caller]
fn refuses_header_bytes(at: usize, bytes: &[u8], expected: &str) {
    let mut header = header(512, 2, 9, SUM).encode();
    header[at..at + bytes.len()].copy_from_slice(bytes);
    assert_eq!(Header::decode(&header).unwrap_err().to_string(), expected);
}

#[test]
fn header_bytes_that_no_header_has_are_refused() {
    refuses_header_bytes(0, b"LTX2", "invalid ltx magic");
    refuses_header_bytes(4, &[0, 0, 0, 2], "invalid header flags 0x00000002");
    refuses_header_bytes(4, &[1, 0, 0, 1], "invalid header flags 0x01000001");
    refuses_header_bytes(8, &[0, 0, 0, 1], "invalid page size 1");
    refuses_header_bytes(8, &[0, 0, 2, 1], "invalid page size 513");
    refuses_header_bytes(8, &[0, 2, 0, 0], "invalid page size 131072");
    refuses_header_bytes(40, &[0x7f, 1], "invalid pre-apply checksum format");
}

#[track_caller]
fn refuses_page(txid: u64, before: &[u32], pgno: u32, expected: &str) {
    let pre = if txid == 1 { Checksum::NONE } else { SUM };
    let mut encoder = Encoder::new(io::sink(), header(512, txid, 9, pre)).unwrap();
    for pgno in before {
        encoder.page(Pgno(*pgno), &page(512, *pgno)).unwrap();
    }
    assert_eq!(encoder.page(Pgno(pgno), &[0; 512]).unwrap_err().to_string(), expected);
}

#[test]
fn pages_that_may_not_follow_are_refused() {
    refuses_page(2, &[], 0, "page number required");
    refuses_page(2, &[], 10, "page 10 past commit 9");
    refuses_page(2, &[3], 3, "page 3 out of order after 3");
    refuses_page(2, &[3, 5], 4, "page 4 out of order after 5");
    refuses_page(1, &[], 2, "snapshot starts with page 2");
    refuses_page(1, &[1, 2], 4, "page 4 after 2 in snapshot");
    refuses_page(1, &[1, 2], 2, "page 2 after 2 in snapshot");
}

#[test]
fn a_page_is_exactly_one_page() {
    let mut encoder = Encoder::new(io::sink(), header(512, 2, 9, SUM)).unwrap();
    let error = encoder.page(Pgno(1), &[0; 513]).unwrap_err();
    assert_eq!(error.to_string(), "page buffer of 513 bytes for pages of 512");
    let file = fixture("exA.ltx");
    let mut decoder = Decoder::new(&file[..]).unwrap();
    assert!(matches!(decoder.next_page(&mut [0; 511]), Err(Error::PageBuffer { .. })));
    assert_eq!(
        decoder.next_page(&mut [0; 512]).unwrap(),
        Some(Pgno(1)),
        "a wrong buffer is no end"
    );
}

#[test]
fn the_lock_page_is_refused() {
    let lock = 16385;
    let mut encoder = Encoder::new(Vec::new(), header(65536, 2, lock + 1, SUM)).unwrap();
    encoder.page(Pgno(lock - 1), &[1; 65536]).unwrap();
    let error = encoder.page(Pgno(lock), &[1; 65536]).unwrap_err();
    assert_eq!(error.to_string(), "lock page 16385 in ltx file");
    encoder.page(Pgno(lock + 1), &[1; 65536]).unwrap();
    let (mut bytes, _) = encoder.finish(SUM).unwrap();
    ltx::verify(&bytes[..]).unwrap();
    let last = 100 + 4 + 65536;
    bytes[last..last + 4].copy_from_slice(&lock.to_be_bytes());
    assert!(matches!(ltx::verify(&bytes[..]), Err(Error::LockPage(Pgno(16385)))));
}

#[test]
fn a_file_ends_with_the_right_checksum() {
    let finish = |txid, commit, pre, post, pages: &[u32]| {
        let mut encoder = Encoder::new(io::sink(), header(512, txid, commit, pre)).unwrap();
        for pgno in pages {
            encoder.page(Pgno(*pgno), &[0; 512]).unwrap();
        }
        encoder.finish(post).err().unwrap().to_string()
    };
    let other = Checksum::flagged(5);
    assert_eq!(finish(2, 9, SUM, Checksum::NONE, &[1]), "post-apply checksum required");
    assert_eq!(
        finish(2, 0, SUM, other, &[]),
        "post-apply checksum must be empty for a deleted database"
    );
    assert_eq!(finish(1, 3, Checksum::NONE, SUM, &[1, 2]), "snapshot ends at page 2 of 3");
    assert_eq!(
        finish(1, 1, Checksum::NONE, other, &[1]),
        "snapshot checksum mismatch: 8000000000000005 in the file, efb1f44fecd99000 of its pages"
    );
}

#[track_caller]
fn refuses_trailer(at: usize, bytes: &[u8], expected: &str) {
    let mut file = fixture("exA.ltx");
    let start = file.len() - 16 + at;
    file[start..start + bytes.len()].copy_from_slice(bytes);
    assert_eq!(ltx::verify(&file[..]).unwrap_err().to_string(), expected);
}

#[test]
fn trailers_that_no_file_has_are_refused() {
    refuses_trailer(0, &[0; 8], "post-apply checksum required");
    refuses_trailer(0, &[0x7f], "invalid post-apply checksum format");
    refuses_trailer(8, &[0; 8], "file checksum required");
    refuses_trailer(8, &[0x07], "invalid file checksum format");
    refuses_trailer(
        15,
        &[0],
        "file checksum mismatch: 87be55ff8e638b00 in the file, 87be55ff8e638b82 of its bytes",
    );
}

#[test]
fn the_end_is_not_checked_before_the_pages() {
    let file = fixture("exA.ltx");
    let mut decoder = Decoder::new(&file[..]).unwrap();
    decoder.next_page(&mut [0; 512]).unwrap();
    assert!(matches!(decoder.finish(), Err(Error::PagesUnread)));
}

#[test]
fn a_reader_stays_failed() {
    let file = &fixture("exA.ltx")[..300];
    let mut decoder = Decoder::new(file).unwrap();
    assert!(matches!(decoder.next_page(&mut [0; 512]), Err(Error::Short)));
    assert!(matches!(decoder.next_page(&mut [0; 512]), Err(Error::AfterError)));
    assert!(matches!(decoder.finish(), Err(Error::AfterError)));
}

#[test]
fn only_a_snapshot_becomes_a_database() {
    let error = ltx::materialize(&fixture("exB.ltx")[..], io::sink()).unwrap_err();
    assert_eq!(error.to_string(), "not a snapshot: starts at 0000000000000002");
}

/// A destination that fills up.
struct Full(usize);

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.checked_sub(bytes.len()) {
            Some(left) => self.0 = left,
            None => return Err(io::ErrorKind::StorageFull.into()),
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_destination_is_an_error_at_every_byte() {
    for compression in [Compression::None, Compression::Lz4] {
        let write = |room| {
            let header = Header { compression, ..header(512, 2, 2, SUM) };
            let mut encoder = Encoder::new(Full(room), header)?;
            encoder.page(Pgno(1), &page(512, 1))?;
            encoder.page(Pgno(2), &page(512, 2))?;
            encoder.finish(SUM).map(|_| room)
        };
        let enough = (0..2000).find_map(|room| write(room).ok()).unwrap();
        assert!(enough > 500);
        assert!((0..enough).all(|room| matches!(write(room), Err(Error::Write(_)))));
    }
}

#[test]
fn later_headers_may_leave_out_checksums() {
    // Example C with the flag "no checksums" and neither checksum: only the file checksum is wrong.
    let mut file = fixture("exC.ltx");
    file[7] = 2;
    let trailer = file.len() - 16;
    let error = |file: &[u8]| AnyReader::new(io::Cursor::new(file)).err().unwrap().to_string();
    assert_eq!(error(&file), "pre-apply checksum not allowed");
    file[40..48].fill(0);
    assert_eq!(error(&file), "post-apply checksum not allowed");
    file[trailer..trailer + 8].fill(0);
    let message = error(&file);
    assert!(message.starts_with("file checksum mismatch: ded459c6910a4746"), "{message}");
    let computed = u64::from_str_radix(&message[message.len() - 29..][..16], 16).unwrap();
    file[trailer + 8..].copy_from_slice(&computed.to_be_bytes());
    let reader = AnyReader::new(io::Cursor::new(&file[..])).unwrap();
    assert!(reader.header().pre_apply.is_none());
}
