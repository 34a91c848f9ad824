//! What is written is read back; compaction; the lock page.

use std::io::{self, Cursor, Read, Write};

use ltx::{
    Checksum, Compression, Decoder, Encoder, Error, Header, PageSize, Pgno, Pos, Trailer, Txid,
};

use crate::util::{Content, decode, encode, header, page, rolling};

const PAGE_SIZES: [u32; 8] = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536];

/// A file with these pages, as content; the trailer only has what the encoder needs.
fn content(header: Header, pages: Vec<(Pgno, Vec<u8>)>, post_apply: Checksum) -> Content {
    Content { header, pages, trailer: Trailer { post_apply, file_checksum: Checksum::NONE } }
}

fn snapshot(page_size: u32, pages: u32) -> Content {
    let pages: Vec<_> = (1..=pages).map(|n| (Pgno(n), page(page_size, n))).collect();
    let post = rolling(pages.iter().map(|(pgno, page)| (*pgno, &page[..])));
    content(header(page_size, 1, pages.len() as u32, Checksum::NONE), pages, post)
}

#[test]
fn snapshots_of_all_page_sizes_come_back() {
    for page_size in PAGE_SIZES {
        for compression in [Compression::None, Compression::Lz4] {
            let written = snapshot(page_size, 7);
            let bytes = encode(&written, compression);
            let read = decode(&bytes[..]).unwrap();
            assert_eq!(read.header, Header { compression, ..written.header });
            assert!(read.pages == written.pages, "page size {page_size}");
            assert_eq!(read.trailer.post_apply, written.trailer.post_apply);
            if compression == Compression::None {
                assert_eq!(bytes.len(), 120 + 7 * (page_size as usize + 4));
            }
        }
    }
}

#[test]
fn transactions_may_leave_out_pages_and_be_empty() {
    let sum = Checksum::flagged(77);
    for pages in [
        vec![],
        vec![(Pgno(3), page(512, 3))],
        vec![(Pgno(1), page(512, 1)), (Pgno(9), page(512, 9))],
    ] {
        for compression in [Compression::None, Compression::Lz4] {
            let written = content(header(512, 5, 9, sum), pages.clone(), sum);
            assert_eq!(decode(&encode(&written, compression)[..]).unwrap().pages, pages);
        }
    }
}

#[test]
fn every_header_field_comes_back() {
    let sum = Checksum::flagged(0x1234);
    let header = Header {
        max_txid: Txid(0x0102_0304_0506_0708),
        timestamp_ms: -1,
        wal_offset: i64::MAX,
        wal_size: 4120,
        wal_salt1: 0xdead_beef,
        wal_salt2: 0x0bad_cafe,
        ..header(65536, 2, u32::MAX, sum)
    };
    assert_eq!(Header::decode(&header.encode()).unwrap(), header);
    assert_eq!(header.pre_pos(), Pos { txid: Txid(1), checksum: sum });
    assert!(!header.is_snapshot());
}

#[test]
fn deletion_leaves_an_empty_database() {
    let written = content(header(512, 3, 0, Checksum::flagged(1)), vec![], Checksum::EMPTY);
    let bytes = encode(&written, Compression::None);
    assert_eq!(bytes.len(), 120);
    let mut database = Cursor::new(vec![1; 2048]);
    ltx::apply(&bytes[..], &mut database).unwrap();
    assert!(database.get_ref().is_empty());
}

#[test]
fn a_file_inside_a_stream_ends_where_it_ends() {
    for compression in [Compression::None, Compression::Lz4] {
        let mut stream = encode(&snapshot(512, 3), compression);
        stream.extend(b"what follows");
        let mut decoder = Decoder::new(&stream[..]).unwrap();
        let mut page = [0; 512];
        while decoder.next_page(&mut page).unwrap().is_some() {}
        let (rest, _) = decoder.finish_embedded().unwrap();
        assert_eq!(rest, b"what follows");
        assert!(matches!(ltx::verify(&stream[..]), Err(Error::TrailingBytes)));
    }
}

/// A source that gives one byte at a time, with interruptions between.
struct Dribble<'a>(&'a [u8], bool);

impl Read for Dribble<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.1 = !self.1;
        if self.1 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let len = buffer.len().min(1);
        self.0.read(&mut buffer[..len])
    }
}

#[test]
fn a_slow_source_makes_no_difference() {
    for compression in [Compression::None, Compression::Lz4] {
        let written = snapshot(512, 5);
        let bytes = encode(&written, compression);
        assert!(decode(Dribble(&bytes, false)).unwrap().pages == written.pages);
    }
}

#[test]
fn a_shrunk_database_is_cut_off() {
    let written = content(
        header(512, 2, 2, Checksum::flagged(1)),
        vec![(Pgno(1), page(512, 40))],
        Checksum::flagged(2),
    );
    let mut database = Cursor::new([page(512, 1), page(512, 2), page(512, 3)].concat());
    ltx::apply(&encode(&written, Compression::Lz4)[..], &mut database).unwrap();
    assert_eq!(*database.get_ref(), [page(512, 40), page(512, 2)].concat());
}

/// A chain: a snapshot of 4 pages, a shrink to 2, growth to 4 with page 3 left out, a change.
fn chain() -> (Vec<Vec<u8>>, Vec<u8>) {
    let zero = vec![0; 512];
    let states: [Vec<Vec<u8>>; 4] = [
        (1..=4).map(|n| page(512, n)).collect(),
        vec![page(512, 1), page(512, 22)],
        vec![page(512, 1), page(512, 22), zero.clone(), page(512, 34)],
        vec![page(512, 41), page(512, 22), zero, page(512, 34)],
    ];
    let changed: [&[u32]; 4] = [&[1, 2, 3, 4], &[2], &[4], &[1]];
    let mut pre = Checksum::NONE;
    let mut files = Vec::new();
    for (i, (state, changed)) in states.iter().zip(changed).enumerate() {
        let post = rolling((1..).map(Pgno).zip(state.iter().map(|page| &page[..])));
        let pages = changed.iter().map(|n| (Pgno(*n), state[*n as usize - 1].clone())).collect();
        let header = header(512, i as u64 + 1, state.len() as u32, pre);
        files.push(encode(&content(header, pages, post), Compression::Lz4));
        pre = post;
    }
    (files, states[3].concat())
}

#[test]
fn a_compacted_chain_is_the_last_state() {
    let (files, last) = chain();
    for compression in [Compression::None, Compression::Lz4] {
        let inputs = [2, 0, 3, 1].map(|i| Cursor::new(&files[i])).to_vec();
        let mut out = Vec::new();
        let (header, trailer) = ltx::compact(inputs, &mut out, compression).unwrap();
        assert_eq!(ltx::verify(&out[..]).unwrap(), (header, trailer));
        assert_eq!((header.min_txid, header.max_txid), (Txid(1), Txid(4)));
        assert_eq!(header.node_id.0, 0);
        let mut database = Vec::new();
        ltx::materialize(&out[..], &mut database).unwrap();
        assert!(database == last);
    }
}

#[test]
fn a_compacted_part_continues_the_rest() {
    let (files, last) = chain();
    let mut out = Vec::new();
    let inputs = files[1..].iter().map(Cursor::new).collect();
    let (header, _) = ltx::compact(inputs, &mut out, Compression::None).unwrap();
    assert_eq!(header.pre_apply, ltx::verify(&files[0][..]).unwrap().1.post_apply);
    let mut database = Cursor::new(Vec::new());
    ltx::apply(&files[0][..], &mut database).unwrap();
    ltx::apply(&out[..], &mut database).unwrap();
    // Page 3 was cut off and came back as a hole, which no file of this chain mentions.
    let kept = [0..1024, 1536..2048];
    assert!(kept.into_iter().all(|range| database.get_ref()[range.clone()] == last[range]));
}

#[test]
fn what_is_no_chain_is_not_compacted() {
    let (files, _) = chain();
    let compact = |inputs: &[&Vec<u8>]| {
        let inputs = inputs.iter().map(|bytes| Cursor::new(bytes.to_vec())).collect();
        ltx::compact(inputs, io::sink(), Compression::None).unwrap_err()
    };
    assert!(matches!(compact(&[]), Error::CompactNothing));
    assert!(matches!(compact(&[&files[0], &files[2]]), Error::CompactGap { .. }));
    assert!(matches!(compact(&[&files[0], &files[0]]), Error::CompactGap { .. }));
    let sum = Checksum::flagged(3);
    let other = encode(&content(header(512, 2, 4, sum), vec![], sum), Compression::None);
    assert!(matches!(compact(&[&files[0], &other]), Error::CompactChain { .. }));
    let other = encode(&content(header(1024, 2, 4, sum), vec![], sum), Compression::None);
    assert!(matches!(compact(&[&files[0], &other]), Error::CompactPageSize(..)));
    let mut cut = files[1].clone();
    cut.truncate(50);
    assert!(matches!(compact(&[&files[0], &cut]), Error::Short));
    let mut flipped = files[1].clone();
    *flipped.last_mut().unwrap() ^= 1;
    assert!(matches!(compact(&[&files[0], &flipped]), Error::FileChecksum { .. }));
}

/// A destination that remembers which pages were not all zeros, and the length.
#[derive(Default)]
struct PageMap {
    len: u64,
    used: Vec<u64>,
}

static ZEROS: [u8; 65536] = [0; 65536];

impl Write for PageMap {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let page = self.len / PageSize::MAX.bytes() as u64;
        if *bytes != ZEROS[..bytes.len()] {
            self.used.push(page + 1);
        }
        self.len += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_snapshot_leaves_out_the_lock_page() {
    let lock = PageSize::MAX.lock_pgno().0;
    assert_eq!(lock, 16385);
    let (bytes, trailer) = large_snapshot(lock + 1);
    let mut pages = PageMap::default();
    assert_eq!(ltx::materialize(&bytes[..], &mut pages).unwrap().1, trailer);
    assert_eq!(pages.len, u64::from(lock + 1) << 16);
    assert_eq!(pages.used, [1, lock - 1, lock + 1].map(u64::from));
}

/// A database of 64 KiB pages, zeros but for its first page and those beside the lock page.
fn large_snapshot(commit: u32) -> (Vec<u8>, Trailer) {
    let lock = PageSize::MAX.lock_pgno().0;
    let (zero, full) = (vec![0; 65536], vec![9; 65536]);
    let header =
        Header { compression: Compression::Lz4, ..header(65536, 1, commit, Checksum::NONE) };
    let mut encoder = Encoder::new(Vec::new(), header).unwrap();
    let mut sum = Checksum::EMPTY;
    for pgno in (1..=commit).filter(|pgno| *pgno != lock) {
        let data = if [1, lock - 1, lock + 1].contains(&pgno) { &full } else { &zero };
        sum = sum.toggle(encoder.page(Pgno(pgno), data).unwrap());
    }
    encoder.finish(sum).unwrap()
}
