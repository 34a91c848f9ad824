//! Reading every variant of the format, also those that came after format v1. Nothing here writes.
//!
//! ```text
//! v2: header | number, LZ4 frame of the page ...          | 0, 4 bytes | index | trailer
//! v3: header | number, flags, size, LZ4 block of the page | 0, 6 bytes | index | trailer
//!     index: (number, offset, size) of each page, 0, as LEB128 | its length, 8 bytes
//! ```
//!
//! Ltx 0.5.0 and 0.5.1 wrote v3 with flags 0: then an LZ4 frame follows as in v2. No file says which
//! variant it is, so the plausible ones are tried, and the file checksum decides.

use std::io::{self, Read, Seek, SeekFrom};

use lz4_flex::block::decompress_into;

use crate::checksum::{FileCrc, page_checksum};
use crate::decoder::{Decoder, End, State, expect_end};
use crate::error::Error;
use crate::frame::{self, FrameReader};
use crate::header::{Checksums, Compression, HEADER_SIZE, Header, TRAILER_SIZE, Trailer};
use crate::order::PageOrder;
use crate::types::{Checksum, PageSize, Pgno};

/// Page header flag of v3: a size follows, and then an LZ4 block rather than a frame.
const FLAG_BLOCK: u16 = 1;
/// How many bytes after the header tell the variants apart: a page header and a frame's magic.
const START_SIZE: usize = 10;
/// The length of a file without pages, in bytes, by variant.
const EMPTY: [(Variant, u64); 3] = [(Variant::V1, 120), (Variant::V2, 129), (Variant::V3, 131)];

/// A variant of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// LiteFS' own, uncompressed: what [`Decoder`] reads.
    V1,
    /// LiteFS' own, compressed: what [`Decoder`] reads.
    V1Lz4,
    /// Ltx 0.4: an LZ4 frame for each page, and an index.
    V2,
    /// Ltx 0.5 (Litestream): page flags, an LZ4 block or frame for each page, and an index.
    V3,
}

/// Reads one file of any variant. The file was verified from end to end before the first page is
/// given out.
pub struct AnyReader<R: Read> {
    variant: Variant,
    checksums: Checksums,
    body: Body<R>,
}

enum Body<R: Read> {
    V1(Box<Decoder<R>>),
    Indexed(Box<Indexed<R>>),
}

impl<R: Read + Seek> AnyReader<R> {
    /// Finds out which variant `source` is, by reading it once or more, and goes back to its start.
    pub fn new(mut source: R) -> Result<AnyReader<R>, Error> {
        let mut first_error = None;
        for variant in candidates(&mut source)? {
            match verify_as(&mut source, variant) {
                Ok(()) => return AnyReader::open(source, variant),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        Err(first_error.unwrap_or(Error::Variant))
    }
}

impl<R: Read + Seek> AnyReader<R> {
    /// Reads the header of `source`, which is of this variant.
    fn open(mut source: R, variant: Variant) -> Result<AnyReader<R>, Error> {
        source.seek(SeekFrom::Start(0)).map_err(Error::Read)?;
        let bytes = read_header(&mut source)?;
        let (header, checksums) = Header::decode_later(&bytes)?;
        let body = match variant {
            Variant::V1 | Variant::V1Lz4 => {
                Body::V1(Box::new(Decoder::after_header(source, header, checksums, &bytes)?))
            }
            Variant::V2 | Variant::V3 => {
                Body::Indexed(Box::new(Indexed::new(source, header, variant, &bytes)))
            }
        };
        Ok(AnyReader { variant, checksums, body })
    }
}

impl<R: Read> AnyReader<R> {
    /// The variant of the file.
    pub fn variant(&self) -> Variant {
        self.variant
    }

    /// The header. The compression it names only means something for [`Variant::V1Lz4`].
    pub fn header(&self) -> &Header {
        match &self.body {
            Body::V1(decoder) => decoder.header(),
            Body::Indexed(indexed) => &indexed.header,
        }
    }

    /// The checksum of the page that was read last; none before the first.
    pub fn page_checksum(&self) -> Checksum {
        match &self.body {
            Body::V1(decoder) => decoder.page_checksum(),
            Body::Indexed(indexed) => indexed.last,
        }
    }

    /// Reads the next page into `buffer`, which holds exactly one, and returns its number; `None`
    /// after the last.
    pub fn next_page(&mut self, buffer: &mut [u8]) -> Result<Option<Pgno>, Error> {
        match &mut self.body {
            Body::V1(decoder) => decoder.next_page(buffer),
            Body::Indexed(indexed) => indexed.next_page(buffer),
        }
    }

    /// Reads and checks the end of the file. All pages must have been read.
    pub fn finish(self) -> Result<Trailer, Error> {
        match self.body {
            Body::V1(decoder) => decoder.finish(),
            Body::Indexed(indexed) => indexed.finish(self.checksums),
        }
    }
}

/// The variants that `source` may be, the likeliest first.
fn candidates<R: Read + Seek>(source: &mut R) -> Result<Vec<Variant>, Error> {
    let len = source.seek(SeekFrom::End(0)).map_err(Error::Read)?;
    source.seek(SeekFrom::Start(0)).map_err(Error::Read)?;
    let (header, _) = Header::decode_later(&read_header(source)?)?;
    if header.compression == Compression::Lz4 {
        return Ok(vec![Variant::V1Lz4]);
    }
    let start = read_start(source)?;
    let record = header.page_size.bytes() as u64 + 4;
    let pages = len.checked_sub((HEADER_SIZE + 4 + TRAILER_SIZE) as u64);
    let mut found = Vec::new();
    if start[4..8] == frame::MAGIC {
        found.push(Variant::V2);
    }
    if start[4..6] == [0, 1] || (start[4..6] == [0, 0] && start[6..10] == frame::MAGIC) {
        found.push(Variant::V3);
    }
    if pages.is_some_and(|pages| pages % record == 0) {
        found.push(Variant::V1);
    }
    let empty = EMPTY.iter().find(|(_, size)| *size == len && start[..4] == [0; 4]);
    found.extend(empty.map(|(variant, _)| *variant));
    Ok(found)
}

/// The first bytes after the header; zeros where the file is shorter.
fn read_start(source: &mut impl Read) -> Result<[u8; START_SIZE], Error> {
    let mut start = Vec::with_capacity(START_SIZE);
    source.take(START_SIZE as u64).read_to_end(&mut start).map_err(Error::Read)?;
    start.resize(START_SIZE, 0);
    Ok(std::array::from_fn(|i| start[i]))
}

fn read_header(source: &mut impl Read) -> Result<[u8; HEADER_SIZE], Error> {
    let mut bytes = [0; HEADER_SIZE];
    source.read_exact(&mut bytes).map_err(Error::read)?;
    Ok(bytes)
}

fn verify_as<R: Read + Seek>(source: &mut R, variant: Variant) -> Result<(), Error> {
    let mut reader = AnyReader::open(source, variant)?;
    let mut page = vec![0; reader.header().page_size.bytes()];
    while reader.next_page(&mut page)?.is_some() {}
    reader.finish().map(|_| ())
}

/// A reader of the variants with an index.
struct Indexed<R> {
    source: Tally<R>,
    variant: Variant,
    header: Header,
    order: PageOrder,
    crc: FileCrc,
    rolling: Checksum,
    last: Checksum,
    frame: FrameReader,
    /// The compressed page, where it is a block.
    block: Vec<u8>,
    /// The index that the pages so far must have.
    index: Vec<u8>,
    state: State,
}

impl<R: Read> Indexed<R> {
    fn new(source: R, header: Header, variant: Variant, bytes: &[u8; HEADER_SIZE]) -> Indexed<R> {
        let mut crc = FileCrc::default();
        crc.update(bytes);
        Indexed {
            source: Tally { source, read: HEADER_SIZE as u64 },
            variant,
            order: PageOrder::new(&header),
            header,
            crc,
            rolling: Checksum::EMPTY,
            last: Checksum::NONE,
            frame: FrameReader::default(),
            block: Vec::new(),
            index: Vec::new(),
            state: State::Pages,
        }
    }

    fn next_page(&mut self, buffer: &mut [u8]) -> Result<Option<Pgno>, Error> {
        let expected = self.header.page_size;
        if buffer.len() != expected.bytes() {
            return Err(Error::PageBuffer { expected, got: buffer.len() });
        }
        match self.state {
            State::Ended => return Ok(None),
            State::Failed => return Err(Error::AfterError),
            State::Pages => {}
        }
        let result = self.read_page(buffer);
        self.state = match result {
            Ok(Some(_)) => State::Pages,
            Ok(None) => State::Ended,
            Err(_) => State::Failed,
        };
        result
    }

    fn read_page(&mut self, buffer: &mut [u8]) -> Result<Option<Pgno>, Error> {
        let start = self.source.read;
        let pgno = Pgno(u32::from_be_bytes(self.read_array()?));
        let flags = match self.variant {
            Variant::V3 => u16::from_be_bytes(self.read_array()?),
            _ => 0,
        };
        if flags & !FLAG_BLOCK != 0 || (pgno.0 == 0 && flags != 0) {
            return Err(Error::PageFlags(flags));
        }
        if pgno.0 == 0 {
            self.order.finish()?;
            self.read_index()?;
            return Ok(None);
        }
        self.order.next(pgno)?;
        match flags & FLAG_BLOCK {
            0 => self.read_frame(buffer)?,
            _ => self.read_block(buffer)?,
        }
        self.crc.update(buffer);
        self.last = page_checksum(pgno, buffer);
        self.rolling = self.rolling.toggle(self.last);
        put_uvarint(&mut self.index, u64::from(pgno.0));
        put_uvarint(&mut self.index, start);
        put_uvarint(&mut self.index, self.source.read - start);
        Ok(Some(pgno))
    }

    fn read_frame(&mut self, buffer: &mut [u8]) -> Result<(), Error> {
        self.frame.begin(&mut self.source)?;
        self.frame.read(&mut self.source, buffer)?;
        self.frame.finish(&mut self.source)
    }

    fn read_block(&mut self, buffer: &mut [u8]) -> Result<(), Error> {
        let size = u32::from_be_bytes(self.read_array()?);
        if size > block_max(self.header.page_size) {
            return Err(Error::PageSizeField(size));
        }
        self.block.resize(size as usize, 0);
        self.source.read_exact(&mut self.block).map_err(Error::read)?;
        match decompress_into(&self.block, buffer) {
            Ok(len) if len == buffer.len() => Ok(()),
            _ => Err(Error::Lz4Block),
        }
    }

    /// Reads the index, which must be the one of the pages.
    fn read_index(&mut self) -> Result<(), Error> {
        self.index.push(0);
        let len = self.index.len() as u64;
        self.index.extend(len.to_be_bytes());
        let mut piece = [0; 4096];
        for expected in self.index.chunks(piece.len()) {
            let piece = &mut piece[..expected.len()];
            self.source.read_exact(piece).map_err(Error::read)?;
            if piece != expected {
                return Err(Error::Index);
            }
        }
        self.crc.update(&self.index);
        Ok(())
    }

    fn finish(mut self, checksums: Checksums) -> Result<Trailer, Error> {
        match self.state {
            State::Pages => return Err(Error::PagesUnread),
            State::Failed => return Err(Error::AfterError),
            State::Ended => {}
        }
        let end = End { checksums, crc: self.crc, rolling: self.rolling };
        let trailer = end.read(&mut self.source, &self.header)?;
        expect_end(&mut self.source)?;
        Ok(trailer)
    }

    /// Reads bytes that the file checksum covers as they are.
    fn read_array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.source.read_exact(&mut bytes).map_err(Error::read)?;
        self.crc.update(&bytes);
        Ok(bytes)
    }
}

/// The size of the largest LZ4 block that a page can become, in bytes. (LZ4's compression bound.)
fn block_max(page_size: PageSize) -> u32 {
    page_size.get() + page_size.get() / 255 + 16
}

/// Appends `value` as unsigned LEB128.
fn put_uvarint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A source that knows how many bytes were read from it.
struct Tally<R> {
    source: R,
    read: u64,
}

impl<R: Read> Read for Tally<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.source.read(buffer)?;
        self.read += len as u64;
        Ok(len)
    }
}
