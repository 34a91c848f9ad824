//! Verifies a received LTX file: a small one when all of it is there, a large one while the rest of it
//! still arrives, by a thread that reads the temporary file behind the writer.
//!
//! Invariant: nothing that the thread finds is taken for true before the whole file was written and
//! read to its end ([`Follow::finish`]).

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};

use ltx::{Decoder, Header, Pgno, Trailer};

use super::PageList;
use crate::limits;
use crate::sqlite::header::{DatabaseHeader, JournalMode};

/// What an LTX file says, all of it verified.
pub(super) struct Verified {
    pub(super) header: Header,
    pub(super) trailer: Trailer,
    /// The checksum of each of its pages, ascending.
    pub(super) sums: PageList,
    /// What page 1 says of the journal mode, if it is among them.
    pub(super) mode: Option<JournalMode>,
}

/// Reads a whole LTX file.
pub(super) fn verify(source: impl Read) -> Result<Verified, ltx::Error> {
    let mut decoder = Decoder::new(source)?;
    let header = *decoder.header();
    let mut page = vec![0; header.page_size.bytes()];
    let (mut sums, mut mode) = (Vec::new(), None);
    while let Some(pgno) = decoder.next_page(&mut page)? {
        sums.push((pgno, decoder.page_checksum()));
        if pgno == Pgno(1) {
            mode = DatabaseHeader::parse(&page).ok().map(|header| header.journal_mode);
        }
    }
    let trailer = decoder.finish()?;
    Ok(Verified { header, trailer, sums, mode })
}

/// A thread that verifies a file while it is written; dropped, it is over.
pub(super) struct Follow {
    progress: Arc<Progress>,
    thread: Option<JoinHandle<Result<Verified, ltx::Error>>>,
}

/// How far the file is written.
#[derive(Default)]
struct Progress {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// So many bytes, from the first, will not change any more.
    len: u64,
    end: End,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum End {
    /// More may come.
    #[default]
    Open,
    /// That was all.
    Complete,
    /// Nobody wants to know any more.
    Abandoned,
}

impl Follow {
    /// Starts to verify `file`, of which nothing is written yet.
    pub(super) fn start(file: &File) -> io::Result<Follow> {
        let progress = Arc::new(Progress::default());
        let source = Written { file: file.try_clone()?, offset: 0, progress: progress.clone() };
        let source = BufReader::with_capacity(limits::IO_BUFFER, source);
        let builder = thread::Builder::new().name("litefs-verify".into());
        let thread = builder.spawn(move || verify(source))?;
        Ok(Follow { progress, thread: Some(thread) })
    }

    /// The first `len` bytes are written.
    pub(super) fn written(&self, len: u64) {
        self.progress.set(|state| state.len = len);
    }

    /// The file is complete: waits until the rest of it is verified.
    pub(super) fn finish(mut self) -> Result<Verified, ltx::Error> {
        self.progress.set(|state| state.end = End::Complete);
        let thread = self.thread.take().expect("the thread is joined once");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Follow {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.progress.set(|state| state.end = End::Abandoned);
        // Nobody wants its result, not even a panic, which was logged.
        let _ = thread.join();
    }
}

impl Progress {
    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_one();
    }

    /// Waits until there is more than `offset` bytes; how many, or none at the end.
    fn more_than(&self, offset: u64) -> io::Result<u64> {
        let waits = |state: &mut State| state.end == End::Open && state.len <= offset;
        let state = self.changed.wait_while(self.state.lock().unwrap(), waits).unwrap();
        match state.end {
            End::Abandoned => Err(io::ErrorKind::BrokenPipe.into()),
            End::Open | End::Complete => Ok(state.len - offset),
        }
    }
}

/// Reads a file as far as it is written, and then waits for more.
struct Written {
    file: File,
    offset: u64,
    progress: Arc<Progress>,
}

impl Read for Written {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let more = self.progress.more_than(self.offset)?;
        let len = buffer.len().min(usize::try_from(more).unwrap_or(usize::MAX));
        let read = self.file.read_at(&mut buffer[..len], self.offset)?;
        if read == 0 && len > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.offset += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use ltx::{Checksum, Compression, Encoder, NodeId, PageSize, Txid};

    use super::*;

    /// A snapshot of `pages` pages that do not compress.
    fn snapshot(pages: u32) -> Vec<u8> {
        let header = Header {
            compression: Compression::Lz4,
            page_size: PageSize::new(4096).unwrap(),
            commit: pages,
            min_txid: Txid(1),
            max_txid: Txid(7),
            timestamp_ms: 1,
            pre_apply: Checksum::NONE,
            wal_offset: 0,
            wal_size: 0,
            wal_salt1: 0,
            wal_salt2: 0,
            node_id: NodeId(1),
        };
        let mut encoder = Encoder::new(Vec::new(), header).unwrap();
        let mut sum = Checksum::EMPTY;
        let mut seed = 1_u32;
        for pgno in (1..=pages).map(Pgno) {
            let next = || {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (seed >> 24) as u8
            };
            let page: Vec<u8> = std::iter::repeat_with(next).take(4096).collect();
            sum = sum.toggle(encoder.page(pgno, &page).unwrap());
        }
        encoder.finish(sum).unwrap().0
    }

    /// Writes `bytes` in pieces to a file that is followed.
    fn follow(bytes: &[u8]) -> (File, Follow) {
        let mut file = tempfile::tempfile().unwrap();
        let follow = Follow::start(&file).unwrap();
        let mut len = 0;
        for piece in bytes.chunks(10_007) {
            file.write_all(piece).unwrap();
            len += piece.len() as u64;
            follow.written(len);
        }
        (file, follow)
    }

    #[test]
    fn a_file_that_is_still_written_says_the_same_as_one_that_is_there() {
        let bytes = snapshot(700);
        let whole = verify(&bytes[..]).unwrap();
        let followed = follow(&bytes).1.finish().unwrap();
        assert_eq!((followed.header, followed.trailer), (whole.header, whole.trailer));
        assert_eq!(followed.sums.len(), 700);
        assert_eq!((followed.sums, followed.mode), (whole.sums, whole.mode));
    }

    #[test]
    fn a_damaged_or_cut_file_is_refused_however_it_is_read() {
        let bytes = snapshot(40);
        for at in (0..bytes.len()).step_by(997) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            assert!(follow(&damaged).1.finish().is_err(), "byte {at} flipped");
            assert!(follow(&bytes[..at]).1.finish().is_err(), "cut at byte {at}");
        }
        assert!(follow(&bytes).1.finish().is_ok());
    }

    #[test]
    fn bytes_count_only_once_they_are_said_to_be_written() {
        let bytes = snapshot(40);
        let mut file = tempfile::tempfile().unwrap();
        let follow = Follow::start(&file).unwrap();
        file.write_all(&bytes).unwrap();
        follow.written(bytes.len() as u64 / 2);
        assert!(follow.finish().is_err(), "the second half was never said to be there");
    }

    #[test]
    fn an_abandoned_file_ends_its_thread() {
        let bytes = snapshot(40);
        let (_file, follow) = follow(&bytes[..bytes.len() / 2]);
        drop(follow);
    }
}
