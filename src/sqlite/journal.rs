//! The rollback journal: the former content of the pages that a transaction changed.
//!
//! ```text
//! segment header, padded to a sector     record                    end of file, optional
//!  0  8  magic                            0  4  page number         0  4  lock page number
//!  8  4  records; see `Count`             4  p  page                4  n  super-journal's name
//! 12  4  nonce of the checksums         4+p  4  checksum            .. 4  n
//! 16  4  database size in pages before                              .. 4  checksum of the name
//! 20  4  sector size                                                .. 8  magic
//! 24  4  page size
//! ```
//!
//! All numbers are big-endian. Segments follow each other, each at a multiple of the sector size.
//! Sector size, page size and database size of the first header hold for all. (Database File
//! Format, section 3.)
//!
//! What is read here are the records that SQLite would play back from a *hot* journal, one that a
//! dead process left: a segment whose header was never synced holds nothing (its pages were not
//! written to the database yet), and the journal ends at the first record that is not whole.

use std::io::{self, BufReader, Read, Seek, SeekFrom};

use ltx::{PageSize, Pgno};

use super::be_u32;

/// The first bytes of each segment, and the last of a journal that names a super-journal.
pub const JOURNAL_MAGIC: [u8; 8] = [0xd9, 0xd5, 0x05, 0xf9, 0x20, 0xa1, 0x63, 0xd7];

const COUNT_AT: usize = JOURNAL_MAGIC.len();
const NONCE_AT: usize = COUNT_AT + 4;
const DATABASE_PAGES_AT: usize = NONCE_AT + 4;
const SECTOR_SIZE_AT: usize = DATABASE_PAGES_AT + 4;
const PAGE_SIZE_AT: usize = SECTOR_SIZE_AT + 4;

/// The length of a segment's header without its padding, in bytes.
pub const HEADER_SIZE: usize = PAGE_SIZE_AT + 4;

/// A record count that means "to the end of the file".
const COUNT_TO_END: u32 = u32::MAX;

/// The sector sizes that SQLite accepts, in bytes (`MAX_SECTOR_SIZE` in its pager).
const SECTOR_SIZES: std::ops::RangeInclusive<u32> = 32..=65536;

/// Every so many bytes from the end of a page, one is part of the record's checksum.
const CHECKSUM_STRIDE: usize = 200;

/// The length of the end of a journal after the super-journal's name, in bytes.
const SUPER_TAIL_SIZE: u64 = 16;

/// The longest super-journal name that is believed, in bytes: PATH_MAX.
const SUPER_NAME_SIZE_MAX: u64 = 4096;

/// The page size that the first 28 bytes of a journal name, synced or not: SQLite writes magic and
/// record count only when it syncs the journal, the page size at once.
pub fn page_size(header: &[u8]) -> Option<PageSize> {
    PageSize::new(be_u32(header.get(..HEADER_SIZE)?, PAGE_SIZE_AT))
}

/// Whether a journal that starts with these bytes was synced: only then has its transaction
/// possibly touched the database.
pub fn is_synced(header: &[u8]) -> bool {
    header.starts_with(&JOURNAL_MAGIC)
}

/// The checksum of a record.
pub fn record_checksum(nonce: u32, page: &[u8]) -> u32 {
    let bytes = page.iter().rev().skip(CHECKSUM_STRIDE - 1).step_by(CHECKSUM_STRIDE);
    // The byte at offset 0 never counts.
    let count = page.len().saturating_sub(1) / CHECKSUM_STRIDE;
    bytes.take(count).fold(nonce, |sum, &byte| sum.wrapping_add(u32::from(byte)))
}

/// What the first header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalHeader {
    /// The size of a page.
    pub page_size: PageSize,
    /// The size of the database before the transaction, in pages: a rollback truncates to it.
    pub database_pages: u32,
    /// The size of a sector in bytes.
    pub sector_size: u32,
}

impl JournalHeader {
    /// Reads a first header. A journal that leaves the page size out has the `known` one. `None`
    /// if SQLite would not play such a journal back.
    pub fn parse(header: &[u8], known: Option<PageSize>) -> Option<JournalHeader> {
        let header = header.get(..HEADER_SIZE).filter(|header| is_synced(header))?;
        let page_size = match be_u32(header, PAGE_SIZE_AT) {
            0 => known?,
            bytes => PageSize::new(bytes)?,
        };
        let sector_size = be_u32(header, SECTOR_SIZE_AT);
        let valid = sector_size.is_power_of_two() && SECTOR_SIZES.contains(&sector_size);
        let database_pages = be_u32(header, DATABASE_PAGES_AT);
        valid.then_some(JournalHeader { page_size, database_pages, sector_size })
    }

    fn record_size(&self) -> u64 {
        u64::from(self.page_size.get()) + 8
    }
}

/// The former content of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Which page; never more than [`JournalHeader::database_pages`], never the lock page.
    pub pgno: Pgno,
    /// Its content.
    pub page: &'a [u8],
}

/// Reads the records of a hot journal, one in memory at a time.
#[derive(Debug)]
pub struct JournalReader<R> {
    reader: BufReader<R>,
    header: JournalHeader,
    /// The size of the file in bytes.
    len: u64,
    /// Where the next record or the next header is looked for, in bytes.
    offset: u64,
    nonce: u32,
    /// The records that are left in the segment.
    left: u64,
    record: Vec<u8>,
}

impl<R: Read + Seek> JournalReader<R> {
    /// Reads the first header. `None`: nothing to roll back, the database is as it was. `known` is
    /// the page size of the database, if it is known.
    pub fn open(mut reader: R, known: Option<PageSize>) -> io::Result<Option<JournalReader<R>>> {
        let len = reader.seek(SeekFrom::End(0))?;
        if len < HEADER_SIZE as u64 {
            return Ok(None);
        }
        let mut bytes = [0; HEADER_SIZE];
        reader.seek(SeekFrom::Start(0))?;
        reader.read_exact(&mut bytes)?;
        let header = JournalHeader::parse(&bytes, known);
        let Some(header) = header.filter(|header| u64::from(header.sector_size) <= len) else {
            return Ok(None);
        };
        let record = vec![0; header.page_size.bytes() + 8];
        let reader = BufReader::new(reader);
        let mut journal =
            JournalReader { reader, header, len, offset: 0, nonce: 0, left: 0, record };
        journal.enter_segment(&bytes)?;
        Ok(Some(journal))
    }

    /// The first header.
    pub fn header(&self) -> &JournalHeader {
        &self.header
    }

    /// The next record to write back; `None` at the end.
    pub fn next_record(&mut self) -> io::Result<Option<Record<'_>>> {
        loop {
            while self.left == 0 {
                if !self.next_segment()? {
                    return Ok(None);
                }
            }
            let Some(pgno) = self.read_record()? else {
                self.end();
                return Ok(None);
            };
            if pgno.0 <= self.header.database_pages {
                let page = &self.record[4..self.record.len() - 4];
                return Ok(Some(Record { pgno, page }));
            }
        }
    }

    /// The page of the next record, which is now in `record`; `None` if it is not whole.
    fn read_record(&mut self) -> io::Result<Option<Pgno>> {
        if self.offset + self.header.record_size() > self.len {
            return Ok(None);
        }
        self.reader.read_exact(&mut self.record)?;
        self.offset += self.header.record_size();
        self.left -= 1;
        let pgno = Pgno(be_u32(&self.record, 0));
        if pgno.0 == 0 || pgno == self.header.page_size.lock_pgno() {
            return Ok(None);
        }
        // SQLite passes over pages past the end before it looks at the checksum.
        if pgno.0 > self.header.database_pages {
            return Ok(Some(pgno));
        }
        let (content, checksum) = self.record.split_at(self.record.len() - 4);
        let whole = record_checksum(self.nonce, &content[4..]) == be_u32(checksum, 0);
        Ok(whole.then_some(pgno))
    }

    /// Whether there is another segment; if so, the reader stands at its first record.
    fn next_segment(&mut self) -> io::Result<bool> {
        let sector_size = u64::from(self.header.sector_size);
        let start = self.offset.next_multiple_of(sector_size);
        if start + sector_size > self.len {
            return Ok(false);
        }
        let mut bytes = [0; HEADER_SIZE];
        self.reader.seek(SeekFrom::Start(start))?;
        self.reader.read_exact(&mut bytes)?;
        if !is_synced(&bytes) {
            return Ok(false);
        }
        self.offset = start;
        self.enter_segment(&bytes)?;
        Ok(true)
    }

    fn enter_segment(&mut self, bytes: &[u8; HEADER_SIZE]) -> io::Result<()> {
        self.offset += u64::from(self.header.sector_size);
        self.nonce = be_u32(bytes, NONCE_AT);
        self.left = match be_u32(bytes, COUNT_AT) {
            COUNT_TO_END => (self.len - self.offset) / self.header.record_size(),
            count => u64::from(count),
        };
        self.reader.seek(SeekFrom::Start(self.offset))?;
        Ok(())
    }

    fn end(&mut self) {
        self.offset = self.len;
        self.left = 0;
    }
}

/// The path of the super-journal that the end of a journal names. While that file exists (or if
/// there is no name) the journal is rolled back; when it is gone, the transaction has committed.
/// (Database File Format, section 3; "Atomic Commit In SQLite", section 5.)
pub fn super_journal<R: Read + Seek>(mut reader: R) -> io::Result<Option<Vec<u8>>> {
    let len = reader.seek(SeekFrom::End(0))?;
    if len < SUPER_TAIL_SIZE {
        return Ok(None);
    }
    let mut tail = [0; SUPER_TAIL_SIZE as usize];
    reader.seek(SeekFrom::Start(len - SUPER_TAIL_SIZE))?;
    reader.read_exact(&mut tail)?;
    let name_size = u64::from(be_u32(&tail, 0));
    let believed = (1..=SUPER_NAME_SIZE_MAX.min(len - SUPER_TAIL_SIZE)).contains(&name_size);
    if !believed || tail[8..] != JOURNAL_MAGIC {
        return Ok(None);
    }
    let mut name = vec![0; name_size as usize];
    reader.seek(SeekFrom::Start(len - SUPER_TAIL_SIZE - name_size))?;
    reader.read_exact(&mut name)?;
    Ok(name_checksums(&name).contains(&be_u32(&tail, 4)).then_some(name))
}

/// The sum of the bytes of a name: SQLite adds C's `char`, which is signed on some machines.
fn name_checksums(name: &[u8]) -> [u32; 2] {
    let signed =
        name.iter().fold(0u32, |sum, &byte| sum.wrapping_add_signed(i32::from(byte as i8)));
    let unsigned = name.iter().fold(0u32, |sum, &byte| sum.wrapping_add(u32::from(byte)));
    [signed, unsigned]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Cursor;

    use super::*;

    /// A database and its journal in the middle of a transaction that has spilled, and the database
    /// as it was before.
    struct Hot {
        before: Vec<u8>,
        during: Vec<u8>,
        journal: Vec<u8>,
    }

    fn hot(page_size: u32, pragmas: &str) -> Hot {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let db = rusqlite::Connection::open(&path).unwrap();
        db.execute_batch(&format!(
            "PRAGMA page_size={page_size}; PRAGMA cache_size=5; {pragmas}
             CREATE TABLE t(a INTEGER PRIMARY KEY, b);
             WITH RECURSIVE s(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM s WHERE i<60)
             INSERT INTO t SELECT i, randomblob({page_size}) FROM s;"
        ))
        .unwrap();
        let before = std::fs::read(&path).unwrap();
        // The cache is too small for the transaction: pages spill, each time after a sync that ends
        // a segment.
        db.execute_batch(&format!(
            "BEGIN; UPDATE t SET b=randomblob({page_size}) WHERE a<30;
             INSERT INTO t(b) SELECT b FROM t;
             UPDATE t SET b=randomblob({page_size}) WHERE a>30;"
        ))
        .unwrap();
        let during = std::fs::read(&path).unwrap();
        let journal = std::fs::read(dir.path().join("db-journal")).unwrap();
        Hot { before, during, journal }
    }

    fn roll_back(hot: &Hot) -> (Vec<u8>, usize) {
        let mut database = hot.during.clone();
        let mut journal = JournalReader::open(Cursor::new(&hot.journal), None).unwrap().unwrap();
        let header = *journal.header();
        database.resize(header.database_pages as usize * header.page_size.bytes(), 0);
        let mut records = 0;
        while let Some(record) = journal.next_record().unwrap() {
            let at = header.page_size.offset(record.pgno) as usize;
            database[at..at + record.page.len()].copy_from_slice(record.page);
            records += 1;
        }
        (database, records)
    }

    #[test]
    fn a_hot_journal_brings_the_former_database_back() {
        for page_size in [512, 4096, 65536] {
            let hot = hot(page_size, "PRAGMA synchronous=FULL;");
            assert_ne!(hot.during[..hot.before.len()], hot.before[..]);
            assert_eq!(super::page_size(&hot.journal).unwrap().get(), page_size);
            let (database, records) = roll_back(&hot);
            assert!(records > 10);
            assert!(database == hot.before, "page size {page_size}");
        }
    }

    #[test]
    fn a_journal_that_is_never_synced_runs_to_the_end_of_the_file() {
        let hot = hot(1024, "PRAGMA synchronous=OFF;");
        assert_eq!(be_u32(&hot.journal, COUNT_AT), COUNT_TO_END);
        assert!(roll_back(&hot).0 == hot.before);
    }

    #[test]
    fn sqlite_itself_rolls_back_the_same() {
        let hot = hot(1024, "PRAGMA synchronous=FULL;");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        #[expect(clippy::disallowed_methods, reason = "SQLite reads what the test lays down")]
        {
            std::fs::write(&path, &hot.during).unwrap();
            std::fs::write(dir.path().join("db-journal"), &hot.journal).unwrap();
        }
        let db = rusqlite::Connection::open(&path).unwrap();
        let rows: u32 = db.query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap();
        assert_eq!(rows, 60);
        assert!(std::fs::read(&path).unwrap() == roll_back(&hot).0);
    }

    /// A journal of one segment; its records are (page, fill byte, checksum is right).
    fn journal(count: u32, records: &[(u32, u8, bool)]) -> Vec<u8> {
        let mut bytes = JOURNAL_MAGIC.to_vec();
        for number in [count, 77, 3, 512, 512] {
            bytes.extend_from_slice(&number.to_be_bytes());
        }
        bytes.resize(512, 0);
        for &(pgno, fill, right) in records {
            let page = [fill; 512];
            bytes.extend_from_slice(&pgno.to_be_bytes());
            bytes.extend_from_slice(&page);
            let checksum = record_checksum(77, &page) ^ u32::from(!right);
            bytes.extend_from_slice(&checksum.to_be_bytes());
        }
        bytes
    }

    fn pages(journal: &[u8]) -> BTreeMap<u32, u8> {
        let mut pages = BTreeMap::new();
        let Some(mut reader) = JournalReader::open(Cursor::new(journal), None).unwrap() else {
            return pages;
        };
        while let Some(record) = reader.next_record().unwrap() {
            pages.insert(record.pgno.0, record.page[0]);
        }
        pages
    }

    #[test]
    fn a_journal_ends_at_its_first_bad_record() {
        let good = [(1, 10, true), (2, 20, true), (3, 30, true)];
        assert_eq!(pages(&journal(3, &good)), BTreeMap::from([(1, 10), (2, 20), (3, 30)]));
        assert_eq!(pages(&journal(2, &good)), BTreeMap::from([(1, 10), (2, 20)]));
        assert_eq!(pages(&journal(9, &good)), BTreeMap::from([(1, 10), (2, 20), (3, 30)]));
        assert_eq!(pages(&journal(0, &good)), BTreeMap::new());
        let whole = journal(COUNT_TO_END, &good);
        assert_eq!(pages(&whole), BTreeMap::from([(1, 10), (2, 20), (3, 30)]));
        assert_eq!(pages(&whole[..whole.len() - 1]), BTreeMap::from([(1, 10), (2, 20)]));
        let bad = [(1, 10, true), (2, 20, false), (3, 30, true)];
        assert_eq!(pages(&journal(3, &bad)), BTreeMap::from([(1, 10)]));
        let zero = [(1, 10, true), (0, 20, true), (3, 30, true)];
        assert_eq!(pages(&journal(3, &zero)), BTreeMap::from([(1, 10)]));
        let past_the_end = [(9, 10, false), (2, 20, true)];
        assert_eq!(pages(&journal(2, &past_the_end)), BTreeMap::from([(2, 20)]));
    }

    #[test]
    fn segments_follow_each_other_at_sectors() {
        let first = journal(1, &[(1, 10, true)]);
        let second = journal(COUNT_TO_END, &[(2, 20, true), (3, 30, true)]);
        let mut both = first.clone();
        both.resize(first.len().next_multiple_of(512), 0);
        both.extend_from_slice(&second);
        assert_eq!(pages(&both), BTreeMap::from([(1, 10), (2, 20), (3, 30)]));
        let unsynced = [journal(0, &[]), second].concat();
        assert_eq!(pages(&unsynced), BTreeMap::from([(2, 20), (3, 30)]));
        let mut zeroed = both.clone();
        zeroed[first.len().next_multiple_of(512)..][..8].fill(0);
        assert_eq!(pages(&zeroed), BTreeMap::from([(1, 10)]));
    }

    #[test]
    fn what_is_no_journal_rolls_nothing_back() {
        let good = journal(1, &[(1, 10, true)]);
        for len in [0, 8, HEADER_SIZE, 511] {
            assert!(JournalReader::open(Cursor::new(&good[..len]), None).unwrap().is_none());
        }
        for (at, byte) in [(0, 0), (SECTOR_SIZE_AT + 3, 1), (PAGE_SIZE_AT + 3, 1)] {
            let mut bad = good.clone();
            bad[at] = byte;
            assert!(JournalReader::open(Cursor::new(&bad), None).unwrap().is_none());
        }
        let mut unnamed = good.clone();
        unnamed[PAGE_SIZE_AT..HEADER_SIZE].fill(0);
        assert!(JournalReader::open(Cursor::new(&unnamed), None).unwrap().is_none());
        let known = PageSize::new(512);
        assert!(JournalReader::open(Cursor::new(&unnamed), known).unwrap().is_some());
    }

    #[test]
    fn a_super_journal_is_named_at_the_end() {
        let named = |name: &[u8], sum: u32| {
            let mut bytes = journal(1, &[(1, 10, true)]);
            bytes.extend_from_slice(name);
            bytes.extend_from_slice(&(name.len() as u32).to_be_bytes());
            bytes.extend_from_slice(&sum.to_be_bytes());
            bytes.extend_from_slice(&JOURNAL_MAGIC);
            super_journal(Cursor::new(&bytes)).unwrap()
        };
        let name = "/db-mjé".as_bytes();
        let [signed, unsigned] = name_checksums(name);
        assert_ne!(signed, unsigned);
        assert_eq!(named(name, signed).as_deref(), Some(name));
        assert_eq!(named(name, unsigned).as_deref(), Some(name));
        assert_eq!(named(name, unsigned + 1), None);
        assert_eq!(named(b"", 0), None);
        assert_eq!(super_journal(Cursor::new(journal(1, &[(1, 10, true)]))).unwrap(), None);
        assert_eq!(super_journal(Cursor::new(b"short")).unwrap(), None);
    }
}
