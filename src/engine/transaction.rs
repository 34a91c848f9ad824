//! A captured transaction: which pages it changed, where their images stand, and what the database's
//! checksum was before and after. It holds references to page images, not the images, so a
//! transaction of a gigabyte costs 24 bytes a page.
//!
//! Invariant: an image that a transaction refers to stays where it is until its LTX file is written.
//! In the WAL that is what the checkpoint barrier is for; a commit of a rollback journal is written
//! before it counts. Each image is checked against its checksum when it is read again.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use ltx::{Checksum, Compression, Encoder, Header, NodeId, PageSize, Pgno, Pos, Txid};

use crate::os;

/// One changed page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRef {
    /// Its number.
    pub pgno: Pgno,
    /// The checksum of its image after the transaction.
    pub sum: Checksum,
    /// Where the image stands in the source file, in bytes; [`ZERO_PAGE`] for an image of zeros.
    pub offset: u64,
}

/// The offset of an image that stands nowhere: a page inside the database that was never written.
pub const ZERO_PAGE: u64 = u64::MAX;

/// A transaction, or a contiguous range of them, with everything an LTX file says.
#[derive(Debug)]
pub struct Transaction {
    /// First and last transaction; one number unless merged.
    pub min: Txid,
    /// See `min`.
    pub max: Txid,
    /// The checksum of the database before; none for a snapshot.
    pub pre: Checksum,
    /// The checksum of the database after.
    pub post: Checksum,
    /// Bytes of a page.
    pub page_size: PageSize,
    /// Size of the database in pages afterwards.
    pub commit: u32,
    /// The changed pages, ascending, without the lock page.
    pub pages: Vec<PageRef>,
    /// The file that the offsets of `pages` are in.
    pub source: Arc<File>,
    /// When it was committed, in milliseconds since the Unix epoch.
    pub timestamp_ms: i64,
    /// The node that committed it.
    pub node_id: NodeId,
    /// Where it stood in the WAL, if it did.
    pub wal: WalSpan,
    /// The LTX file's bytes, once somebody asked for them.
    encoded: Mutex<Option<Arc<[u8]>>>,
}

/// The place of a transaction in a WAL, as LTX headers record it; zeros if it was not in one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WalSpan {
    /// Where its first frame starts, in bytes.
    pub offset: u64,
    /// The bytes of its frames.
    pub size: u64,
    /// The salts of the WAL header.
    pub salt: (u32, u32),
}

impl WalSpan {
    /// The place of all transactions from this one to `last`; nowhere if they were not in one WAL.
    fn to(&self, last: &WalSpan) -> WalSpan {
        if self.salt != last.salt || self.size == 0 || last.size == 0 {
            return WalSpan::default();
        }
        WalSpan { size: last.offset + last.size - self.offset, ..*self }
    }
}

/// Bytes of a file that are on their way to it.
#[derive(Debug, Clone, Copy)]
pub struct Overlay<'a> {
    /// Where they belong.
    pub offset: u64,
    /// The bytes.
    pub data: &'a [u8],
}

impl Overlay<'_> {
    /// No bytes.
    pub const NONE: Overlay<'static> = Overlay { offset: 0, data: &[] };

    /// Puts them into `bytes`, of which `filled` were read at `offset` of the file; how many are valid
    /// then.
    pub fn lay_over(&self, bytes: &mut [u8], offset: u64, filled: usize) -> usize {
        let start = self.offset.max(offset);
        let end = (self.offset + self.data.len() as u64).min(offset + bytes.len() as u64);
        if start >= end || start > offset + filled as u64 {
            return filled;
        }
        let (to, from) = ((start - offset) as usize, (start - self.offset) as usize);
        let len = (end - start) as usize;
        bytes[to..to + len].copy_from_slice(&self.data[from..from + len]);
        filled.max(to + len)
    }
}

/// A transaction without its numbers.
#[derive(Debug)]
pub struct Draft {
    /// Bytes of a page.
    pub page_size: PageSize,
    /// Size of the database afterwards, in pages.
    pub commit: u32,
    /// The changed pages, ascending.
    pub pages: Vec<PageRef>,
    /// Where their images are.
    pub source: Arc<File>,
    /// When it was committed, in milliseconds since the Unix epoch.
    pub timestamp_ms: i64,
    /// Who committed it.
    pub node_id: NodeId,
    /// Where it stood in the WAL.
    pub wal: WalSpan,
}

impl Transaction {
    /// A single transaction that leads from one checksum of the database to another.
    pub fn new(txid: Txid, ends: [Checksum; 2], draft: Draft) -> Transaction {
        Transaction::range([txid, txid], ends, draft)
    }

    /// All transactions from `min` to `max`.
    pub fn range([min, max]: [Txid; 2], [pre, post]: [Checksum; 2], draft: Draft) -> Transaction {
        debug_assert!(draft.pages.is_sorted_by(|a, b| a.pgno < b.pgno), "pages ascend");
        let Draft { page_size, commit, pages, source, timestamp_ms, node_id, wal } = draft;
        Transaction {
            min,
            max,
            pre,
            post,
            page_size,
            commit,
            pages,
            source,
            timestamp_ms,
            node_id,
            wal,
            encoded: Mutex::new(None),
        }
    }

    /// Makes it the snapshot of all transactions up to its own: it must hold every page.
    pub fn make_snapshot(&mut self) {
        self.min = Txid(1);
        self.pre = Checksum::NONE;
    }

    /// The position it leads to.
    pub fn pos(&self) -> Pos {
        Pos { txid: self.max, checksum: self.post }
    }

    /// About how many bytes its LTX file has, uncompressed.
    pub fn size_hint(&self) -> usize {
        ltx::HEADER_SIZE + ltx::TRAILER_SIZE + 4 + self.pages.len() * (self.page_size.bytes() + 4)
    }

    /// How many pages it changes.
    pub fn page_count(&self) -> usize {
        self.pages.len()
    }

    /// Whether `next` can be merged behind this one: the same source and page size, contiguous.
    pub fn can_merge(&self, next: &Transaction) -> bool {
        // The first file of a database stays a snapshot of one transaction, and the second one
        // something that a replica can go on from.
        // What a LiteFS node wrote itself it leaves out, whatever else is in the file.
        self.min > Txid(1)
            && self.node_id == next.node_id
            && Arc::ptr_eq(&self.source, &next.source)
            && self.page_size == next.page_size
            && self.max.next() == next.min
            && self.post == next.pre
            && self.commit > 0
            && next.commit > 0
    }

    /// One transaction with the effect of all of `parts` in order, each of which can be merged
    /// behind the one before.
    pub fn merge(parts: &[Arc<Transaction>]) -> Transaction {
        let (first, last) = (&parts[0], &parts[parts.len() - 1]);
        let mut pages: Vec<PageRef> = parts.iter().flat_map(|part| &part.pages).copied().collect();
        // The sort is stable, so that among equal numbers the latest image stands last.
        pages.sort_by_key(|page| page.pgno);
        pages.reverse();
        pages.dedup_by_key(|page| page.pgno);
        pages.reverse();
        // A page that went when the database shrank, and came back later, is in a later part.
        pages.retain(|page| page.pgno.0 <= last.commit);
        Transaction {
            min: first.min,
            max: last.max,
            pre: first.pre,
            post: last.post,
            page_size: last.page_size,
            commit: last.commit,
            pages,
            source: last.source.clone(),
            timestamp_ms: last.timestamp_ms,
            node_id: last.node_id,
            wal: first.wal.to(&last.wal),
            encoded: Mutex::new(None),
        }
    }

    /// The same without the bytes of its LTX file: some 24 bytes a page.
    pub fn without_bytes(&self) -> Transaction {
        Transaction {
            min: self.min,
            max: self.max,
            pre: self.pre,
            post: self.post,
            page_size: self.page_size,
            commit: self.commit,
            pages: self.pages.clone(),
            source: self.source.clone(),
            timestamp_ms: self.timestamp_ms,
            node_id: self.node_id,
            wal: self.wal,
            encoded: Mutex::new(None),
        }
    }

    /// The header of its LTX file.
    pub fn header(&self, compression: Compression) -> Header {
        Header {
            compression,
            page_size: self.page_size,
            commit: self.commit,
            min_txid: self.min,
            max_txid: self.max,
            timestamp_ms: self.timestamp_ms,
            pre_apply: self.pre,
            wal_offset: self.wal.offset as i64,
            wal_size: self.wal.size as i64,
            wal_salt1: self.wal.salt.0,
            wal_salt2: self.wal.salt.1,
            node_id: self.node_id,
        }
    }

    /// Writes its LTX file. An image whose checksum is not the recorded one is an error
    /// (`InvalidData`): the source was changed behind our back.
    pub fn write<W: Write>(&self, out: W, compression: Compression) -> Result<W, ltx::Error> {
        self.write_with(out, compression, &Overlay::NONE)
    }

    /// [`Transaction::write`] with bytes that the source does not have yet.
    pub fn write_with<W: Write>(
        &self,
        out: W,
        compression: Compression,
        overlay: &Overlay<'_>,
    ) -> Result<W, ltx::Error> {
        let mut encoder = Encoder::new(out, self.header(compression))?;
        let mut image = vec![0; self.page_size.bytes()];
        for page in &self.pages {
            self.read_page(page, &mut image, overlay).map_err(ltx::Error::Read)?;
            if encoder.page(page.pgno, &image)? != page.sum {
                let text = format!("page {} changed before its ltx file was written", page.pgno);
                return Err(ltx::Error::Read(io::Error::new(io::ErrorKind::InvalidData, text)));
            }
        }
        Ok(encoder.finish(self.post)?.0)
    }

    /// The bytes of its LTX file, encoded once and shared by all who ask.
    pub fn encoded(&self, compression: Compression) -> Result<Arc<[u8]>, ltx::Error> {
        let mut encoded = self.encoded.lock().unwrap();
        if let Some(bytes) = &*encoded {
            return Ok(bytes.clone());
        }
        let bytes: Arc<[u8]> =
            self.write(Vec::with_capacity(self.size_hint()), compression)?.into();
        *encoded = Some(bytes.clone());
        Ok(bytes)
    }

    /// Remembers the bytes of its LTX file, which the caller has verified.
    pub fn set_encoded(&self, bytes: Arc<[u8]>) {
        *self.encoded.lock().unwrap() = Some(bytes);
    }

    /// The bytes of its LTX file, if they are at hand.
    pub fn encoded_if_any(&self) -> Option<Arc<[u8]>> {
        self.encoded.lock().unwrap().clone()
    }

    fn read_page(&self, page: &PageRef, image: &mut [u8], overlay: &Overlay<'_>) -> io::Result<()> {
        if page.offset == ZERO_PAGE {
            image.fill(0);
            return Ok(());
        }
        let filled = os::read_up_to("read:transaction", &self.source, image, page.offset)?;
        match overlay.lay_over(image, page.offset, filled) {
            filled if filled == image.len() => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}
