//! Why bytes are not an LTX file, or pages cannot become one: one variant for each rule.

use std::io;

use crate::types::{Checksum, PageSize, Pgno, Txid};

/// What is wrong with a file, or with what was given to an encoder.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source failed; nothing is known about the bytes.
    #[error("read ltx bytes")]
    Read(#[source] io::Error),
    /// The destination failed; what stands there is not a file.
    #[error("write ltx bytes")]
    Write(#[source] io::Error),
    /// The database file that a transaction is applied to failed.
    #[error("write database pages")]
    Database(#[source] io::Error),
    /// The bytes end before the trailer does.
    #[error("ltx file too short")]
    Short,
    /// Bytes follow the trailer.
    #[error("bytes after the trailer")]
    TrailingBytes,
    /// A reader was asked for the trailer before its last page was read.
    #[error("pages left unread")]
    PagesUnread,
    /// A reader was used again after it had reported an error.
    #[error("reader used after an error")]
    AfterError,

    /// The first four bytes are not `LTX1`.
    #[error("invalid ltx magic")]
    Magic,
    /// Header flags that this format does not have.
    #[error("invalid header flags {0:#010x}")]
    Flags(u32),
    /// Not a power of two from 512 to 65536.
    #[error("invalid page size {0}")]
    PageSize(u32),
    /// The first transaction id is zero.
    #[error("minimum transaction id required")]
    MinTxid,
    /// The last transaction id is zero.
    #[error("maximum transaction id required")]
    MaxTxid,
    /// The last transaction comes before the first.
    #[error("transaction ids out of order: {min} to {max}")]
    TxidOrder {
        /// The first transaction of the header.
        min: Txid,
        /// The last transaction of the header.
        max: Txid,
    },
    /// The last transaction is one that none can follow.
    #[error("transaction id {0} is too large")]
    TxidTooLarge(Txid),
    /// The WAL offset is negative (bytes).
    #[error("negative wal offset {0}")]
    WalOffset(i64),
    /// The WAL size is negative (bytes).
    #[error("negative wal size {0}")]
    WalSize(i64),
    /// A WAL size or salt without a WAL offset.
    #[error("wal offset required")]
    WalOffsetMissing,
    /// A WAL offset or salt without a WAL size.
    #[error("wal size required")]
    WalSizeMissing,
    /// A snapshot names a state before it.
    #[error("pre-apply checksum must be zero on snapshots")]
    PreApplyOnSnapshot,
    /// A transaction does not name the state before it.
    #[error("pre-apply checksum required")]
    PreApplyRequired,
    /// The pre-apply checksum lacks the flag bit.
    #[error("invalid pre-apply checksum format")]
    PreApplyFormat,
    /// The flag "no checksums" together with a pre-apply checksum.
    #[error("pre-apply checksum not allowed")]
    PreApplyNotAllowed,

    /// Page number zero.
    #[error("page number required")]
    PageNumber,
    /// A page past the size of the database.
    #[error("page {pgno} past commit {commit}")]
    PageBounds {
        /// The page.
        pgno: Pgno,
        /// The size of the database after the transaction, in pages.
        commit: u32,
    },
    /// A buffer that does not hold exactly one page.
    #[error("page buffer of {got} bytes for pages of {expected}")]
    PageBuffer {
        /// The page size.
        expected: PageSize,
        /// The size of the buffer in bytes.
        got: usize,
    },
    /// The page of SQLite's lock bytes.
    #[error("lock page {0} in ltx file")]
    LockPage(Pgno),
    /// A snapshot that starts with another page than 1.
    #[error("snapshot starts with page {0}")]
    SnapshotStart(Pgno),
    /// A snapshot that leaves out a page.
    #[error("page {pgno} after {previous} in snapshot")]
    SnapshotOrder {
        /// The page before it in the file.
        previous: Pgno,
        /// The page.
        pgno: Pgno,
    },
    /// A snapshot that ends before its last page.
    #[error("snapshot ends at page {last} of {commit}")]
    SnapshotIncomplete {
        /// The last page in the file; zero if there is none.
        last: u32,
        /// The size of the database, in pages.
        commit: u32,
    },
    /// A page that does not come after the one before it.
    #[error("page {pgno} out of order after {previous}")]
    PageOrder {
        /// The page before it in the file.
        previous: Pgno,
        /// The page.
        pgno: Pgno,
    },
    /// Page header flags that the format does not have (format v3).
    #[error("invalid page header flags {0:#06x}")]
    PageFlags(u16),
    /// The size field of a page is larger than any compressed page (format v3), in bytes.
    #[error("compressed page of {0} bytes")]
    PageSizeField(u32),

    /// No post-apply checksum.
    #[error("post-apply checksum required")]
    PostApplyRequired,
    /// The post-apply checksum lacks the flag bit.
    #[error("invalid post-apply checksum format")]
    PostApplyFormat,
    /// A deletion whose post-apply checksum is not that of an empty database.
    #[error("post-apply checksum must be empty for a deleted database")]
    PostApplyNotEmpty,
    /// The flag "no checksums" together with a post-apply checksum.
    #[error("post-apply checksum not allowed")]
    PostApplyNotAllowed,
    /// No file checksum.
    #[error("file checksum required")]
    FileChecksumRequired,
    /// The file checksum lacks the flag bit.
    #[error("invalid file checksum format")]
    FileChecksumFormat,
    /// The file is not what its writer wrote.
    #[error("file checksum mismatch: {found} in the file, {computed} of its bytes")]
    FileChecksum {
        /// The checksum in the trailer.
        found: Checksum,
        /// The checksum of the bytes.
        computed: Checksum,
    },
    /// A snapshot whose pages do not have the checksum that it promises.
    #[error("snapshot checksum mismatch: {found} in the file, {computed} of its pages")]
    SnapshotChecksum {
        /// The post-apply checksum in the trailer, or given to the encoder.
        found: Checksum,
        /// The rolling checksum of the pages.
        computed: Checksum,
    },

    /// No LZ4 frame where there must be one, or a kind of frame that is not supported.
    #[error("invalid lz4 frame header")]
    Lz4Header,
    /// The header of an LZ4 frame does not have its checksum.
    #[error("lz4 frame header checksum mismatch")]
    Lz4HeaderChecksum,
    /// A block of an LZ4 frame is larger than the frame allows, or cannot be decompressed.
    #[error("invalid lz4 block")]
    Lz4Block,
    /// A block of an LZ4 frame does not have its checksum.
    #[error("lz4 block checksum mismatch")]
    Lz4BlockChecksum,
    /// The content of an LZ4 frame does not have its checksum.
    #[error("lz4 content checksum mismatch")]
    Lz4ContentChecksum,
    /// The content of an LZ4 frame does not have the size that the frame promises.
    #[error("lz4 content size mismatch")]
    Lz4ContentSize,
    /// An LZ4 frame ends before, or goes on after, what it must hold.
    #[error("lz4 frame end expected")]
    Lz4End,

    /// The page index does not say where the pages stand (formats v2 and v3).
    #[error("page index does not match the pages")]
    Index,
    /// Bytes that are no known variant of the format.
    #[error("unknown ltx variant")]
    Variant,
    /// A snapshot was needed.
    #[error("not a snapshot: starts at {0}")]
    NotSnapshot(Txid),

    /// Nothing to compact.
    #[error("no ltx files to compact")]
    CompactNothing,
    /// Files of different page sizes do not belong to one database.
    #[error("mismatched page sizes: {0} and {1}")]
    CompactPageSize(PageSize, PageSize),
    /// A gap between two files, or an overlap.
    #[error("non-contiguous transaction ids: {next} after {previous}")]
    CompactGap {
        /// The last transaction of a file.
        previous: Txid,
        /// The first transaction of the file after it.
        next: Txid,
    },
    /// Two neighbouring files that do not agree on the state between them.
    #[error("chain broken after {txid}: {post} there, {pre} expected next")]
    CompactChain {
        /// The last transaction of the earlier file.
        txid: Txid,
        /// The state that the earlier file leaves.
        post: Checksum,
        /// The state that the later file was made on.
        pre: Checksum,
    },
}

impl Error {
    /// A failed read; a source that ends too early is [`Error::Short`].
    pub(crate) fn read(error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::Short,
            _ => Error::Read(error),
        }
    }
}
