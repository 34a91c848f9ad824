//! SQLite's files: a WAL and its index, a rollback journal.

use std::collections::BTreeMap;
use std::io::Cursor;

use ltx::{PageSize, Pgno};

use crate::sqlite::journal::{JournalReader, super_journal};
use crate::sqlite::wal::{
    self, ByteOrder, Frame, FrameReader, Salts, WalCursor, WalHeader, frame_size,
};
use crate::sqlite::wal_index::{
    self, CKPT_AT, CheckpointInfo, HEADER_COPY_SIZE, HEADER_SIZE, IndexHeader, Place, REGION_SIZE,
    Region,
};

/// The bytes as a WAL; and a WAL made by them, which is read up to where they damage it.
pub fn wal(bytes: &[u8]) {
    if let Ok(header) = WalHeader::parse(bytes) {
        assert_eq!(WalHeader::parse(&header.encode()), Ok(header));
        let frames = frames_of(&header, &bytes[wal::HEADER_SIZE..]);
        assert!(frames.len() * frame_size(header.page_size) <= bytes.len());
    }
    let [order, salt, damage, flip, rest @ ..] = bytes else { return };
    let order = if order % 2 == 0 { ByteOrder::Little } else { ByteOrder::Big };
    let salts = Salts(u32::from(*salt), 7);
    let header = WalHeader { order, page_size: PageSize::MIN, sequence: 3, salts };
    let mut log = header.encode().to_vec();
    let mut cursor = WalCursor::start(&header);
    let mut written = Vec::new();
    for part in rest.chunks(3).take(8) {
        let pgno = Pgno(u32::from(part[0]) + 1);
        let commit = part.get(1).map(|&pages| u32::from(pages)).filter(|&pages| pages > 0);
        let page = vec![part.get(2).copied().unwrap_or(9); PageSize::MIN.bytes()];
        cursor.encode(&Frame { pgno, commit, page: &page }, &mut log);
        written.push((pgno, commit, page));
    }
    assert_eq!(frames_of(&header, &log[wal::HEADER_SIZE..]), written, "what was written");
    let room = log.len() - wal::HEADER_SIZE;
    if room > 0 && *flip != 0 {
        let at = usize::from(*damage) * 97 % room;
        log[wal::HEADER_SIZE + at] ^= flip;
        let whole = at / frame_size(PageSize::MIN);
        let found = frames_of(&header, &log[wal::HEADER_SIZE..]);
        assert_eq!(found, written[..whole], "up to the damage");
    }
}

fn frames_of(header: &WalHeader, bytes: &[u8]) -> Vec<(Pgno, Option<u32>, Vec<u8>)> {
    let mut reader = FrameReader::new(bytes, WalCursor::start(header));
    let mut frames = Vec::new();
    while let Ok(frame) = reader.next_frame().expect("memory is read without an error") {
        let Frame { pgno, commit, page } = frame;
        assert!(pgno.0 > 0);
        frames.push((pgno, commit, page.to_vec()));
    }
    frames
}

/// Reading a journal ends, and gives back pages of the database only.
pub fn journal(bytes: &[u8]) {
    for known in [None, Some(PageSize::MIN)] {
        let reader = JournalReader::open(Cursor::new(bytes), known);
        let Some(mut reader) = reader.expect("memory is read without an error") else { continue };
        let header = *reader.header();
        let mut records = 0;
        while let Some(record) = reader.next_record().expect("memory is read without an error") {
            assert!((1..=header.database_pages).contains(&record.pgno.0));
            assert_ne!(record.pgno, header.page_size.lock_pgno());
            assert_eq!(record.page.len(), header.page_size.bytes());
            records += 1;
        }
        assert!(records * header.page_size.bytes() <= bytes.len(), "each record stands there once");
    }
    let name = super_journal(Cursor::new(bytes)).expect("memory is read without an error");
    assert!(name.is_none_or(|name| !name.is_empty() && name.len() < bytes.len()));
}

/// A wal-index is read as it was written; its hash tables find the newest entry, and end also when they
/// are garbage.
pub fn wal_index(bytes: &[u8]) {
    if let Some(header) = IndexHeader::parse(bytes) {
        assert!(IndexHeader::is_taken(bytes));
        let mut again = [0; CKPT_AT];
        again[..HEADER_COPY_SIZE].copy_from_slice(&header.encode());
        again[HEADER_COPY_SIZE..].copy_from_slice(&header.encode());
        assert_eq!(IndexHeader::parse(&again), Some(header));
    }
    if let Some(info) = CheckpointInfo::parse(bytes) {
        let mut again = [0; HEADER_SIZE];
        again[CKPT_AT..].copy_from_slice(&info.encode());
        assert_eq!(CheckpointInfo::parse(&again), Some(info));
    }
    let [first, rest @ ..] = bytes else { return };
    let region = usize::from(*first % 3);
    let mut table = garbage(rest);
    for last in [1, 2, 4000] {
        let last = Place { region, entry: last };
        if let Some(place) = wal_index::find(&table, last, Pgno(u32::from(*first))) {
            assert!(place.entry <= last.entry);
        }
    }
    filled(region, rest, &mut table);
}

fn garbage(bytes: &[u8]) -> Box<Region> {
    let mut table = Box::new([0; REGION_SIZE]);
    for (to, from) in table.iter_mut().zip(bytes.iter().cycle()) {
        *to = *from;
    }
    table
}

/// A table with an entry for each byte, against a map.
fn filled(region: usize, bytes: &[u8], table: &mut Region) {
    let mut newest: BTreeMap<Pgno, u16> = BTreeMap::new();
    let mut last = Place { region, entry: 0 };
    for (byte, entry) in bytes.iter().zip(1..=1000) {
        last.entry = entry;
        let pgno = Pgno(u32::from(*byte) * 8192 % 70_001 + 1);
        assert!(wal_index::insert(table, last, pgno).is_some());
        newest.insert(pgno, entry);
        assert_eq!(Place::of(last.frame()), last);
    }
    if last.entry == 0 {
        return;
    }
    for (pgno, entry) in &newest {
        let found = wal_index::find(table, last, *pgno);
        assert_eq!(found, Some(Place { region, entry: *entry }), "{pgno:?}");
        assert_eq!(wal_index::pgno_of(table, Place { region, entry: *entry }), pgno.0);
    }
    let half = Place { region, entry: last.entry.div_ceil(2) };
    wal_index::drop_after(table, half);
    for (pgno, entry) in &newest {
        let found = wal_index::find(table, last, *pgno).map(|place| place.entry);
        assert!(found.is_none_or(|found| found <= half.entry), "{pgno:?} was dropped");
        assert!(*entry > half.entry || found == Some(*entry), "{pgno:?} is still there");
    }
}
