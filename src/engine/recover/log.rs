//! The WAL as start-up finds it: every valid commit frame counts, whoever wrote it.
//! (SQLite's own recovery rule.)

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::ops::Range;
use std::path::Path;

use ltx::{Checksum, Pgno};

use crate::os;
use crate::sqlite::wal::{self, FrameReader, WalCursor, WalHeader, WalHeaderError};

/// How much of the log is read at once, in bytes.
const READ_SIZE: usize = 1 << 20;

/// The committed transactions of a log.
#[derive(Debug)]
pub(super) struct Log {
    header: WalHeader,
    file: File,
    /// Page and checksum of each frame up to the last commit.
    frames: Vec<(Pgno, Checksum)>,
    commits: Vec<Commit>,
}

/// A transaction.
#[derive(Debug)]
struct Commit {
    /// One past its last frame; its first is where the one before it ends.
    end: usize,
    /// The size of the database after it, in pages.
    pages: u32,
}

/// The last image of each page in a part of a log, by the number of its frame, counted from 0.
pub(super) type Latest = BTreeMap<Pgno, usize>;

impl Log {
    /// The log in the file `path`; `None` if there is no file or no committed transaction in it. One of
    /// another version is an error.
    pub(super) fn read(path: &Path) -> io::Result<Option<Log>> {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut bytes = Vec::with_capacity(wal::HEADER_SIZE);
        let mut cursor = os::FileCursor::new("read:log", file.try_clone()?);
        (&mut cursor).take(wal::HEADER_SIZE as u64).read_to_end(&mut bytes)?;
        let header = match WalHeader::parse(&bytes) {
            Ok(header) => header,
            // SQLite does not open such a database: nobody knows what the log holds.
            Err(error @ WalHeaderError::Version) => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
            Err(_) => return Ok(None),
        };
        let reader = BufReader::with_capacity(READ_SIZE, cursor);
        let mut reader = FrameReader::new(reader, WalCursor::start(&header));
        let (mut frames, mut commits) = (Vec::new(), Vec::new());
        while let Ok(frame) = reader.next_frame()? {
            frames.push((frame.pgno, ltx::page_checksum(frame.pgno, frame.page)));
            commits.extend(frame.commit.map(|pages| Commit { end: frames.len(), pages }));
        }
        frames.truncate(commits.last().map_or(0, |commit: &Commit| commit.end));
        let log = Log { header, file, frames, commits };
        Ok((!log.commits.is_empty()).then_some(log))
    }

    pub(super) fn header(&self) -> &WalHeader {
        &self.header
    }

    /// The number of transactions.
    pub(super) fn commits(&self) -> usize {
        self.commits.len()
    }

    /// The size of the database after the transaction `commit`, in pages.
    pub(super) fn pages(&self, commit: usize) -> u32 {
        self.commits[commit].pages
    }

    /// Where the first `commits` transactions end in the file, in bytes.
    pub(super) fn end(&self, commits: usize) -> u64 {
        let frames = commits.checked_sub(1).map_or(0, |last| self.commits[last].end);
        wal::HEADER_SIZE as u64 + (frames * wal::frame_size(self.header.page_size)) as u64
    }

    /// How many transactions end at byte `offset` or before, if one ends exactly there.
    pub(super) fn commits_up_to(&self, offset: u64) -> Option<usize> {
        (1..=self.commits()).find(|&commits| self.end(commits) == offset)
    }

    /// The last image of each page that the transactions `commits` changed.
    pub(super) fn latest(&self, commits: Range<usize>) -> Latest {
        let start = commits.start.checked_sub(1).map_or(0, |last| self.commits[last].end);
        let end = commits.end.checked_sub(1).map_or(0, |last| self.commits[last].end);
        (start..end.max(start)).map(|frame| (self.frames[frame].0, frame)).collect()
    }

    /// The pages of `latest` with their checksums.
    pub(super) fn sums(&self, latest: &Latest) -> impl Iterator<Item = (Pgno, Checksum)> {
        latest.iter().map(|(pgno, frame)| (*pgno, self.frames[*frame].1))
    }

    /// All images of all pages.
    pub(super) fn frames(&self) -> HashSet<(Pgno, Checksum)> {
        self.frames.iter().copied().collect()
    }

    /// Reads the page of a frame.
    pub(super) fn read_frame(&self, frame: usize, page: &mut [u8]) -> io::Result<()> {
        let start = frame * wal::frame_size(self.header.page_size) + wal::FRAME_HEADER_SIZE;
        os::read_exact_at("read:log", &self.file, page, (wal::HEADER_SIZE + start) as u64)
    }
}
