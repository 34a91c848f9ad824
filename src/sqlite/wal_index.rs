//! The wal-index (`-shm`): which frame of the log holds which page.
//!
//! ```text
//!      0   48  header, copy 0               header
//!     48   48  header, copy 1                0  4  version, 3007000
//!     96    4  frames in the database        8  4  change counter
//!    100   20  read marks 0 to 4            12  1  1: initialised
//!    120    8  lock bytes, never written    13  1  1: frame checksums are big-endian
//!    128    4  frames being put there       14  2  page size; 1 means 65536
//!    136       page numbers, hash table     16  4  the last frame that is committed
//!  32768       page numbers, hash table     20  4  size of the database in pages
//!              ...                          24  8  checksum of the last frame
//!                                           32  8  salts, as in the log
//!                                           40  8  checksum of bytes 0..40
//! ```
//!
//! Numbers are in the byte order of the machine, but the salts are bytes of the log. The file
//! consists of regions of 32 KiB: 4096 page numbers (4062 in the first, the rest of them being the
//! header), then 8192 hash slots of 16 bits. Page number `i` of a region belongs to its frame `i`;
//! a slot holds `i + 1`, or 0. (WAL-mode File Format, section 2.)
//!
//! A header counts if both copies agree and the checksum is right; a writer writes copy 1 first.
//! Entries past the last committed frame may be there: a reader passes over them.

use ltx::{PageSize, Pgno};

use super::wal::{ByteOrder, Salts, WalChecksum};

const VERSION: u32 = 3_007_000;

const CHANGE_AT: usize = 8;
const IS_INIT_AT: usize = CHANGE_AT + 4;
const BIG_ENDIAN_AT: usize = IS_INIT_AT + 1;
const PAGE_SIZE_AT: usize = BIG_ENDIAN_AT + 1;
const MX_FRAME_AT: usize = PAGE_SIZE_AT + 2;
const PAGES_AT: usize = MX_FRAME_AT + 4;
const FRAME_CHECKSUM_AT: usize = PAGES_AT + 4;
const SALTS_AT: usize = FRAME_CHECKSUM_AT + 8;
const CHECKSUM_AT: usize = SALTS_AT + 8;

/// The length of one copy of the header in bytes.
pub const HEADER_COPY_SIZE: usize = CHECKSUM_AT + 8;
/// Where the checkpoint information starts, in bytes: the number of frames that are in the
/// database, 32 bits, followed by the read marks.
pub const CKPT_AT: usize = 2 * HEADER_COPY_SIZE;
/// Where the first read mark stands, in bytes.
pub const READ_MARKS_AT: usize = CKPT_AT + 4;
/// Where the number of frames stands that a checkpoint began to move, in bytes.
pub const ATTEMPTED_AT: usize = READ_MARKS_AT + 4 * READ_MARKS + 8;
/// The length of everything before the first page number, in bytes.
pub const HEADER_SIZE: usize = ATTEMPTED_AT + 8;

/// How many read marks there are; mark 0 always is zero.
pub const READ_MARKS: usize = 5;
/// Where read mark `i` stands, in bytes.
pub const fn read_mark_at(i: usize) -> usize {
    READ_MARKS_AT + 4 * i
}

/// The read mark that nobody uses.
pub const READ_MARK_UNUSED: u32 = u32::MAX;

/// The length of a region in bytes.
pub const REGION_SIZE: usize = 32768;
/// How many frames a region holds.
const REGION_FRAMES: u32 = 4096;
/// How many frames the first region holds, where the header takes the room of 34.
const FIRST_REGION_FRAMES: u32 = REGION_FRAMES - (HEADER_SIZE / 4) as u32;
const SLOTS: usize = 8192;
/// Where the hash slots of a region start, in bytes.
pub const SLOTS_AT: usize = REGION_SIZE - 2 * SLOTS;
/// The multiplier of the hash function.
const HASH_FACTOR: u32 = 383;

/// The header of a wal-index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexHeader {
    /// Incremented by each transaction.
    pub change: u32,
    /// The byte order of the frame checksums.
    pub order: ByteOrder,
    /// The size of a page.
    pub page_size: PageSize,
    /// The last frame that is committed; 0: the log is empty.
    pub mx_frame: u32,
    /// The size of the database in pages.
    pub pages: u32,
    /// The running checksum of the log after that frame.
    pub frame_checksum: WalChecksum,
    /// The salts of the log.
    pub salts: Salts,
}

impl IndexHeader {
    /// The header at the start of the file; `None` if the copies differ, the checksum is wrong or
    /// nobody initialised it. Then a writer is at work, or died: SQLite would rebuild the file.
    pub fn parse(bytes: &[u8]) -> Option<IndexHeader> {
        let (copies, _) = bytes.split_at_checked(CKPT_AT)?;
        let (first, second) = copies.split_at(HEADER_COPY_SIZE);
        (first == second).then(|| IndexHeader::parse_copy(first)).flatten()
    }

    /// Whether a client takes the header at the start of the file as it is, rather than building the
    /// index anew. That of an empty WAL is taken too, though it has no page size and does not parse.
    pub fn is_taken(bytes: &[u8]) -> bool {
        let Some((copies, _)) = bytes.split_at_checked(CKPT_AT) else { return false };
        let (first, second) = copies.split_at(HEADER_COPY_SIZE);
        first == second && is_whole(first)
    }

    /// One copy of the header.
    fn parse_copy(copy: &[u8]) -> Option<IndexHeader> {
        if !is_whole(copy) || ne_u32(copy, 0) != VERSION {
            return None;
        }
        let page_size = match u16::from_ne_bytes([copy[PAGE_SIZE_AT], copy[PAGE_SIZE_AT + 1]]) {
            1 => PageSize::MAX,
            bytes => PageSize::new(u32::from(bytes))?,
        };
        let big = copy[BIG_ENDIAN_AT] != 0;
        Some(IndexHeader {
            change: ne_u32(copy, CHANGE_AT),
            order: if big { ByteOrder::Big } else { ByteOrder::Little },
            page_size,
            mx_frame: ne_u32(copy, MX_FRAME_AT),
            pages: ne_u32(copy, PAGES_AT),
            frame_checksum: WalChecksum(
                ne_u32(copy, FRAME_CHECKSUM_AT),
                ne_u32(copy, FRAME_CHECKSUM_AT + 4),
            ),
            salts: Salts::read(copy, SALTS_AT),
        })
    }

    /// Both copies of a header that is whole, but of a version that SQLite does not know: it opens no
    /// database with that (SQLITE_CANTOPEN).
    pub fn unknown() -> [u8; CKPT_AT] {
        let mut copy = [0; HEADER_COPY_SIZE];
        put_ne_u32(&mut copy, 0, VERSION + 1);
        copy[IS_INIT_AT] = 1;
        IndexHeader::seal(&mut copy);
        let mut copies = [0; CKPT_AT];
        copies.as_chunks_mut().0.fill(copy);
        copies
    }

    fn seal(copy: &mut [u8; HEADER_COPY_SIZE]) {
        let checksum = checksum_of(copy);
        put_ne_u32(copy, CHECKSUM_AT, checksum.0);
        put_ne_u32(copy, CHECKSUM_AT + 4, checksum.1);
    }

    /// The bytes of one copy.
    pub fn encode(&self) -> [u8; HEADER_COPY_SIZE] {
        let mut copy = [0; HEADER_COPY_SIZE];
        put_ne_u32(&mut copy, 0, VERSION);
        put_ne_u32(&mut copy, CHANGE_AT, self.change);
        copy[IS_INIT_AT] = 1;
        copy[BIG_ENDIAN_AT] = u8::from(self.order == ByteOrder::Big);
        let page_size = u16::try_from(self.page_size.get()).unwrap_or(1);
        copy[PAGE_SIZE_AT..MX_FRAME_AT].copy_from_slice(&page_size.to_ne_bytes());
        put_ne_u32(&mut copy, MX_FRAME_AT, self.mx_frame);
        put_ne_u32(&mut copy, PAGES_AT, self.pages);
        put_ne_u32(&mut copy, FRAME_CHECKSUM_AT, self.frame_checksum.0);
        put_ne_u32(&mut copy, FRAME_CHECKSUM_AT + 4, self.frame_checksum.1);
        self.salts.write(&mut copy, SALTS_AT);
        IndexHeader::seal(&mut copy);
        copy
    }
}

/// Whether a copy of the header was initialised and written in full.
fn is_whole(copy: &[u8]) -> bool {
    let checksum = WalChecksum(ne_u32(copy, CHECKSUM_AT), ne_u32(copy, CHECKSUM_AT + 4));
    copy[IS_INIT_AT] != 0 && checksum == checksum_of(copy)
}

fn checksum_of(copy: &[u8]) -> WalChecksum {
    WalChecksum::default().update(ByteOrder::NATIVE, &copy[..CHECKSUM_AT])
}

/// How far the log has been put into the database, and how far readers look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointInfo {
    /// So many frames, from the first, are in the database file.
    pub backfill: u32,
    /// Reader `i`, who holds READ`i` shared, needs no frame after its mark put into the database.
    pub read_marks: [u32; READ_MARKS],
    /// So many frames may be in the database file, if a checkpoint died.
    pub attempted: u32,
}

impl CheckpointInfo {
    /// The state of an empty log, as SQLite leaves it after a restart.
    pub const EMPTY: CheckpointInfo = CheckpointInfo {
        backfill: 0,
        read_marks: [0, 0, READ_MARK_UNUSED, READ_MARK_UNUSED, READ_MARK_UNUSED],
        attempted: 0,
    };

    /// Reads it from the first [`HEADER_SIZE`] bytes of the file; `None` if there are fewer.
    pub fn parse(bytes: &[u8]) -> Option<CheckpointInfo> {
        let bytes = bytes.get(..HEADER_SIZE)?;
        Some(CheckpointInfo {
            backfill: ne_u32(bytes, CKPT_AT),
            read_marks: std::array::from_fn(|i| ne_u32(bytes, read_mark_at(i))),
            attempted: ne_u32(bytes, ATTEMPTED_AT),
        })
    }

    /// The bytes from [`CKPT_AT`] to [`HEADER_SIZE`].
    pub fn encode(&self) -> [u8; HEADER_SIZE - CKPT_AT] {
        let mut bytes = [0; HEADER_SIZE - CKPT_AT];
        put_ne_u32(&mut bytes, 0, self.backfill);
        for (i, &mark) in self.read_marks.iter().enumerate() {
            put_ne_u32(&mut bytes, read_mark_at(i) - CKPT_AT, mark);
        }
        put_ne_u32(&mut bytes, ATTEMPTED_AT - CKPT_AT, self.attempted);
        bytes
    }
}

/// Where a frame (the first is 1) has its entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The number of the region, from 0.
    pub region: usize,
    /// The number of the frame in the region, from 1.
    pub entry: u16,
}

impl Place {
    /// The place of `frame`, which is not 0.
    pub fn of(frame: u32) -> Place {
        debug_assert!(frame > 0, "frames are numbered from 1");
        let shifted = u64::from(frame - 1) + u64::from(REGION_FRAMES - FIRST_REGION_FRAMES);
        let region = (shifted / u64::from(REGION_FRAMES)) as usize;
        let entry = (frame - first_frame(region) + 1) as u16;
        Place { region, entry }
    }

    /// The frame that has its entry here.
    pub fn frame(self) -> u32 {
        first_frame(self.region) + u32::from(self.entry) - 1
    }

    /// Where the page number stands in the region, in bytes.
    pub fn pgno_at(self) -> usize {
        let first = if self.region == 0 { HEADER_SIZE } else { 0 };
        first + 4 * (usize::from(self.entry) - 1)
    }
}

fn first_frame(region: usize) -> u32 {
    match region {
        0 => 1,
        _ => FIRST_REGION_FRAMES + 1 + (region as u32 - 1) * REGION_FRAMES,
    }
}

/// How many regions hold the entries of the frames up to `mx_frame`; at least one, for the header.
pub fn region_count(mx_frame: u32) -> usize {
    if mx_frame == 0 { 1 } else { Place::of(mx_frame).region + 1 }
}

/// The bytes of one region of the file.
pub type Region = [u8; REGION_SIZE];

/// Enters page `pgno` as `place` in its `region` and returns where the hash slot stands, in bytes.
/// The first entry of a region clears it; entries must be made in order. `None` if the table is
/// full of other entries, which no writer leaves behind.
pub fn insert(region: &mut Region, place: Place, pgno: Pgno) -> Option<usize> {
    if place.entry == 1 {
        region[place.pgno_at()..].fill(0);
    }
    let mut slot = hash(pgno);
    // A table of 8192 slots holds at most 4096 entries, so there is a free one nearby.
    for _ in 0..SLOTS {
        let at = SLOTS_AT + 2 * slot;
        if ne_u16(region, at) == 0 {
            put_ne_u32(region, place.pgno_at(), pgno.0);
            region[at..at + 2].copy_from_slice(&place.entry.to_ne_bytes());
            return Some(at);
        }
        slot = (slot + 1) % SLOTS;
    }
    None
}

/// Drops the entries after `last` from its `region`: what a transaction left that never committed.
pub fn drop_after(region: &mut Region, last: Place) {
    for slot in region[SLOTS_AT..].as_chunks_mut::<2>().0 {
        if u16::from_ne_bytes(*slot) > last.entry {
            *slot = [0; 2];
        }
    }
    region[last.pgno_at() + 4..SLOTS_AT].fill(0);
}

/// The newest entry of `region` for page `pgno`, no later than `last`, a place in that region.
pub fn find(region: &Region, last: Place, pgno: Pgno) -> Option<Place> {
    let mut newest = None;
    let mut slot = hash(pgno);
    for _ in 0..SLOTS {
        let entry = ne_u16(region, SLOTS_AT + 2 * slot);
        if entry == 0 {
            break;
        }
        let place = Place { entry, ..last };
        if entry <= last.entry && pgno_of(region, place) == pgno.0 {
            newest = newest.max(Some(entry));
        }
        slot = (slot + 1) % SLOTS;
    }
    newest.map(|entry| Place { entry, ..last })
}

/// The page number that is entered as `place` in its `region`; 0 if there is none.
pub fn pgno_of(region: &Region, place: Place) -> u32 {
    ne_u32(region, place.pgno_at())
}

/// The last place of region number `region`.
pub fn last_place(region: usize) -> Place {
    let frames = if region == 0 { FIRST_REGION_FRAMES } else { REGION_FRAMES };
    Place { region, entry: frames as u16 }
}

fn hash(pgno: Pgno) -> usize {
    pgno.0.wrapping_mul(HASH_FACTOR) as usize % SLOTS
}

fn ne_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn ne_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn put_ne_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use super::super::wal::{self, Frame, WalCursor, WalHeader};
    use super::*;

    /// The log and the wal-index of a database of many transactions, while it is open.
    fn real_files(transactions: u32) -> (Vec<u8>, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let db = rusqlite::Connection::open(dir.path().join("db")).unwrap();
        db.execute_batch(
            "PRAGMA page_size=512; PRAGMA journal_mode=WAL; PRAGMA wal_autocheckpoint=0;
             PRAGMA synchronous=OFF; CREATE TABLE t(x);",
        )
        .unwrap();
        for _ in 0..transactions {
            db.execute("INSERT INTO t VALUES (randomblob(3000))", []).unwrap();
        }
        let wal = std::fs::read(dir.path().join("db-wal")).unwrap();
        (wal, std::fs::read(dir.path().join("db-shm")).unwrap())
    }

    fn region(shm: &[u8], number: usize) -> &Region {
        shm[number * REGION_SIZE..][..REGION_SIZE].try_into().unwrap()
    }

    fn frames(wal: &[u8]) -> Vec<u32> {
        let mut cursor = WalCursor::start(&WalHeader::parse(wal).unwrap());
        std::iter::from_fn(|| {
            let Frame { pgno, .. } = cursor.verify(&wal[cursor.offset() as usize..]).ok()?;
            Some(pgno.0)
        })
        .collect()
    }

    #[test]
    fn the_entries_of_a_real_index_come_out_the_same() {
        let (wal, shm) = real_files(1300);
        let pgnos = frames(&wal);
        assert!(pgnos.len() > 9000, "the test wants three regions");
        let mut made = Box::new([0xee; REGION_SIZE]);
        for (i, &pgno) in pgnos.iter().enumerate() {
            let place = Place::of(i as u32 + 1);
            assert_eq!(place.frame(), i as u32 + 1);
            insert(&mut made, place, Pgno(pgno)).unwrap();
            if i + 1 == pgnos.len() || place == last_place(place.region) {
                let start = Place { entry: 1, ..place }.pgno_at();
                assert!(made[start..] == region(&shm, place.region)[start..], "{place:?}");
            }
        }
    }

    #[test]
    fn a_page_is_found_in_its_newest_frame() {
        let (wal, shm) = real_files(1300);
        let pgnos = frames(&wal);
        for last in [1, 40, 4062, 4063, 8158, 8159, 9000] {
            let last = Place::of(last);
            for pgno in [1, 2, 3, 50, 5000] {
                let expected = (Place { entry: 1, ..last }.frame()..=last.frame())
                    .rfind(|&frame| pgnos[frame as usize - 1] == pgno);
                let found = find(region(&shm, last.region), last, Pgno(pgno)).map(Place::frame);
                assert_eq!(found, expected, "page {pgno} up to {last:?}");
            }
        }
    }

    #[test]
    fn dropped_entries_leave_no_trace() {
        let mut region = Box::new([0; REGION_SIZE]);
        let mut before = Box::new([0; REGION_SIZE]);
        for frame in 1..=100 {
            if frame == 61 {
                before.copy_from_slice(&region[..]);
            }
            insert(&mut region, Place::of(frame), Pgno(frame % 7 + 1)).unwrap();
        }
        drop_after(&mut region, Place::of(60));
        assert!(region == before);
    }

    #[test]
    fn a_real_header_is_read_and_written_to_the_byte() {
        for transactions in [0, 3] {
            let (wal, shm) = real_files(transactions);
            let header = IndexHeader::parse(&shm).unwrap();
            let wal_header = WalHeader::parse(&wal).unwrap();
            assert_eq!(header.encode(), shm[..HEADER_COPY_SIZE]);
            assert_eq!(header.mx_frame as usize, frames(&wal).len());
            assert_eq!((header.salts, header.order), (wal_header.salts, wal_header.order));
            let mut cursor = WalCursor::start(&wal_header);
            while cursor.verify(&wal[cursor.offset() as usize..]).is_ok() {}
            assert_eq!(header.frame_checksum, cursor.checksum());
            assert_eq!(cursor.frame(), header.mx_frame);
            assert_eq!(wal::frame_offset(header.page_size, header.mx_frame + 1), cursor.offset());
            let info = CheckpointInfo::parse(&shm).unwrap();
            assert_eq!(info.encode(), shm[CKPT_AT..HEADER_SIZE]);
        }
    }

    #[test]
    fn a_header_in_the_making_does_not_count() {
        let (_, shm) = real_files(1);
        for at in [0, 20, CHECKSUM_AT, HEADER_COPY_SIZE, HEADER_COPY_SIZE + 20] {
            let mut bad = shm.clone();
            bad[at] ^= 1;
            assert_eq!(IndexHeader::parse(&bad), None, "byte {at}");
        }
        let mut both = shm.clone();
        for copy in [0, HEADER_COPY_SIZE] {
            both[copy + MX_FRAME_AT] ^= 1;
        }
        assert_eq!(IndexHeader::parse(&both), None);
        assert_eq!(IndexHeader::parse(&[0; HEADER_SIZE]), None);
        assert_eq!(IndexHeader::parse(&shm[..95]), None);
    }
}
