//! Files and pages that the tests share.

use std::fs;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use ltx::{AnyReader, Compression, Decoder, Encoder, Error, Header, Pgno, Trailer};

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
