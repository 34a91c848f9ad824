//! The header of a database file: the first 100 bytes of page 1.
//!
//! ```text
//!   0  16  "SQLite format 3\0"
//!  16   2  page size; 1 means 65536
//!  18   1  write version: 1 rollback journal, 2 WAL
//!  19   1  read version: likewise
//!  24   4  change counter
//!  28   4  size in pages, valid only under the rule of `page_count`
//!  40   4  schema cookie
//!  92   4  the change counter for which the size in pages is valid
//! ```
//!
//! All numbers are big-endian. (Database File Format, section 1.3.)

use ltx::PageSize;

use super::{be_u32, put_be_u32};

/// The first bytes of every database.
pub const MAGIC: &[u8; 16] = b"SQLite format 3\0";

const PAGE_SIZE_AT: usize = MAGIC.len();
const WRITE_VERSION_AT: usize = PAGE_SIZE_AT + 2;
const READ_VERSION_AT: usize = WRITE_VERSION_AT + 1;
const CHANGE_COUNTER_AT: usize = 24;
const PAGE_COUNT_AT: usize = CHANGE_COUNTER_AT + 4;
const SCHEMA_COOKIE_AT: usize = 40;
const VALID_FOR_AT: usize = 92;

/// The length of the header in bytes.
pub const HEADER_SIZE: usize = 100;

/// The version number that stands for "WAL" in bytes 18 and 19.
const VERSION_WAL: u8 = 2;

/// How a database protects its transactions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum JournalMode {
    /// A rollback journal (DELETE, TRUNCATE, PERSIST).
    #[default]
    Rollback,
    /// A write-ahead log.
    Wal,
}

/// Why bytes are not the header of a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Fewer than [`HEADER_SIZE`] bytes.
    #[error("database header too short")]
    Short,
    /// The magic is missing.
    #[error("not a sqlite database")]
    Magic,
    /// The page size is no power of two from 512 to 65536.
    #[error("invalid page size in database header")]
    PageSize,
}

/// What the header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatabaseHeader {
    /// The size of a page.
    pub page_size: PageSize,
    /// WAL if both version bytes say so.
    pub journal_mode: JournalMode,
    /// Incremented by each transaction of the rollback mode.
    pub change_counter: u32,
    /// The size in pages as written; see [`DatabaseHeader::page_count`].
    pub page_count_raw: u32,
    /// Incremented whenever the schema changes.
    pub schema_cookie: u32,
    /// The change counter at the time when the size in pages was written.
    pub version_valid_for: u32,
}

impl DatabaseHeader {
    /// Reads the header from the start of page 1.
    pub fn parse(page: &[u8]) -> Result<DatabaseHeader, HeaderError> {
        if page.len() < HEADER_SIZE {
            return Err(HeaderError::Short);
        }
        if !page.starts_with(MAGIC) {
            return Err(HeaderError::Magic);
        }
        Ok(DatabaseHeader {
            page_size: page_size(page).ok_or(HeaderError::PageSize)?,
            journal_mode: journal_mode(page),
            change_counter: be_u32(page, CHANGE_COUNTER_AT),
            page_count_raw: be_u32(page, PAGE_COUNT_AT),
            schema_cookie: be_u32(page, SCHEMA_COOKIE_AT),
            version_valid_for: be_u32(page, VALID_FOR_AT),
        })
    }

    /// The size in pages, or `None` if a program older than SQLite 3.7.0 wrote last and left it
    /// stale: it is valid only if it is not zero and the change counter equals the counter for
    /// which it was written. (Database File Format, section 1.3.7.)
    pub fn page_count(&self) -> Option<u32> {
        let valid = self.page_count_raw > 0 && self.change_counter == self.version_valid_for;
        valid.then_some(self.page_count_raw)
    }

    /// The size in pages, taken from the file's length in bytes where the header has none. A
    /// partial page at the end does not count; `None` past the last page number.
    pub fn page_count_or_len(&self, file_len: u64) -> Option<u32> {
        let by_len = || u32::try_from(file_len / u64::from(self.page_size.get())).ok();
        self.page_count().or_else(by_len)
    }
}

/// Puts a change counter (with its "valid for", and so the size in pages for which it is) and a schema
/// cookie into page 1, so that every cache of the former content is dropped; the caller has parsed the header
/// of `page`.
pub fn set_counters(page: &mut [u8], change_counter: u32, schema_cookie: u32, pages: u32) {
    put_be_u32(page, PAGE_COUNT_AT, pages);
    put_be_u32(page, CHANGE_COUNTER_AT, change_counter);
    put_be_u32(page, VALID_FOR_AT, change_counter);
    put_be_u32(page, SCHEMA_COOKIE_AT, schema_cookie);
}

/// Has page 1 say that the journal mode is WAL; the caller has parsed the header of `page`.
pub fn set_wal(page: &mut [u8]) {
    page[WRITE_VERSION_AT] = VERSION_WAL;
    page[READ_VERSION_AT] = VERSION_WAL;
}

fn page_size(page: &[u8]) -> Option<PageSize> {
    match u16::from_be_bytes([page[PAGE_SIZE_AT], page[PAGE_SIZE_AT + 1]]) {
        1 => Some(PageSize::MAX),
        bytes => PageSize::new(u32::from(bytes)),
    }
}

fn journal_mode(page: &[u8]) -> JournalMode {
    match (page[WRITE_VERSION_AT], page[READ_VERSION_AT]) {
        (VERSION_WAL, VERSION_WAL) => JournalMode::Wal,
        _ => JournalMode::Rollback,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(pragmas: &str) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let db = rusqlite::Connection::open(&path).unwrap();
        db.execute_batch(&format!("{pragmas}; CREATE TABLE t(x); CREATE TABLE u(x);")).unwrap();
        db.close().unwrap();
        std::fs::read(&path).unwrap()
    }

    #[track_caller]
    fn check(pragmas: &str, page_size: u32, mode: JournalMode) {
        let file = database(pragmas);
        let header = DatabaseHeader::parse(&file).unwrap();
        assert_eq!(header.page_size.get(), page_size);
        assert_eq!(header.journal_mode, mode);
        assert_eq!(header.page_count(), Some(3));
        assert_eq!(header.schema_cookie, 2);
        assert_eq!(file.len() as u64, 3 * u64::from(page_size));
    }

    #[test]
    fn real_headers_are_understood() {
        check("PRAGMA page_size=512", 512, JournalMode::Rollback);
        check("PRAGMA page_size=4096; PRAGMA journal_mode=WAL", 4096, JournalMode::Wal);
        check("PRAGMA page_size=65536; PRAGMA journal_mode=WAL", 65536, JournalMode::Wal);
    }

    #[test]
    fn a_stale_page_count_gives_way_to_the_file_length() {
        let mut file = database("PRAGMA page_size=1024");
        put_be_u32(&mut file, CHANGE_COUNTER_AT, 99);
        let header = DatabaseHeader::parse(&file).unwrap();
        assert_eq!(header.page_count(), None);
        assert_eq!(header.page_count_or_len(file.len() as u64 + 5), Some(3));
        assert_eq!(header.page_count_or_len(u64::MAX), None);
    }

    #[test]
    fn new_counters_stand_in_the_page_and_make_the_page_count_valid() {
        let mut file = database("PRAGMA page_size=1024");
        // As a program older than SQLite 3.7.0 leaves it that adds a page.
        put_be_u32(&mut file, CHANGE_COUNTER_AT, 99);
        put_be_u32(&mut file, PAGE_COUNT_AT, 2);
        set_counters(&mut file, 7, 9, 3);
        let header = DatabaseHeader::parse(&file).unwrap();
        assert_eq!((header.change_counter, header.schema_cookie), (7, 9));
        assert_eq!(header.page_count(), Some(3));
    }

    #[test]
    fn other_bytes_are_refused() {
        let file = database("");
        assert_eq!(DatabaseHeader::parse(&file[..99]), Err(HeaderError::Short));
        assert_eq!(DatabaseHeader::parse(&[0; 100]), Err(HeaderError::Magic));
        let mut odd = file[..100].to_vec();
        odd[PAGE_SIZE_AT] = 3;
        assert_eq!(DatabaseHeader::parse(&odd), Err(HeaderError::PageSize));
    }
}
