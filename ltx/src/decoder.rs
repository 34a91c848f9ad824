//! Reading a file of format v1, page by page, believing nothing.
//!
//! Every rule that a file must keep is checked, the order of the pages as they come, the rest at the
//! end. So nothing that was read is certain before [`Decoder::finish`] has returned.

use std::io::{self, Read};

use crate::checksum::{FileCrc, PGNO_SIZE, Shift, record_crc};
use crate::encoder::END_MARK;
use crate::error::Error;
use crate::frame::FrameReader;
use crate::header::{Checksums, Compression, HEADER_SIZE, Header, TRAILER_SIZE, Trailer};
use crate::order::PageOrder;
use crate::types::{Checksum, Pgno};

/// Reads one file, in format v1, from `R`; never a byte past its trailer.
///
/// Makes small reads, so a file wants a `BufReader` (or to be in memory).
pub struct Decoder<R: Read> {
    source: R,
    body: Body,
    header: Header,
    checksums: Checksums,
    order: PageOrder,
    crc: FileCrc,
    /// What a page record does to the file checksum.
    record: Shift,
    /// The checksum of the pages so far.
    rolling: Checksum,
    /// The checksum of the page that was read last.
    last: Checksum,
    state: State,
}

/// How the page block is stored.
enum Body {
    Raw,
    Lz4(Box<FrameReader>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Pages,
    Ended,
    Failed,
}

impl<R: Read> Decoder<R> {
    /// Reads the header.
    pub fn new(mut source: R) -> Result<Decoder<R>, Error> {
        let mut bytes = [0; HEADER_SIZE];
        source.read_exact(&mut bytes).map_err(Error::read)?;
        let header = Header::decode(&bytes)?;
        Decoder::after_header(source, header, Checksums::Present, &bytes)
    }

    /// A reader of what follows `header`, which was read and checked and has these bytes.
    pub(crate) fn after_header(
        mut source: R,
        header: Header,
        checksums: Checksums,
        bytes: &[u8; HEADER_SIZE],
    ) -> Result<Decoder<R>, Error> {
        let mut crc = FileCrc::default();
        crc.update(bytes);
        let body = match header.compression {
            Compression::None => Body::Raw,
            Compression::Lz4 => {
                let mut frame = FrameReader::default();
                frame.begin(&mut source)?;
                Body::Lz4(Box::new(frame))
            }
        };
        Ok(Decoder {
            source,
            body,
            order: PageOrder::new(&header),
            record: Shift::new(PGNO_SIZE + header.page_size.bytes()),
            header,
            checksums,
            crc,
            rolling: Checksum::EMPTY,
            last: Checksum::NONE,
            state: State::Pages,
        })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The checksum of the page that was read last; none before the first.
    pub fn page_checksum(&self) -> Checksum {
        self.last
    }

    /// Reads the next page into `buffer`, which holds exactly one, and returns its number; `None`
    /// after the last.
    pub fn next_page(&mut self, buffer: &mut [u8]) -> Result<Option<Pgno>, Error> {
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

    /// Reads and checks the end of a file after which nothing may come. All pages must have been
    /// read.
    pub fn finish(self) -> Result<Trailer, Error> {
        let (mut source, trailer) = self.finish_embedded()?;
        expect_end(&mut source)?;
        Ok(trailer)
    }

    /// Reads and checks the end of a file that is a part of a longer stream; the source is left
    /// right after the trailer. All pages must have been read.
    pub fn finish_embedded(mut self) -> Result<(R, Trailer), Error> {
        match self.state {
            State::Pages => return Err(Error::PagesUnread),
            State::Failed => return Err(Error::AfterError),
            State::Ended => {}
        }
        let end = End { checksums: self.checksums, crc: self.crc, rolling: self.rolling };
        let trailer = end.read(&mut self.source, &self.header)?;
        Ok((self.source, trailer))
    }

    fn read_page(&mut self, buffer: &mut [u8]) -> Result<Option<Pgno>, Error> {
        let mut number = [0; PGNO_SIZE];
        self.read(&mut number)?;
        if number == END_MARK {
            self.end_pages()?;
            return Ok(None);
        }
        let pgno = Pgno(u32::from_be_bytes(number));
        self.order.next(pgno)?;
        self.read(buffer)?;
        let crc = record_crc(pgno, buffer);
        self.crc.append(crc, &self.record);
        self.last = Checksum::flagged(crc);
        self.rolling = self.rolling.toggle(self.last);
        Ok(Some(pgno))
    }

    fn end_pages(&mut self) -> Result<(), Error> {
        self.crc.update(&END_MARK);
        self.order.finish()?;
        match &mut self.body {
            Body::Raw => Ok(()),
            Body::Lz4(frame) => frame.finish(&mut self.source),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<(), Error> {
        match &mut self.body {
            Body::Raw => self.source.read_exact(buffer).map_err(Error::read),
            Body::Lz4(frame) => frame.read(&mut self.source, buffer),
        }
    }
}

/// Reads a whole file and checks every rule that a file alone can break.
pub fn verify(source: impl Read) -> Result<(Header, Trailer), Error> {
    let mut decoder = Decoder::new(source)?;
    let header = *decoder.header();
    let mut page = vec![0; header.page_size.bytes()];
    while decoder.next_page(&mut page)?.is_some() {}
    Ok((header, decoder.finish()?))
}

/// What is known of a file when only its trailer is left.
pub(crate) struct End {
    pub(crate) checksums: Checksums,
    /// The CRC of all bytes before the trailer.
    pub(crate) crc: FileCrc,
    /// The checksum of the pages.
    pub(crate) rolling: Checksum,
}

impl End {
    /// Reads the trailer and checks everything that it promises.
    pub(crate) fn read(
        mut self,
        source: &mut impl Read,
        header: &Header,
    ) -> Result<Trailer, Error> {
        let mut bytes = [0; TRAILER_SIZE];
        source.read_exact(&mut bytes).map_err(Error::read)?;
        self.crc.update(&bytes[..8]);
        let trailer = match self.checksums {
            Checksums::Present => Trailer::decode(&bytes, header.commit)?,
            Checksums::Absent => Trailer::decode_unchecked(&bytes)?,
        };
        let (found, computed) = (trailer.file_checksum, self.crc.checksum());
        if found != computed {
            return Err(Error::FileChecksum { found, computed });
        }
        let (found, computed) = (trailer.post_apply, self.rolling);
        if header.is_snapshot() && self.checksums == Checksums::Present && found != computed {
            return Err(Error::SnapshotChecksum { found, computed });
        }
        Ok(trailer)
    }
}

/// Checks that nothing is left in `source`.
pub(crate) fn expect_end(source: &mut impl Read) -> Result<(), Error> {
    let mut byte = [0];
    loop {
        match source.read(&mut byte) {
            Ok(0) => return Ok(()),
            Ok(_) => return Err(Error::TrailingBytes),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::Read(error)),
        }
    }
}
