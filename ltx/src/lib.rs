//! The LTX file format: the pages that a transaction (or a range of them) changed in one SQLite
//! database, with the checksums that prove what it was applied to and what came out.
//!
//! ```text
//! header, 100 bytes | page block: (page number, page)..., end mark | trailer, 16 bytes
//! ```
//!
//! [`Encoder`] and [`Decoder`] are the format that LiteFS 0.5 writes and reads, with the page block
//! raw or as one LZ4 frame; [`AnyReader`] reads that and the formats that came later. Nothing here
//! opens a file: everything goes through `Read` and `Write`.
//!
//! Invariant: no number that a file holds sizes an allocation before it was checked, and no bytes,
//! however broken, make a reader panic.

mod types;

mod checksum;
mod error;
mod header;
mod order;

mod decoder;
mod encoder;
mod frame;

mod apply;
mod compact;
mod file_name;
mod newer;

pub use apply::{SetLen, apply, materialize};
pub use checksum::{page_checksum, page_checksums};
pub use compact::compact;
pub use decoder::{Decoder, verify};
pub use encoder::Encoder;
pub use error::Error;
pub use file_name::{file_name, parse_file_name};
pub use header::{Compression, HEADER_SIZE, Header, TRAILER_SIZE, Trailer};
pub use newer::{AnyReader, Variant};
pub use types::{
    CHECKSUM_FLAG, Checksum, NodeId, PENDING_BYTE, PageSize, ParseError, Pgno, Pos, Txid,
};
