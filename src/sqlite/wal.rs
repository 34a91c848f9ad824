//! The write-ahead log: a header, then frames.
//!
//! ```text
//! header, 32 bytes                      frame header, 24 bytes, then one page
//!  0  4  0x377f0682, or ..83             0  4  page number
//!  4  4  version, 3007000                4  4  size in pages after the commit, or 0
//!  8  4  page size                       8  8  salts of the header
//! 12  4  checkpoint sequence            16  8  cumulative checksum
//! 16  8  salts
//! 24  8  checksum of bytes 0..24
//! ```
//!
//! All numbers are big-endian. The checksum runs over 32-bit words whose byte order the magic
//! names: over the header, then over the first 8 bytes and the page of each frame. A frame counts
//! if its salts are the header's and its checksum follows from all frames before it; a transaction
//! is the frames up to one with a size in pages. (WAL-mode File Format; Database File Format,
//! section 4.)

use std::io::{self, Read};

use ltx::{PageSize, Pgno};

use super::{be_u32, put_be_u32};

const MAGIC_LITTLE: u32 = 0x377f_0682;
const MAGIC_BIG: u32 = 0x377f_0683;
const VERSION: u32 = 3_007_000;

const VERSION_AT: usize = 4;
const PAGE_SIZE_AT: usize = VERSION_AT + 4;
const SEQUENCE_AT: usize = PAGE_SIZE_AT + 4;
const SALTS_AT: usize = SEQUENCE_AT + 4;
const HEADER_CHECKSUM_AT: usize = SALTS_AT + 8;

/// The length of the file's header in bytes.
pub const HEADER_SIZE: usize = HEADER_CHECKSUM_AT + 8;

const FRAME_COMMIT_AT: usize = 4;
const FRAME_SALTS_AT: usize = FRAME_COMMIT_AT + 4;
const FRAME_CHECKSUM_AT: usize = FRAME_SALTS_AT + 8;

/// The length of a frame's header in bytes.
pub const FRAME_HEADER_SIZE: usize = FRAME_CHECKSUM_AT + 8;

/// The byte order of the words that a checksum adds up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByteOrder {
    /// Least significant byte first.
    Little,
    /// Most significant byte first.
    Big,
}

impl ByteOrder {
    /// The order of this machine, in which SQLite writes a new log.
    pub const NATIVE: ByteOrder =
        if cfg!(target_endian = "big") { ByteOrder::Big } else { ByteOrder::Little };
}

/// The running checksum: two words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WalChecksum(pub u32, pub u32);

impl WalChecksum {
    /// The checksum after `bytes`, whose length is a multiple of 8.
    #[must_use]
    pub fn update(self, order: ByteOrder, bytes: &[u8]) -> WalChecksum {
        match order {
            ByteOrder::Little => self.add(bytes, u32::from_le_bytes),
            ByteOrder::Big => self.add(bytes, u32::from_be_bytes),
        }
    }

    #[inline(always)]
    fn add(self, bytes: &[u8], word: impl Fn([u8; 4]) -> u32) -> WalChecksum {
        let (pairs, rest) = bytes.as_chunks::<8>();
        debug_assert!(rest.is_empty(), "checksums run over pairs of words");
        let WalChecksum(mut s0, mut s1) = self;
        for &[a, b, c, d, e, f, g, h] in pairs {
            s0 = s0.wrapping_add(word([a, b, c, d])).wrapping_add(s1);
            s1 = s1.wrapping_add(word([e, f, g, h])).wrapping_add(s0);
        }
        WalChecksum(s0, s1)
    }

    fn read(bytes: &[u8], at: usize) -> WalChecksum {
        WalChecksum(be_u32(bytes, at), be_u32(bytes, at + 4))
    }

    fn write(self, bytes: &mut [u8], at: usize) {
        put_be_u32(bytes, at, self.0);
        put_be_u32(bytes, at + 4, self.1);
    }
}

/// The two numbers that tie frames to the header; new ones with each restart of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Salts(pub u32, pub u32);

impl Salts {
    /// The salts of the next restart: the first counts up, the second is drawn at random.
    #[must_use]
    pub fn next(self, random: u32) -> Salts {
        Salts(self.0.wrapping_add(1), random)
    }

    pub(super) fn read(bytes: &[u8], at: usize) -> Salts {
        Salts(be_u32(bytes, at), be_u32(bytes, at + 4))
    }

    pub(super) fn write(self, bytes: &mut [u8], at: usize) {
        put_be_u32(bytes, at, self.0);
        put_be_u32(bytes, at + 4, self.1);
    }
}

/// Why bytes are not the header of a log. SQLite treats such a log as empty, but for [`Self::Version`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WalHeaderError {
    /// Fewer than [`HEADER_SIZE`] bytes.
    #[error("wal header too short")]
    Short,
    /// The magic is missing.
    #[error("not a sqlite wal")]
    Magic,
    /// A version other than 3007000.
    #[error("unknown wal version")]
    Version,
    /// The page size is no power of two from 512 to 65536.
    #[error("invalid page size in wal header")]
    PageSize,
    /// The header's own checksum does not match.
    #[error("wal header checksum mismatch")]
    Checksum,
}

/// The header of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalHeader {
    /// The byte order of the checksums.
    pub order: ByteOrder,
    /// The size of a page.
    pub page_size: PageSize,
    /// How often the log was restarted.
    pub sequence: u32,
    /// The salts of its frames.
    pub salts: Salts,
}

impl WalHeader {
    /// Reads and checks the first [`HEADER_SIZE`] bytes of a log.
    pub fn parse(bytes: &[u8]) -> Result<WalHeader, WalHeaderError> {
        let bytes = bytes.get(..HEADER_SIZE).ok_or(WalHeaderError::Short)?;
        let order = match be_u32(bytes, 0) {
            MAGIC_LITTLE => ByteOrder::Little,
            MAGIC_BIG => ByteOrder::Big,
            _ => return Err(WalHeaderError::Magic),
        };
        if checksum_of_header(order, bytes) != WalChecksum::read(bytes, HEADER_CHECKSUM_AT) {
            return Err(WalHeaderError::Checksum);
        }
        if be_u32(bytes, VERSION_AT) != VERSION {
            return Err(WalHeaderError::Version);
        }
        let page_size =
            PageSize::new(be_u32(bytes, PAGE_SIZE_AT)).ok_or(WalHeaderError::PageSize)?;
        let sequence = be_u32(bytes, SEQUENCE_AT);
        Ok(WalHeader { order, page_size, sequence, salts: Salts::read(bytes, SALTS_AT) })
    }

    /// The bytes of the header.
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        let magic = if self.order == ByteOrder::Big { MAGIC_BIG } else { MAGIC_LITTLE };
        put_be_u32(&mut bytes, 0, magic);
        put_be_u32(&mut bytes, VERSION_AT, VERSION);
        put_be_u32(&mut bytes, PAGE_SIZE_AT, self.page_size.get());
        put_be_u32(&mut bytes, SEQUENCE_AT, self.sequence);
        self.salts.write(&mut bytes, SALTS_AT);
        checksum_of_header(self.order, &bytes).write(&mut bytes, HEADER_CHECKSUM_AT);
        bytes
    }

    /// The bytes of a log that has no frame yet: the header, and an empty frame header. SQLite takes a log that
    /// ends with its header for one without salts, and then a client with a read-only wal-index, who compares
    /// them, asks for ten seconds whether the log has started over, and gives up.
    pub fn encode_log(&self) -> [u8; HEADER_SIZE + FRAME_HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE + FRAME_HEADER_SIZE];
        bytes[..HEADER_SIZE].copy_from_slice(&self.encode());
        bytes
    }

    /// The checksum that the first frame continues.
    pub fn checksum(&self) -> WalChecksum {
        WalChecksum::read(&self.encode(), HEADER_CHECKSUM_AT)
    }
}

fn checksum_of_header(order: ByteOrder, bytes: &[u8]) -> WalChecksum {
    WalChecksum::default().update(order, &bytes[..HEADER_CHECKSUM_AT])
}

/// The length of a frame with its header, in bytes.
pub fn frame_size(page_size: PageSize) -> usize {
    FRAME_HEADER_SIZE + page_size.bytes()
}

/// Where frame `frame` (the first is 1) starts in the file, in bytes.
pub fn frame_offset(page_size: PageSize, frame: u32) -> u64 {
    debug_assert!(frame > 0, "frames are numbered from 1");
    HEADER_SIZE as u64 + (u64::from(frame) - 1) * frame_size(page_size) as u64
}

/// Why a frame does not follow the one before it: the log ends before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameEnd {
    /// The bytes end within the frame.
    Short,
    /// Its salts are those of another run of the log.
    Salts,
    /// Page number zero.
    Pgno,
    /// Its checksum does not follow from the frames before.
    Checksum,
}

/// A frame, without its salts and checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Which page.
    pub pgno: Pgno,
    /// The size of the database in pages, if this frame ends a transaction.
    pub commit: Option<u32>,
    /// The page.
    pub page: &'a [u8],
}

/// A place in a log between two frames, with all that is needed to verify the next one or to write
/// it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalCursor {
    page_size: PageSize,
    order: ByteOrder,
    salts: Salts,
    checksum: WalChecksum,
    offset: u64,
}

impl WalCursor {
    /// Before the first frame.
    pub fn start(header: &WalHeader) -> WalCursor {
        WalCursor::resume(header, HEADER_SIZE as u64, header.checksum())
    }

    /// At byte `offset`, where the running checksum is `checksum`.
    pub fn resume(header: &WalHeader, offset: u64, checksum: WalChecksum) -> WalCursor {
        let &WalHeader { order, page_size, salts, .. } = header;
        WalCursor { page_size, order, salts, checksum, offset }
    }

    /// Where the next frame starts in the file, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The number of the last frame before this place; 0 before the first.
    pub fn frame(&self) -> u32 {
        let frames = (self.offset - HEADER_SIZE as u64) / self.frame_size() as u64;
        u32::try_from(frames).unwrap_or(u32::MAX)
    }

    /// The running checksum before the next frame.
    pub fn checksum(&self) -> WalChecksum {
        self.checksum
    }

    /// The salts that frames must have.
    pub fn salts(&self) -> Salts {
        self.salts
    }

    /// The size of a page.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The length of a frame with its header, in bytes.
    pub fn frame_size(&self) -> usize {
        frame_size(self.page_size)
    }

    /// Verifies the frame at the start of `bytes`, which come from [`WalCursor::offset`], and moves
    /// past it. At the end of the log the cursor stays.
    pub fn verify<'a>(&mut self, bytes: &'a [u8]) -> Result<Frame<'a>, FrameEnd> {
        let bytes = bytes.get(..self.frame_size()).ok_or(FrameEnd::Short)?;
        if Salts::read(bytes, FRAME_SALTS_AT) != self.salts {
            return Err(FrameEnd::Salts);
        }
        let pgno = be_u32(bytes, 0);
        if pgno == 0 {
            return Err(FrameEnd::Pgno);
        }
        let checksum = self.checksum_after(bytes);
        if checksum != WalChecksum::read(bytes, FRAME_CHECKSUM_AT) {
            return Err(FrameEnd::Checksum);
        }
        self.step(checksum);
        let commit = Some(be_u32(bytes, FRAME_COMMIT_AT)).filter(|&pages| pages > 0);
        Ok(Frame { pgno: Pgno(pgno), commit, page: &bytes[FRAME_HEADER_SIZE..] })
    }

    /// Appends the encoded `frame` to `out` and moves past it. Its page has the size of a page.
    pub fn encode(&mut self, frame: &Frame<'_>, out: &mut Vec<u8>) {
        assert_eq!(frame.page.len(), self.page_size.bytes(), "a frame holds a page");
        let start = out.len();
        let mut header = [0; FRAME_HEADER_SIZE];
        put_be_u32(&mut header, 0, frame.pgno.0);
        put_be_u32(&mut header, FRAME_COMMIT_AT, frame.commit.unwrap_or(0));
        self.salts.write(&mut header, FRAME_SALTS_AT);
        out.extend_from_slice(&header);
        out.extend_from_slice(frame.page);
        let checksum = self.checksum_after(&out[start..]);
        checksum.write(&mut out[start..], FRAME_CHECKSUM_AT);
        self.step(checksum);
    }

    fn checksum_after(&self, frame: &[u8]) -> WalChecksum {
        let checksum = self.checksum.update(self.order, &frame[..FRAME_SALTS_AT]);
        checksum.update(self.order, &frame[FRAME_HEADER_SIZE..])
    }

    fn step(&mut self, checksum: WalChecksum) {
        self.checksum = checksum;
        self.offset += self.frame_size() as u64;
    }
}

/// Walks the frames of a log that comes from a reader, one frame in memory at a time.
#[derive(Debug)]
pub struct FrameReader<R> {
    reader: R,
    cursor: WalCursor,
    frame: Vec<u8>,
}

impl<R: Read> FrameReader<R> {
    /// Reads from `reader`, which stands at [`WalCursor::offset`] of `cursor`; wants a buffered one.
    pub fn new(reader: R, cursor: WalCursor) -> FrameReader<R> {
        FrameReader { reader, cursor, frame: vec![0; cursor.frame_size()] }
    }

    /// The next frame, or why there is none; after that the reader is used up.
    pub fn next_frame(&mut self) -> io::Result<Result<Frame<'_>, FrameEnd>> {
        match self.reader.read_exact(&mut self.frame) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Err(FrameEnd::Short)),
            Err(error) => Err(error),
            Ok(()) => Ok(self.cursor.verify(&self.frame)),
        }
    }

    /// The place after the last frame that was returned.
    pub fn cursor(&self) -> &WalCursor {
        &self.cursor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log that SQLite wrote: its bytes, and the size in pages of each commit.
    fn real_wal(page_size: u32) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let db = rusqlite::Connection::open(dir.path().join("db")).unwrap();
        db.execute_batch(&format!("PRAGMA page_size={page_size}; PRAGMA journal_mode=WAL;"))
            .unwrap();
        db.execute_batch("CREATE TABLE t(x); INSERT INTO t VALUES (zeroblob(5000));").unwrap();
        std::fs::read(dir.path().join("db-wal")).unwrap()
    }

    /// The frames of a log as (page, size at commit), and why it ends.
    fn walk(wal: &[u8]) -> (Vec<(u32, Option<u32>)>, FrameEnd) {
        let mut cursor = WalCursor::start(&WalHeader::parse(wal).unwrap());
        let mut frames = Vec::new();
        loop {
            match cursor.verify(&wal[cursor.offset() as usize..]) {
                Ok(frame) => frames.push((frame.pgno.0, frame.commit)),
                Err(end) => return (frames, end),
            }
            assert_eq!(cursor.frame() as usize, frames.len());
        }
    }

    #[test]
    fn a_real_log_is_verified_and_written_again_to_the_byte() {
        for page_size in [512, 4096, 65536] {
            let wal = real_wal(page_size);
            let header = WalHeader::parse(&wal).unwrap();
            assert_eq!((header.page_size.get(), header.order), (page_size, ByteOrder::NATIVE));
            let (frames, end) = walk(&wal);
            assert_eq!(end, FrameEnd::Short);
            assert!(frames.iter().filter(|(_, commit)| commit.is_some()).count() >= 2);

            let mut reader = FrameReader::new(&wal[HEADER_SIZE..], WalCursor::start(&header));
            let mut again = header.encode().to_vec();
            let mut writer = WalCursor::start(&header);
            while let Ok(frame) = reader.next_frame().unwrap() {
                writer.encode(&frame, &mut again);
            }
            assert_eq!(again, wal);
            assert_eq!(&writer, reader.cursor());
        }
    }

    #[test]
    fn both_byte_orders_are_read() {
        let wal = real_wal(4096);
        let mut other = WalHeader::parse(&wal).unwrap();
        other.order = ByteOrder::Big;
        let mut cursor = WalCursor::start(&other);
        let mut bytes = other.encode().to_vec();
        let page = &wal[HEADER_SIZE + FRAME_HEADER_SIZE..][..4096];
        cursor.encode(&Frame { pgno: Pgno(1), commit: Some(1), page }, &mut bytes);
        assert_eq!(bytes[..4], [0x37, 0x7f, 0x06, 0x83]);
        assert_eq!(walk(&bytes), (vec![(1, Some(1))], FrameEnd::Short));
    }

    #[test]
    fn a_log_ends_before_its_first_bad_frame() {
        let wal = real_wal(4096);
        let (frames, _) = walk(&wal);
        let second = frame_offset(PageSize::new(4096).unwrap(), 2) as usize;
        let check = |at: usize, end: FrameEnd| {
            let mut bad = wal.clone();
            bad[at] ^= 1;
            assert_eq!(walk(&bad), (frames[..1].to_vec(), end));
        };
        check(second + FRAME_SALTS_AT, FrameEnd::Salts);
        check(second + FRAME_CHECKSUM_AT, FrameEnd::Checksum);
        check(second + FRAME_HEADER_SIZE + 100, FrameEnd::Checksum);
        assert_eq!(walk(&wal[..second + 30]), (frames[..1].to_vec(), FrameEnd::Short));
        let mut zero = wal.clone();
        zero[second..second + 4].fill(0);
        assert_eq!(walk(&zero), (frames[..1].to_vec(), FrameEnd::Pgno));
    }

    #[test]
    fn a_bad_header_is_named() {
        let wal = real_wal(512);
        let check = |at: usize, expected: WalHeaderError| {
            let mut bad = wal.clone();
            bad[at] ^= 0x40;
            assert_eq!(WalHeader::parse(&bad), Err(expected));
        };
        check(0, WalHeaderError::Magic);
        check(PAGE_SIZE_AT, WalHeaderError::Checksum);
        check(HEADER_CHECKSUM_AT, WalHeaderError::Checksum);
        assert_eq!(WalHeader::parse(&wal[..31]), Err(WalHeaderError::Short));
        let mut version = wal[..HEADER_SIZE].to_vec();
        put_be_u32(&mut version, VERSION_AT, 1);
        checksum_of_header(ByteOrder::NATIVE, &version.clone())
            .write(&mut version, HEADER_CHECKSUM_AT);
        assert_eq!(WalHeader::parse(&version), Err(WalHeaderError::Version));
    }
}
