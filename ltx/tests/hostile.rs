//! Broken bytes: an error, or the very same content.

use std::io::{Cursor, Write};

use ltx::{AnyReader, Compression, Error, Pgno};
use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};

use crate::util::{Content, decode, decode_any, encode, fixture, header, page};

type Decode = fn(&[u8]) -> Result<Content, Error>;

const V1: Decode = |bytes| decode(bytes);

/// Small files and how to read them.
fn small_files() -> Vec<(&'static str, Vec<u8>, Decode)> {
    vec![
        ("raw", fixture("exA.ltx"), V1),
        ("lz4", fixture("exB.ltx"), V1),
        ("v3", fixture("exC.ltx"), decode_any),
        ("lz4, any", fixture("exB.ltx"), decode_any),
        ("linked frame", with_frame(&fixture("exB.ltx"), linked_frame()), V1),
        ("stored blocks", with_frame(&noise(), FrameInfo::new().block_checksums(true)), V1),
    ]
}

fn linked_frame() -> FrameInfo {
    FrameInfo::new()
        .block_mode(BlockMode::Linked)
        .block_size(BlockSize::Max64KB)
        .block_checksums(true)
        .content_checksum(true)
}

/// A compressed transaction that does not compress.
fn noise() -> Vec<u8> {
    let data: Vec<u8> = (0..4).flat_map(|seed| page(512, seed)[..128].to_vec()).collect();
    let sum = ltx::Checksum::flagged(1);
    let pages = vec![(Pgno(1), data)];
    let trailer = ltx::Trailer { post_apply: sum, file_checksum: sum };
    encode(&Content { header: header(512, 2, 1, sum), pages, trailer }, Compression::Lz4)
}

/// The compressed file `bytes` with its page block in a frame with other parameters.
fn with_frame(bytes: &[u8], info: FrameInfo) -> Vec<u8> {
    let content = decode(bytes).unwrap();
    let mut block = Vec::new();
    for (pgno, page) in &content.pages {
        block.extend(pgno.0.to_be_bytes());
        block.extend(page);
    }
    block.extend([0; 4]);
    let info = match info.content_size {
        Some(_) => info.content_size(Some(block.len() as u64)),
        None => info,
    };
    let mut frame = FrameEncoder::with_frame_info(info, Vec::new());
    frame.write_all(&block).unwrap();
    let frame = frame.finish().unwrap();
    [&bytes[..100], &frame, &bytes[bytes.len() - 16..]].concat()
}

#[test]
fn frames_with_other_parameters_are_read() {
    let bytes = fixture("page4096.v1-lz4.ltx");
    let expected = decode(&bytes[..]).unwrap();
    let large = fixture("page65536.v1-lz4.ltx");
    for size in [BlockSize::Max64KB, BlockSize::Max256KB, BlockSize::Max1MB, BlockSize::Max4MB] {
        for info in [
            linked_frame().block_size(size),
            FrameInfo::new().block_size(size).content_size(Some(0)),
            FrameInfo::new().block_size(size).block_checksums(true),
            linked_frame().block_size(size).block_checksums(false).content_size(Some(0)),
        ] {
            assert!(decode(&with_frame(&bytes, info.clone())[..]).unwrap() == expected);
            ltx::verify(&with_frame(&large, info)[..]).unwrap();
        }
    }
}

#[test]
fn linked_blocks_may_refer_to_earlier_ones() {
    // Noise that repeats after 51 KB: only a block that sees the one before it finds it again.
    let noise: Vec<u8> = (0..100).flat_map(|seed| page(1536, seed)[..512].to_vec()).collect();
    let pages: Vec<_> =
        (1..=400_u32).map(|n| (Pgno(n), noise[n as usize % 100 * 512..][..512].to_vec())).collect();
    let sum = ltx::Checksum::flagged(1);
    let trailer = ltx::Trailer { post_apply: sum, file_checksum: sum };
    let content = Content { header: header(512, 2, 400, sum), pages, trailer };
    let bytes = encode(&content, Compression::Lz4);
    let linked = with_frame(&bytes, linked_frame());
    assert!(linked.len() < bytes.len() * 2 / 3, "{} of {} bytes", linked.len(), bytes.len());
    assert!(decode(&linked[..]).unwrap() == decode(&bytes[..]).unwrap());
}

#[test]
fn no_flipped_bit_changes_what_is_read() {
    for (name, bytes, decode) in small_files() {
        let expected = decode(&bytes).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok(content) = decode(&flipped) {
                assert!(content == expected, "{name}: bit {bit} changes the content");
                assert!(bit / 8 >= 100, "{name}: the file checksum covers the header");
            }
        }
    }
}

#[test]
fn no_cut_file_is_read() {
    for (name, bytes, decode) in small_files() {
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len]).is_err(), "{name}: cut to {len} bytes");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(decode(&longer).is_err(), "{name}: one byte more");
    }
}

#[test]
fn no_byte_value_makes_a_reader_panic() {
    for (_, bytes, decode) in small_files() {
        for at in 0..bytes.len() {
            for value in [0x00, 0x7f, 0x80, 0xff] {
                let mut changed = bytes.clone();
                changed[at..(at + 4).min(bytes.len())].fill(value);
                // Reading must end; either way is fine.
                let _ = decode(&changed);
            }
        }
    }
}

#[test]
fn counts_are_checked_before_they_are_used() {
    let mut lz4 = fixture("exB.ltx");
    lz4[107..111].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    assert!(matches!(decode(&lz4[..]), Err(Error::Lz4Block)));
    lz4[107..111].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(decode(&lz4[..]), Err(Error::Lz4Block)));
    let mut v3 = fixture("exC.ltx");
    v3[106..110].fill(0xff);
    assert!(matches!(AnyReader::new(Cursor::new(v3)), Err(Error::PageSizeField(u32::MAX))));
    let mut raw = fixture("exA.ltx");
    raw[12..16].fill(0xff);
    assert!(matches!(decode(&raw[..]), Err(Error::SnapshotIncomplete { commit: u32::MAX, .. })));
}

#[test]
fn the_frame_must_end_where_the_pages_do() {
    let bytes = fixture("exB.ltx");
    let trailer = bytes.len() - 16;
    let content = decode(&bytes[..]).unwrap();
    let frame_of = |extra: &[u8]| {
        let mut frame = FrameEncoder::with_frame_info(linked_frame(), Vec::new());
        for (pgno, page) in &content.pages {
            frame.write_all(&pgno.0.to_be_bytes()).unwrap();
            frame.write_all(page).unwrap();
        }
        frame.write_all(extra).unwrap();
        [&bytes[..100], &frame.finish().unwrap(), &bytes[trailer..]].concat()
    };
    assert!(decode(&frame_of(&[0; 4])[..]).unwrap() == content);
    assert!(matches!(decode(&frame_of(&[0; 5])[..]), Err(Error::Lz4End)));
    assert!(matches!(decode(&frame_of(&[])[..]), Err(Error::Lz4End)));
    let two = [&bytes[..trailer], &bytes[100..]].concat();
    assert!(decode(&two[..]).is_err(), "a second frame is no trailer");
}
