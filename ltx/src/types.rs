//! The numbers of the LTX format as types: checked when made, trusted afterwards.
//!
//! Text forms (ltx format, section 2.4): a TXID and a checksum are 16 lower-case hex digits, a
//! position is `TXID/CHECKSUM`, a node id 16 upper-case hex digits.

use std::fmt;
use std::str::FromStr;

/// The top bit, set in every checksum so that none is ever zero.
pub const CHECKSUM_FLAG: u64 = 1 << 63;

/// The byte of a database at which SQLite keeps its locks; its page is never used.
/// (SQLite file format, section 1.4.)
pub const PENDING_BYTE: u64 = 0x4000_0000;

/// A text that is not the text form of the type asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Not a TXID of 16 hex digits.
    #[error("invalid txid")]
    Txid,
    /// Not a checksum of 16 hex digits.
    #[error("invalid checksum")]
    Checksum,
    /// Not a position of 33 characters.
    #[error("invalid position")]
    Pos,
    /// Not a node id of hex digits.
    #[error("invalid node id")]
    NodeId,
}

/// The number of a transaction of one database. Zero means "none yet".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Txid(pub u64);

impl Txid {
    /// The last one that a file may lead to. No database comes near to it, and what follows on it can be
    /// counted.
    pub const MAX: Txid = Txid(u64::MAX / 2);

    /// The transaction after this one.
    pub fn next(self) -> Txid {
        Txid(self.0.checked_add(1).expect("2^64 transactions take longer than the sun lasts"))
    }

    /// The transaction before this one; the one before the first is zero.
    pub fn previous(self) -> Txid {
        Txid(self.0.saturating_sub(1))
    }

    /// Whether there is no transaction yet.
    pub fn is_zero(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for Txid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for Txid {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Txid, ParseError> {
        hex16(text).map(Txid).ok_or(ParseError::Txid)
    }
}

/// A 1-based number of a SQLite page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pgno(pub u32);

impl fmt::Display for Pgno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A SQLite page size: a power of two from 512 to 65536 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageSize(u32);

impl PageSize {
    /// The smallest page, in bytes.
    pub const MIN: PageSize = PageSize(512);
    /// The largest page, in bytes.
    pub const MAX: PageSize = PageSize(65536);

    /// `bytes` as a page size; `None` unless it is a power of two from 512 to 65536.
    pub fn new(bytes: u32) -> Option<PageSize> {
        (bytes.is_power_of_two() && (512..=65536).contains(&bytes)).then_some(PageSize(bytes))
    }

    /// The size in bytes.
    pub fn bytes(self) -> usize {
        self.0 as usize
    }

    /// The size in bytes, as stored in LTX headers, WAL headers and journals.
    pub fn get(self) -> u32 {
        self.0
    }

    /// The page that holds SQLite's lock bytes, which is in no LTX file and in no checksum.
    pub fn lock_pgno(self) -> Pgno {
        Pgno((PENDING_BYTE / u64::from(self.0)) as u32 + 1)
    }

    /// Where page `pgno` starts in a database file, in bytes.
    pub fn offset(self, pgno: Pgno) -> u64 {
        debug_assert!(pgno.0 > 0, "page numbers start at 1");
        (u64::from(pgno.0) - 1) * u64::from(self.0)
    }

    /// The page that holds byte `offset` of a database file; `None` past the last page number.
    pub fn pgno_at(self, offset: u64) -> Option<Pgno> {
        u32::try_from(offset / u64::from(self.0)).ok()?.checked_add(1).map(Pgno)
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A checksum with its flag bit, or [`Checksum::NONE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Checksum(u64);

impl Checksum {
    /// Zero: "there is no checksum".
    pub const NONE: Checksum = Checksum(0);
    /// The checksum of an empty (or deleted) database.
    pub const EMPTY: Checksum = Checksum(CHECKSUM_FLAG);

    /// `value` with the flag bit set.
    pub fn flagged(value: u64) -> Checksum {
        Checksum(value | CHECKSUM_FLAG)
    }

    /// `value` as read from a file or a peer; `None` if it is neither zero nor flagged.
    pub fn from_raw(value: u64) -> Option<Checksum> {
        (value == 0 || value & CHECKSUM_FLAG != 0).then_some(Checksum(value))
    }

    /// The 64 bits as stored.
    pub fn get(self) -> u64 {
        self.0
    }

    /// Whether there is no checksum.
    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    /// A rolling checksum with one page checksum put in or taken out (the same operation).
    #[must_use]
    pub fn toggle(self, page: Checksum) -> Checksum {
        Checksum::flagged(self.0 ^ page.0)
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for Checksum {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Checksum, ParseError> {
        hex16(text).map(Checksum).ok_or(ParseError::Checksum)
    }
}

/// Where a database stands: its last transaction and its rolling checksum after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Pos {
    /// The last transaction; zero if there is none.
    pub txid: Txid,
    /// The rolling checksum of the database after it; none if there is no transaction.
    pub checksum: Checksum,
}

impl Pos {
    /// The position before the first transaction.
    pub const ZERO: Pos = Pos { txid: Txid(0), checksum: Checksum::NONE };

    /// Whether there is no transaction yet.
    pub fn is_zero(self) -> bool {
        self == Pos::ZERO
    }
}

impl fmt::Display for Pos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.txid, self.checksum)
    }
}

impl FromStr for Pos {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Pos, ParseError> {
        if text.len() != 33 || !text.is_ascii() || text.as_bytes()[16] != b'/' {
            return Err(ParseError::Pos);
        }
        Ok(Pos { txid: text[..16].parse()?, checksum: text[17..].parse()? })
    }
}

/// The id of a node, drawn anew at each start of its process; zero means "unset".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct NodeId(pub u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016X}", self.0)
    }
}

impl FromStr for NodeId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<NodeId, ParseError> {
        let hex = !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
        hex.then(|| u64::from_str_radix(text, 16).ok())
            .flatten()
            .map(NodeId)
            .ok_or(ParseError::NodeId)
    }
}

fn hex16(text: &str) -> Option<u64> {
    if text.len() != 16 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(text, 16).ok()
}
