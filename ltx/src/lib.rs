//! The LTX file format: the pages that a transaction (or a range of them) changed in one SQLite
//! database, with the checksums that prove what it was applied to and what came out.

mod types;

pub use types::{
    CHECKSUM_FLAG, Checksum, NodeId, PENDING_BYTE, PageSize, ParseError, Pgno, Pos, Txid,
};
