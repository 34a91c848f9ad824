//! Files that the reference programs wrote, and the worked examples of the format.

use std::fs;
use std::io::Cursor;

use ltx::{Checksum, Compression, PageSize, Pgno, Pos, Txid, Variant};

use crate::util::{decode, decode_any, encode, fixture, fixtures};

const PAGE_SIZES: [u32; 3] = [512, 4096, 65536];

/// The first bytes of the page block of a compressed file: the reference's LZ4 frame parameters.
const FRAME_START: [u8; 7] = [0x04, 0x22, 0x4D, 0x18, 0x64, 0x40, 0xA7];

#[test]
fn raw_files_are_written_byte_for_byte() {
    for page_size in PAGE_SIZES {
        let bytes = fixture(&format!("page{page_size}.v1.ltx"));
        let content = decode(&bytes[..]).unwrap();
        assert_eq!(encode(&content, Compression::None), bytes, "page size {page_size}");
    }
}

#[test]
fn compressed_files_hold_the_same_database() {
    for page_size in PAGE_SIZES {
        let bytes = fixture(&format!("page{page_size}.v1-lz4.ltx"));
        let content = decode(&bytes[..]).unwrap();
        assert_eq!(content.header.compression, Compression::Lz4);
        let ours = encode(&content, Compression::Lz4);
        assert_eq!(ours[..107], bytes[..107], "header and frame header");
        assert_eq!(ours[100..107], FRAME_START);
        assert_eq!(ours[ours.len() - 20..], bytes[bytes.len() - 20..], "lz4 checksum and trailer");
        assert_eq!(decode(&ours[..]).unwrap(), content);
    }
}

#[test]
fn snapshots_become_their_database() {
    for page_size in PAGE_SIZES {
        for variant in ["v1", "v1-lz4"] {
            let bytes = fixture(&format!("page{page_size}.{variant}.ltx"));
            let mut database = Vec::new();
            ltx::materialize(&bytes[..], &mut database).unwrap();
            assert!(database == fixture(&format!("page{page_size}.db")), "{page_size} {variant}");
        }
    }
}

#[test]
fn later_variants_hold_the_same_pages() {
    let expected = decode(&fixture("page512.v1.ltx")[..]).unwrap();
    for (name, variant) in [
        ("page512.v1.ltx", Variant::V1),
        ("page512.v1-lz4.ltx", Variant::V1Lz4),
        ("page512.v2.ltx", Variant::V2),
        ("page512.v3f.ltx", Variant::V3),
        ("page512.v3.ltx", Variant::V3),
    ] {
        let bytes = fixture(name);
        assert_eq!(ltx::AnyReader::new(Cursor::new(&bytes)).unwrap().variant(), variant, "{name}");
        let content = decode_any(&bytes).unwrap();
        assert!(content.pages == expected.pages, "{name}");
        assert_eq!(content.trailer.post_apply, expected.trailer.post_apply, "{name}");
    }
}

#[test]
fn example_a_is_written_byte_for_byte() {
    let bytes = fixture("exA.ltx");
    let content = decode(&bytes[..]).unwrap();
    let sums: Vec<u64> =
        content.pages.iter().map(|(pgno, page)| ltx::page_checksum(*pgno, page).get()).collect();
    assert_eq!(sums, [0xa507_474f_1c48_81c2, 0x8e35_1d6d_970e_662d]);
    assert_eq!(content.trailer.post_apply.get(), 0xab32_5a22_8b46_e7ef);
    assert_eq!(content.trailer.file_checksum.get(), 0x87be_55ff_8e63_8b82);
    assert_eq!(content.header.timestamp_ms, 1_700_000_000_123);
    assert!(content.header.is_snapshot());
    assert_eq!(content.header.pre_pos(), Pos::ZERO);
    assert_eq!(encode(&content, Compression::None), bytes);
}

#[test]
fn example_b_continues_example_a() {
    let content = decode(&fixture("exB.ltx")[..]).unwrap();
    let pre = Checksum::from_raw(0xab32_5a22_8b46_e7ef).unwrap();
    assert_eq!(content.header.pre_pos(), Pos { txid: Txid(1), checksum: pre });
    assert_eq!(content.trailer.post_apply.get(), 0xe20c_c3f6_6ba8_656a);
    assert_eq!(content.trailer.file_checksum.get(), 0xa454_d454_86d8_b09a);
    let ours = encode(&content, Compression::Lz4);
    assert_eq!(decode(&ours[..]).unwrap(), content);
}

#[test]
fn example_c_is_example_b_in_another_variant() {
    let (b, c) =
        (decode(&fixture("exB.ltx")[..]).unwrap(), decode_any(&fixture("exC.ltx")).unwrap());
    assert_eq!(c.pages, b.pages);
    assert_eq!(c.trailer.post_apply, b.trailer.post_apply);
    assert_eq!(c.trailer.file_checksum.get(), 0xded4_59c6_910a_4746);
}

#[test]
fn files_of_a_litefs_node_verify_and_form_chains() {
    let mut files = 0;
    for compression in ["lz4", "raw"] {
        for database in ["delete.db", "gone.db", "wal.db"] {
            files += check_chain(&format!("chains/{compression}/{database}"));
        }
    }
    assert_eq!(files, 2 * (9 + 2 + 10));
}

/// Checks each file of a directory and that each continues the one before; how many there are.
#[track_caller]
fn check_chain(dir: &str) -> usize {
    let mut names: Vec<_> = fs::read_dir(fixtures().join(dir))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let mut pos = Pos::ZERO;
    let mut database = Cursor::new(Vec::new());
    for name in &names {
        let bytes = fixture(&format!("{dir}/{name}"));
        let (header, trailer) = ltx::verify(&bytes[..]).unwrap();
        assert_eq!(ltx::file_name(header.min_txid, header.max_txid), *name);
        assert_eq!(ltx::parse_file_name(name), Some((header.min_txid, header.max_txid)));
        assert_eq!(header.pre_pos(), pos, "{dir}/{name}");
        ltx::apply(&bytes[..], &mut database).unwrap();
        assert_eq!(checksum(database.get_ref(), header.page_size), trailer.post_apply);
        pos = Pos { txid: header.max_txid, checksum: trailer.post_apply };
    }
    let inputs: Vec<_> =
        names.iter().map(|name| Cursor::new(fixture(&format!("{dir}/{name}")))).collect();
    let mut whole = Vec::new();
    let (header, trailer) = ltx::compact(inputs, &mut whole, Compression::Lz4).unwrap();
    assert_eq!((header.max_txid, trailer.post_apply), (pos.txid, pos.checksum));
    let mut materialized = Vec::new();
    ltx::materialize(&whole[..], &mut materialized).unwrap();
    assert!(materialized == *database.get_ref(), "compacted {dir}");
    names.len()
}

fn checksum(database: &[u8], page_size: PageSize) -> Checksum {
    let mut sums = vec![Checksum::NONE; database.len() / page_size.bytes()];
    ltx::page_checksums(Pgno(1), page_size, database, &mut sums);
    sums.into_iter().fold(Checksum::EMPTY, Checksum::toggle)
}
