//! Files and pages that the tests share.

use std::fs;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use ltx::{
    AnyReader, Checksum, Compression, Decoder, Encoder, Error, Header, NodeId, PageSize, Pgno,
    Trailer, Txid,
};

/// What a file says: its header, its pages, its trailer.
#[derive(Debug, PartialEq)]
pub struct Content {
    pub header: Header,
    pub pages: Vec<(Pgno, Vec<u8>)>,
    pub trailer: Trailer,
}

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

pub fn fixture(name: &str) -> Vec<u8> {
    fs::read(fixtures().join(name)).unwrap_or_else(|error| panic!("read {name}: {error}"))
}

/// All of a file of format v1.
pub fn decode(source: impl Read) -> Result<Content, Error> {
    let mut decoder = Decoder::new(source)?;
    let header = *decoder.header();
    let mut page = vec![0; header.page_size.bytes()];
    let mut pages = Vec::new();
    while let Some(pgno) = decoder.next_page(&mut page)? {
        assert_eq!(decoder.page_checksum(), ltx::page_checksum(pgno, &page));
        pages.push((pgno, page.clone()));
    }
    Ok(Content { header, pages, trailer: decoder.finish()? })
}

/// All of a file of any variant.
pub fn decode_any(bytes: &[u8]) -> Result<Content, Error> {
    let mut reader = AnyReader::new(Cursor::new(bytes))?;
    let header = *reader.header();
    let mut page = vec![0; header.page_size.bytes()];
    let mut pages = Vec::new();
    while let Some(pgno) = reader.next_page(&mut page)? {
        assert_eq!(reader.page_checksum(), ltx::page_checksum(pgno, &page));
        pages.push((pgno, page.clone()));
    }
    Ok(Content { header, pages, trailer: reader.finish()? })
}

/// `content` as a file, with its page block stored as `compression` says.
pub fn encode(content: &Content, compression: Compression) -> Vec<u8> {
    let header = Header { compression, ..content.header };
    let mut encoder = Encoder::new(Vec::new(), header).unwrap();
    for (pgno, page) in &content.pages {
        encoder.page(*pgno, page).unwrap();
    }
    encoder.finish(content.trailer.post_apply).unwrap().0
}
/// A header of transaction `txid`, made on the checksum `pre`.
pub fn header(page_size: u32, txid: u64, commit: u32, pre: Checksum) -> Header {
    Header {
        compression: Compression::None,
        page_size: PageSize::new(page_size).unwrap(),
        commit,
        min_txid: Txid(txid),
        max_txid: Txid(txid),
        timestamp_ms: 1_700_000_000_123,
        pre_apply: pre,
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: NodeId(0x1122_3344_5566_7788),
    }
}

/// A page that compresses in parts: noise from `seed`, then zeros.
pub fn page(page_size: u32, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut page = vec![0; page_size as usize];
    for byte in &mut page[..page_size as usize / 3] {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        *byte = state as u8;
    }
    page
}

/// The checksum of a database of these pages, which must be without the lock page.
pub fn rolling<'a>(pages: impl IntoIterator<Item = (Pgno, &'a [u8])>) -> Checksum {
    pages
        .into_iter()
        .fold(Checksum::EMPTY, |sum, (pgno, data)| sum.toggle(ltx::page_checksum(pgno, data)))
}
