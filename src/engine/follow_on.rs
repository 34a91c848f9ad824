//! What a peer that stands at a position needs next: the next LTX file, or the whole database.

use std::fs::File;
use std::io::BufReader;
use std::sync::Arc;

use ltx::{Header, NodeId, Pos, Trailer, Txid};

use super::chain::{LtxFile, Successor};
use super::db::Db;
use super::error::{Result, chain_text};
use super::transaction::Transaction;
use crate::{limits, os};

/// The bytes of an LTX file.
pub enum LtxBytes {
    /// In memory, shared by all who send them.
    Memory(Arc<[u8]>),
    /// In a file of so many bytes, to be read from its start.
    File(File, u64),
}

/// What follows on a position.
pub enum Next {
    /// Nothing: it is the present one.
    Current,
    /// An LTX file, which was verified, and the position it leads to.
    Ltx {
        /// The file.
        bytes: LtxBytes,
        /// Where it leads to.
        pos: Pos,
        /// The node that committed what is in it.
        author: NodeId,
    },
    /// Only the whole database helps.
    Snapshot,
}

/// What a peer accepts besides a file that starts right behind its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlap {
    /// Nothing (LiteFS).
    Refused,
    /// A file of several transactions that has its position inside: the images are those after the last of
    /// them, so it leads to the same state. The position must be known to be one of these; a peer with
    /// another history at that number would lose it.
    Accepted,
}

impl Db {
    /// What a peer at `pos` needs next. A position that is not one of this database's history, or of
    /// which the chain does not know any more, needs a snapshot; so does one whose file is damaged.
    /// Blocks while a transaction that is not small is written to its file.
    pub fn next_after(&self, pos: Pos, overlap: Overlap) -> Next {
        let present = self.pos();
        if pos == present || present.is_zero() {
            return Next::Current;
        }
        if pos.is_zero() || pos.txid >= present.txid {
            return Next::Snapshot;
        }
        match self.successor(pos) {
            Ok(Successor::Recent(transaction)) => self.recent(pos, &transaction, overlap),
            Ok(Successor::File(file, info)) => self.filed(pos, file, info, overlap),
            Ok(Successor::Gone | Successor::Queued) => Next::Snapshot,
            Err(error) => {
                tracing::error!(db = %self.name, %pos, error = chain_text(&error), "find ltx file");
                Next::Snapshot
            }
        }
    }

    /// What contains the transaction after `pos`, written to its file if need be.
    pub(super) fn successor(&self, pos: Pos) -> Result<Successor> {
        match self.chain.successor(pos)? {
            Successor::Queued => {
                self.chain.flush()?;
                self.chain.file_after(pos)
            }
            found => Ok(found),
        }
    }

    fn recent(&self, pos: Pos, transaction: &Transaction, overlap: Overlap) -> Next {
        if transaction.pre != pos.checksum {
            return Next::Snapshot;
        }
        match transaction.encoded(self.shared.compression) {
            Ok(bytes) => Next::Ltx {
                bytes: LtxBytes::Memory(bytes),
                pos: transaction.pos(),
                author: transaction.node_id,
            },
            // Its frames were overwritten since; then its file is durable.
            Err(_) => match self.chain.file_after(pos) {
                Ok(Successor::File(file, info)) => self.filed(pos, file, info, overlap),
                _ => Next::Snapshot,
            },
        }
    }

    /// Whether a peer at `pos` must be taken to have a history of its own: it is ahead of this database, or the
    /// chain has the transaction after `pos`, and nothing shows that it follows on `pos`. Where nobody knows what lies
    /// inside a file of several transactions that may be too much said, and is the safe answer: only a snapshot helps
    /// that peer, and it keeps what that replaces. Of what is too old, or lies within a snapshot, nothing is
    /// known: no. Blocks as [`Db::next_after`].
    pub fn contradicts(&self, pos: Pos) -> bool {
        let present = self.pos();
        if pos.is_zero() || pos == present {
            return false;
        }
        if pos.txid >= present.txid {
            return true;
        }
        match self.successor(pos) {
            Ok(Successor::Recent(transaction)) => transaction.pre != pos.checksum,
            Ok(Successor::File(file, info)) if info.min > Txid(1) => {
                verified(&file).is_ok_and(|(header, trailer)| {
                    let ends = [header.pre_apply, trailer.post_apply];
                    header.pre_pos() != pos && !self.chain.is_inside(pos, &info, ends)
                })
            }
            _ => false,
        }
    }

    fn filed(&self, pos: Pos, file: File, info: LtxFile, overlap: Overlap) -> Next {
        if info.min == Txid(1) {
            return Next::Snapshot;
        }
        let (header, trailer) = match verified(&file) {
            Ok(verified) => verified,
            Err(error) => {
                let path = self.dir.ltx_file(info.min, info.max);
                tracing::error!(db = %self.name, path = %path.display(), error = chain_text(&error), "ltx file is damaged: sending a snapshot instead");
                return Next::Snapshot;
            }
        };
        let exact = header.pre_pos() == pos;
        let ends = [header.pre_apply, trailer.post_apply];
        let inside =
            overlap == Overlap::Accepted && !exact && self.chain.is_inside(pos, &info, ends);
        if !exact && !inside {
            return Next::Snapshot;
        }
        let pos = Pos { txid: header.max_txid, checksum: trailer.post_apply };
        Next::Ltx { bytes: LtxBytes::File(file, info.size), pos, author: header.node_id }
    }
}

/// The ends of an LTX file, if it is whole.
pub(super) fn verified(file: &File) -> Result<(Header, Trailer), ltx::Error> {
    ltx::verify(BufReader::with_capacity(
        limits::IO_BUFFER,
        os::FileCursor::new("read:follow-on", file),
    ))
}
