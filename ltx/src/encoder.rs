//! Writing a file, page by page.
//!
//! Invariant: [`Encoder::finish`] returns only for a file that [`Decoder`](crate::Decoder) accepts.

use std::io::Write;

use crate::checksum::{FileCrc, PGNO_SIZE, Shift, record_crc};
use crate::error::Error;
use crate::frame::FrameWriter;
use crate::header::{Compression, Header, Trailer, validate_post_apply};
use crate::order::PageOrder;
use crate::types::{Checksum, Pgno};

/// The four zero bytes that end the page block.
pub(crate) const END_MARK: [u8; PGNO_SIZE] = [0; PGNO_SIZE];

/// Writes one file, in format v1, to `W`.
///
/// Uncompressed it makes two small writes a page, so a file wants a `BufWriter`. After an error what
/// was written is no file; only a refused page (anything but [`Error::Write`]) may be followed by
/// another one.
pub struct Encoder<W: Write> {
    writer: W,
    /// None if the pages are stored as they are.
    frame: Option<Box<FrameWriter>>,
    header: Header,
    order: PageOrder,
    crc: FileCrc,
    /// What a page record does to the file checksum.
    record: Shift,
    /// The checksum of the pages so far.
    rolling: Checksum,
}

impl<W: Write> Encoder<W> {
    /// Checks `header` and writes it.
    pub fn new(mut writer: W, header: Header) -> Result<Encoder<W>, Error> {
        header.validate()?;
        let bytes = header.encode();
        writer.write_all(&bytes).map_err(Error::Write)?;
        let mut crc = FileCrc::default();
        crc.update(&bytes);
        let frame = match header.compression {
            Compression::None => None,
            Compression::Lz4 => Some(Box::new(FrameWriter::new())),
        };
        let record = Shift::new(PGNO_SIZE + header.page_size.bytes());
        let order = PageOrder::new(&header);
        Ok(Encoder { writer, frame, header, order, crc, record, rolling: Checksum::EMPTY })
    }

    /// The header that was written.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Writes the image of page `pgno` after the transaction; returns its checksum.
    ///
    /// Pages ascend and are at most `commit`; a snapshot holds them all but the lock page, which is
    /// in no file.
    pub fn page(&mut self, pgno: Pgno, data: &[u8]) -> Result<Checksum, Error> {
        let expected = self.header.page_size;
        if data.len() != expected.bytes() {
            return Err(Error::PageBuffer { expected, got: data.len() });
        }
        self.order.next(pgno)?;
        self.write(&pgno.0.to_be_bytes())?;
        self.write(data)?;
        let crc = record_crc(pgno, data);
        self.crc.append(crc, &self.record);
        let checksum = Checksum::flagged(crc);
        self.rolling = self.rolling.toggle(checksum);
        Ok(checksum)
    }

    /// Ends the file: `post_apply` is the checksum of the database after it is applied, which for a
    /// snapshot must be that of its pages. Does not flush `W`.
    pub fn finish(mut self, post_apply: Checksum) -> Result<(W, Trailer), Error> {
        self.order.finish()?;
        validate_post_apply(post_apply, self.header.commit)?;
        if self.header.is_snapshot() && post_apply != self.rolling {
            return Err(Error::SnapshotChecksum { found: post_apply, computed: self.rolling });
        }
        self.write(&END_MARK)?;
        self.crc.update(&END_MARK);
        self.crc.update(&post_apply.get().to_be_bytes());
        let trailer = Trailer { post_apply, file_checksum: self.crc.checksum() };
        if let Some(frame) = self.frame {
            frame.finish(&mut self.writer)?;
        }
        self.writer.write_all(&trailer.encode()).map_err(Error::Write)?;
        Ok((self.writer, trailer))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        match &mut self.frame {
            None => self.writer.write_all(bytes).map_err(Error::Write),
            Some(frame) => frame.write(bytes, &mut self.writer),
        }
    }
}
