//! The fixed parts of a file: the header, its first 100 bytes, and the trailer, its last 16.
//! All integers are big-endian.
//!
//! ```text
//! header:   0 magic "LTX1"    4 flags         8 page size    12 commit
//!          16 first TXID     24 last TXID    32 time (ms)    40 pre-apply checksum
//!          48 WAL offset     56 WAL size     64 WAL salt 1   68 WAL salt 2
//!          72 node id        80 zeros, 20
//! trailer:  0 post-apply checksum             8 file checksum
//! ```

use crate::error::Error;
use crate::types::{Checksum, NodeId, PageSize, Pos, Txid};

/// The size of a header in bytes.
pub const HEADER_SIZE: usize = 100;
/// The size of a trailer in bytes.
pub const TRAILER_SIZE: usize = 16;

const MAGIC: [u8; 4] = *b"LTX1";
/// Header flag: the page block is an LZ4 frame (format v1).
const FLAG_LZ4: u32 = 1;
/// Header flag: there are no database checksums (ltx 0.3.15 and later).
const FLAG_NO_CHECKSUM: u32 = 2;

const FLAGS: usize = MAGIC.len();
const PAGE_SIZE: usize = FLAGS + 4;
const COMMIT: usize = PAGE_SIZE + 4;
const MIN_TXID: usize = COMMIT + 4;
const MAX_TXID: usize = MIN_TXID + 8;
const TIMESTAMP: usize = MAX_TXID + 8;
const PRE_APPLY: usize = TIMESTAMP + 8;
const WAL_OFFSET: usize = PRE_APPLY + 8;
const WAL_SIZE: usize = WAL_OFFSET + 8;
const WAL_SALT1: usize = WAL_SIZE + 8;
const WAL_SALT2: usize = WAL_SALT1 + 4;
const NODE_ID: usize = WAL_SALT2 + 4;
const RESERVED: usize = NODE_ID + 8;
const _: () = assert!(RESERVED + 20 == HEADER_SIZE);

/// How the page block is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Compression {
    /// Page after page, as they are.
    None,
    /// As one LZ4 frame. LiteFS' default.
    #[default]
    Lz4,
}

/// What a file is about: which transactions, on which state, how large the database is after them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// How the page block is stored.
    pub compression: Compression,
    /// The page size of the database.
    pub page_size: PageSize,
    /// The size of the database after the file is applied, in pages; zero deletes the database.
    pub commit: u32,
    /// The first transaction in the file.
    pub min_txid: Txid,
    /// The last transaction in the file.
    pub max_txid: Txid,
    /// When the transaction was made, in milliseconds since 1970.
    pub timestamp_ms: i64,
    /// The checksum of the database before the file is applied; none if it is a snapshot.
    pub pre_apply: Checksum,
    /// Where the transaction's frames began in the WAL, in bytes; zero if it was in no WAL.
    pub wal_offset: i64,
    /// The size of the transaction's frames in the WAL, in bytes; zero if it was in no WAL.
    pub wal_size: i64,
    /// The first salt of that WAL.
    pub wal_salt1: u32,
    /// The second salt of that WAL.
    pub wal_salt2: u32,
    /// The node that made the transaction.
    pub node_id: NodeId,
}

impl Header {
    /// Whether the file is a whole database and needs no state to be applied to.
    pub fn is_snapshot(&self) -> bool {
        self.min_txid == Txid(1)
    }

    /// The position that a database must have for the file to be applied; zero for a snapshot, which
    /// may be applied anywhere.
    pub fn pre_pos(&self) -> Pos {
        match self.is_snapshot() {
            true => Pos::ZERO,
            false => Pos { txid: self.min_txid.previous(), checksum: self.pre_apply },
        }
    }

    /// Checks the rules of format v1 (ltx 0.3.14, the strictest).
    pub fn validate(&self) -> Result<(), Error> {
        self.validate_numbers()?;
        match (self.wal_offset, self.wal_size, self.wal_salt1 | self.wal_salt2) {
            (0, 0, 0) => {}
            (0, _, _) => return Err(Error::WalOffsetMissing),
            (_, 0, _) => return Err(Error::WalSizeMissing),
            _ => {}
        }
        self.validate_pre_apply()
    }

    /// Checks the rules of ltx 0.3.15 and later: a WAL size may be missing, and so may checksums.
    pub(crate) fn validate_later(&self, checksums: Checksums) -> Result<(), Error> {
        self.validate_numbers()?;
        if self.wal_offset == 0 && (self.wal_size, self.wal_salt1, self.wal_salt2) != (0, 0, 0) {
            return Err(Error::WalOffsetMissing);
        }
        match checksums {
            Checksums::Present => self.validate_pre_apply(),
            Checksums::Absent if self.pre_apply.is_none() => Ok(()),
            Checksums::Absent => Err(Error::PreApplyNotAllowed),
        }
    }

    fn validate_numbers(&self) -> Result<(), Error> {
        let (min, max) = (self.min_txid, self.max_txid);
        match () {
            () if min.is_zero() => Err(Error::MinTxid),
            () if max.is_zero() => Err(Error::MaxTxid),
            () if min > max => Err(Error::TxidOrder { min, max }),
            () if max > Txid::MAX => Err(Error::TxidTooLarge(max)),
            () if self.wal_offset < 0 => Err(Error::WalOffset(self.wal_offset)),
            () if self.wal_size < 0 => Err(Error::WalSize(self.wal_size)),
            () => Ok(()),
        }
    }

    fn validate_pre_apply(&self) -> Result<(), Error> {
        match (self.is_snapshot(), self.pre_apply.is_none()) {
            (true, false) => Err(Error::PreApplyOnSnapshot),
            (false, true) => Err(Error::PreApplyRequired),
            _ => Ok(()),
        }
    }

    /// The bytes of the header, whatever is in it: see [`Header::validate`].
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let flags = match self.compression {
            Compression::None => 0,
            Compression::Lz4 => FLAG_LZ4,
        };
        let mut bytes = [0; HEADER_SIZE];
        bytes[..FLAGS].copy_from_slice(&MAGIC);
        put32(&mut bytes, FLAGS, flags);
        put32(&mut bytes, PAGE_SIZE, self.page_size.get());
        put32(&mut bytes, COMMIT, self.commit);
        put64(&mut bytes, MIN_TXID, self.min_txid.0);
        put64(&mut bytes, MAX_TXID, self.max_txid.0);
        put64(&mut bytes, TIMESTAMP, self.timestamp_ms as u64);
        put64(&mut bytes, PRE_APPLY, self.pre_apply.get());
        put64(&mut bytes, WAL_OFFSET, self.wal_offset as u64);
        put64(&mut bytes, WAL_SIZE, self.wal_size as u64);
        put32(&mut bytes, WAL_SALT1, self.wal_salt1);
        put32(&mut bytes, WAL_SALT2, self.wal_salt2);
        put64(&mut bytes, NODE_ID, self.node_id.0);
        bytes
    }

    /// The header in `bytes`, valid for format v1.
    pub fn decode(bytes: &[u8; HEADER_SIZE]) -> Result<Header, Error> {
        let flags = flags(bytes)?;
        if flags & !FLAG_LZ4 != 0 {
            return Err(Error::Flags(flags));
        }
        let header = Header::fields(bytes, flags)?;
        header.validate()?;
        Ok(header)
    }

    /// The header in `bytes`, valid for ltx 0.3.15 and later, and whether the file has checksums.
    pub(crate) fn decode_later(bytes: &[u8; HEADER_SIZE]) -> Result<(Header, Checksums), Error> {
        let flags = flags(bytes)?;
        if flags & !(FLAG_LZ4 | FLAG_NO_CHECKSUM) != 0 {
            return Err(Error::Flags(flags));
        }
        let checksums = match flags & FLAG_NO_CHECKSUM {
            0 => Checksums::Present,
            _ => Checksums::Absent,
        };
        let header = Header::fields(bytes, flags)?;
        header.validate_later(checksums)?;
        Ok((header, checksums))
    }

    fn fields(bytes: &[u8; HEADER_SIZE], flags: u32) -> Result<Header, Error> {
        let page_size = get32(bytes, PAGE_SIZE);
        Ok(Header {
            compression: match flags & FLAG_LZ4 {
                0 => Compression::None,
                _ => Compression::Lz4,
            },
            page_size: PageSize::new(page_size).ok_or(Error::PageSize(page_size))?,
            commit: get32(bytes, COMMIT),
            min_txid: Txid(get64(bytes, MIN_TXID)),
            max_txid: Txid(get64(bytes, MAX_TXID)),
            timestamp_ms: get64(bytes, TIMESTAMP) as i64,
            pre_apply: Checksum::from_raw(get64(bytes, PRE_APPLY)).ok_or(Error::PreApplyFormat)?,
            wal_offset: get64(bytes, WAL_OFFSET) as i64,
            wal_size: get64(bytes, WAL_SIZE) as i64,
            wal_salt1: get32(bytes, WAL_SALT1),
            wal_salt2: get32(bytes, WAL_SALT2),
            node_id: NodeId(get64(bytes, NODE_ID)),
        })
    }
}

/// Whether a file carries database checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Checksums {
    Present,
    Absent,
}

/// What proves a file: the state after it, and that its bytes are those that were written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trailer {
    /// The checksum of the database after the file is applied.
    pub post_apply: Checksum,
    /// The checksum of the file itself, its page block uncompressed.
    pub file_checksum: Checksum,
}

impl Trailer {
    /// The bytes of the trailer.
    pub fn encode(&self) -> [u8; TRAILER_SIZE] {
        let mut bytes = [0; TRAILER_SIZE];
        put64(&mut bytes, 0, self.post_apply.get());
        put64(&mut bytes, 8, self.file_checksum.get());
        bytes
    }

    /// The trailer in `bytes`, valid for a file that leaves `commit` pages.
    pub fn decode(bytes: &[u8; TRAILER_SIZE], commit: u32) -> Result<Trailer, Error> {
        let trailer = Trailer::fields(bytes)?;
        validate_post_apply(trailer.post_apply, commit)?;
        Ok(trailer)
    }

    /// The trailer in `bytes` of a file without database checksums.
    pub(crate) fn decode_unchecked(bytes: &[u8; TRAILER_SIZE]) -> Result<Trailer, Error> {
        let trailer = Trailer::fields(bytes)?;
        match trailer.post_apply.is_none() {
            true => Ok(trailer),
            false => Err(Error::PostApplyNotAllowed),
        }
    }

    fn fields(bytes: &[u8; TRAILER_SIZE]) -> Result<Trailer, Error> {
        let file_checksum = Checksum::from_raw(get64(bytes, 8)).ok_or(Error::FileChecksumFormat)?;
        if file_checksum.is_none() {
            return Err(Error::FileChecksumRequired);
        }
        let post_apply = Checksum::from_raw(get64(bytes, 0)).ok_or(Error::PostApplyFormat)?;
        Ok(Trailer { post_apply, file_checksum })
    }
}

/// Checks a post-apply checksum for a file that leaves `commit` pages.
pub(crate) fn validate_post_apply(post_apply: Checksum, commit: u32) -> Result<(), Error> {
    match () {
        () if post_apply.is_none() => Err(Error::PostApplyRequired),
        () if commit == 0 && post_apply != Checksum::EMPTY => Err(Error::PostApplyNotEmpty),
        () => Ok(()),
    }
}

/// The flags of a header, once its magic is checked.
fn flags(bytes: &[u8; HEADER_SIZE]) -> Result<u32, Error> {
    match bytes[..FLAGS] == MAGIC {
        true => Ok(get32(bytes, FLAGS)),
        false => Err(Error::Magic),
    }
}

fn get32<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    bytes[at..at + 4].iter().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn get64<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    bytes[at..at + 8].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}
