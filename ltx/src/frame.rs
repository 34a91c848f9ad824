//! LZ4 frames, the reading side: exact to the byte, so that what follows a frame is still there.
//! (LZ4 frame format 1.6.)
//!
//! ```text
//! magic 04 22 4D 18 | FLG BD [content size, 8] | header checksum, 1
//! block: size, 4 (top bit: stored) | data | [checksum, 4]   ...
//! end mark: 4 zeros | [content checksum, 4]
//! ```
//!
//! All integers are little-endian. Any frame is read but one with a dictionary. Writing is
//! `lz4_flex`'s `FrameEncoder`; reading is not its `FrameDecoder`, which takes a frame that is cut
//! off for one that ended, and goes on into the next frame, that is, into the trailer.
//!
//! Nothing here is generic, so that it is optimised with this crate, also for a test build.

use std::hash::Hasher;
use std::io::{Read, Write};

use lz4_flex::block::{decompress_into, decompress_into_with_dict};
use lz4_flex::frame::{BlockMode, BlockSize, Error as FrameError, FrameEncoder, FrameInfo};
use twox_hash::XxHash32;

use crate::error::Error;

/// The first bytes of a frame.
pub(crate) const MAGIC: [u8; 4] = [0x04, 0x22, 0x4D, 0x18];
/// The version bits of FLG, and their only value.
const VERSION: (u8, u8) = (0xC0, 0x40);
const INDEPENDENT: u8 = 0x20;
const BLOCK_CHECKSUM: u8 = 0x10;
const CONTENT_SIZE: u8 = 0x08;
const CONTENT_CHECKSUM: u8 = 0x04;
/// A reserved bit, and the one for a dictionary id.
const UNSUPPORTED: u8 = 0x03;
/// The bit of a block size that says that the block is stored as it is.
const STORED: u32 = 1 << 31;
/// How far back a block may refer, in bytes.
const WINDOW: usize = 64 << 10;

/// A writer of one frame, like those of the reference: FLG 0x64, BD 0x40.
pub(crate) struct FrameWriter(FrameEncoder<Vec<u8>>);

impl FrameWriter {
    /// A writer of an empty frame.
    pub(crate) fn new() -> FrameWriter {
        let info = FrameInfo::new()
            .block_mode(BlockMode::Independent)
            .block_size(BlockSize::Max64KB)
            .content_checksum(true);
        FrameWriter(FrameEncoder::with_frame_info(info, Vec::new()))
    }

    /// Adds content; blocks that are full go to `writer`.
    pub(crate) fn write(&mut self, content: &[u8], writer: &mut dyn Write) -> Result<(), Error> {
        self.0.write_all(content).map_err(Error::Write)?;
        let compressed = self.0.get_mut();
        if !compressed.is_empty() {
            writer.write_all(compressed).map_err(Error::Write)?;
            compressed.clear();
        }
        Ok(())
    }

    /// Writes what is left, and the end of the frame.
    pub(crate) fn finish(self, writer: &mut dyn Write) -> Result<(), Error> {
        let compressed = self.0.finish().map_err(|error| match error {
            FrameError::IoError(error) => Error::Write(error),
            other => Error::Write(std::io::Error::other(other)),
        })?;
        writer.write_all(&compressed).map_err(Error::Write)
    }
}

/// A reader of the content of frames, one frame after the other. Keeps its buffers between frames.
#[derive(Default)]
pub(crate) struct FrameReader {
    info: Info,
    hasher: XxHash32,
    /// The content seen so far, in bytes.
    content_len: u64,
    /// A compressed block, as long as the block.
    input: Vec<u8>,
    /// A decompressed block, as long as the longest block; `start..end` is not read yet.
    output: Vec<u8>,
    start: usize,
    end: usize,
    /// The last bytes of earlier blocks, where blocks refer to them.
    history: Vec<u8>,
    state: State,
}

/// The parameters of a frame.
#[derive(Default)]
struct Info {
    flags: u8,
    /// The size of the largest block, in bytes: at most 4 MiB.
    block_max: usize,
    content_size: Option<u64>,
}

impl Info {
    fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    /// No frame, or its end mark was read.
    #[default]
    Ended,
    /// Between two blocks.
    Blocks,
}

impl FrameReader {
    /// Reads the header of a frame.
    pub(crate) fn begin(&mut self, source: &mut dyn Read) -> Result<(), Error> {
        let mut start = [0; 6];
        read_exact(source, &mut start)?;
        let [flags, block] = [start[4], start[5]];
        let known = flags & VERSION.0 == VERSION.1 && flags & UNSUPPORTED == 0 && block & 0x8F == 0;
        if start[..4] != MAGIC || !known {
            return Err(Error::Lz4Header);
        }
        let mut hasher = XxHash32::with_seed(0);
        hasher.write(&start[4..]);
        let content_size = match flags & CONTENT_SIZE {
            0 => None,
            _ => {
                let mut size = [0; 8];
                read_exact(source, &mut size)?;
                hasher.write(&size);
                Some(u64::from_le_bytes(size))
            }
        };
        let mut checksum = [0];
        read_exact(source, &mut checksum)?;
        if checksum[0] != (hasher.finish() >> 8) as u8 {
            return Err(Error::Lz4HeaderChecksum);
        }
        self.info = Info { flags, block_max: block_max(block)?, content_size };
        self.hasher = XxHash32::with_seed(0);
        (self.content_len, self.start, self.end) = (0, 0, 0);
        self.history.clear();
        self.state = State::Blocks;
        Ok(())
    }

    /// Fills `buffer` with content; content that ends before is [`Error::Lz4End`].
    pub(crate) fn read(&mut self, source: &mut dyn Read, buffer: &mut [u8]) -> Result<(), Error> {
        let mut filled = 0;
        while filled < buffer.len() {
            if self.start == self.end {
                self.read_block(source)?;
                if self.state == State::Ended {
                    return Err(Error::Lz4End);
                }
            }
            let len = (self.end - self.start).min(buffer.len() - filled);
            let part = &self.output[self.start..self.start + len];
            buffer[filled..filled + len].copy_from_slice(part);
            self.start += len;
            filled += len;
        }
        Ok(())
    }

    /// Reads the end of the frame; content that is left is [`Error::Lz4End`].
    pub(crate) fn finish(&mut self, source: &mut dyn Read) -> Result<(), Error> {
        while self.state == State::Blocks {
            if self.start < self.end {
                return Err(Error::Lz4End);
            }
            self.read_block(source)?;
        }
        Ok(())
    }

    /// Reads a block, or the end mark with what follows it.
    fn read_block(&mut self, source: &mut dyn Read) -> Result<(), Error> {
        let size = read_u32(source)?;
        if size == 0 {
            return self.end(source);
        }
        let len = (size & !STORED) as usize;
        if len > self.info.block_max {
            return Err(Error::Lz4Block);
        }
        self.remember();
        self.output.resize(self.info.block_max, 0);
        self.start = 0;
        self.end = match size & STORED {
            0 => self.read_compressed(source, len)?,
            _ => self.read_stored(source, len)?,
        };
        self.content_len += self.end as u64;
        if self.info.has(CONTENT_CHECKSUM) {
            self.hasher.write(&self.output[..self.end]);
        }
        Ok(())
    }

    fn read_stored(&mut self, source: &mut dyn Read, len: usize) -> Result<usize, Error> {
        read_exact(source, &mut self.output[..len])?;
        check_block(&self.info, source, &self.output[..len])?;
        Ok(len)
    }

    fn read_compressed(&mut self, source: &mut dyn Read, len: usize) -> Result<usize, Error> {
        self.input.resize(len, 0);
        read_exact(source, &mut self.input)?;
        check_block(&self.info, source, &self.input)?;
        let result = match self.history.is_empty() {
            true => decompress_into(&self.input, &mut self.output),
            false => decompress_into_with_dict(&self.input, &mut self.output, &self.history),
        };
        result.map_err(|_| Error::Lz4Block)
    }

    /// Keeps the end of the block that was read, if the next one may refer to it.
    fn remember(&mut self) {
        if self.info.has(INDEPENDENT) {
            return;
        }
        let block = &self.output[..self.end];
        let block = &block[block.len().saturating_sub(WINDOW)..];
        let keep = WINDOW - block.len();
        self.history.drain(..self.history.len().saturating_sub(keep));
        self.history.extend_from_slice(block);
    }

    fn end(&mut self, source: &mut dyn Read) -> Result<(), Error> {
        if self.info.content_size.is_some_and(|size| size != self.content_len) {
            return Err(Error::Lz4ContentSize);
        }
        let checksum = self.hasher.finish() as u32;
        if self.info.has(CONTENT_CHECKSUM) && read_u32(source)? != checksum {
            return Err(Error::Lz4ContentChecksum);
        }
        self.state = State::Ended;
        Ok(())
    }
}

/// The size of the largest block of a frame with this BD byte, in bytes.
fn block_max(block: u8) -> Result<usize, Error> {
    match block >> 4 {
        4 => Ok(64 << 10),
        5 => Ok(256 << 10),
        6 => Ok(1 << 20),
        7 => Ok(4 << 20),
        _ => Err(Error::Lz4Header),
    }
}

/// Reads and checks the checksum of a block, if the frame has them; of its bytes as stored.
fn check_block(info: &Info, source: &mut dyn Read, block: &[u8]) -> Result<(), Error> {
    match info.has(BLOCK_CHECKSUM) && read_u32(source)? != XxHash32::oneshot(0, block) {
        true => Err(Error::Lz4BlockChecksum),
        false => Ok(()),
    }
}

fn read_u32(source: &mut dyn Read) -> Result<u32, Error> {
    let mut bytes = [0; 4];
    read_exact(source, &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

fn read_exact(source: &mut dyn Read, buffer: &mut [u8]) -> Result<(), Error> {
    source.read_exact(buffer).map_err(Error::read)
}
