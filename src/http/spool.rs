//! A pipe from a thread that makes data under a lock to a peer that may be slow.
//!
//! The writer never waits for the reader: up to [`limits::SPOOL_MEMORY_BYTES`] stay in memory, and
//! what exceeds them goes to a file without a name, in order. A peer that keeps up costs no disk.
//!
//! Invariants: the reader gets every byte in order, and the clean end only if the writer finished;
//! a region of the file is not used again before it was read; once the reader is gone, the writer
//! fails at its next block. The file gives way to the node's own writers: it takes no room below
//! [`limits::PEER_FREE_SPACE_MIN`], and where they have none left it is given up.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use tokio::sync::{Notify, oneshot};

use crate::{limits, os};

/// The directory of spooled data in the data directory; emptied at each start.
const DIRECTORY: &str = "spool";

/// Makes the spool directory of a node and removes what a crash left there.
pub(super) fn prepare(data_dir: &Path) -> io::Result<PathBuf> {
    let dir = data_dir.join(DIRECTORY);
    os::create_dirs("spool:dir", &dir)?;
    for entry in std::fs::read_dir(&dir)? {
        os::remove_if_present("spool:clean", &entry?.path())?;
    }
    Ok(dir)
}

/// A path in the spool directory `dir` that nobody else uses.
pub(super) fn unique_path(dir: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    dir.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string())
}

/// Refuses to store `len` bytes more for a peer in `dir` where that would leave too little room to writers.
pub(super) fn check_room(dir: &Path, len: usize) -> io::Result<()> {
    keep_free(dir, limits::PEER_FREE_SPACE_MIN + len as u64)
}

fn keep_free(dir: &Path, bytes: u64) -> io::Result<()> {
    if os::free_space(dir) < bytes {
        let text = "what room is left on the disk is for writers";
        return Err(io::Error::new(io::ErrorKind::StorageFull, text));
    }
    Ok(())
}

/// A pipe whose overflow goes to a file in `dir`; and what tells when it has none, and will have none.
pub(super) fn pipe(dir: &Path) -> (Writer, Reader, Emptied) {
    let shared = Arc::new(Shared { state: Mutex::default(), changed: Notify::new() });
    let (holds, emptied) = oneshot::channel();
    let writer = Writer {
        shared: shared.clone(),
        block: BytesMut::new(),
        dir: dir.to_owned(),
        file: None,
        holds: Arc::new(holds),
        deadline: None,
    };
    (writer, Reader { shared, dir: dir.to_owned() }, Emptied(emptied))
}

/// The other end of what the writer and the overflow hold.
pub(super) struct Emptied(oneshot::Receiver<Infallible>);

impl Emptied {
    /// Waits until the pipe takes up no room on the disk, and will not any more.
    pub(super) async fn wait(self) {
        let _ = self.0.await; // it never comes: its sender goes
    }
}

/// A file of what exceeds the memory.
struct Overflow {
    file: File,
    _holds: Arc<oneshot::Sender<Infallible>>,
}

struct Shared {
    /// What was written and not read.
    state: Mutex<State>,
    /// The reader has something to look at.
    changed: Notify,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Piece>,
    /// Bytes of the queue in memory.
    memory: usize,
    /// Bytes of the file that were written and not read.
    file_pending: u64,
    writer: Side,
    reader: Side,
}

#[derive(Default, PartialEq, Eq, Clone, Copy)]
enum Side {
    #[default]
    Open,
    Finished,
    Gone,
}

enum Piece {
    Memory(Bytes),
    File { file: Arc<Overflow>, offset: u64, len: u64 },
}

/// The end that the data goes into; blocking.
pub(super) struct Writer {
    shared: Arc<Shared>,
    block: BytesMut,
    dir: PathBuf,
    /// The overflow, and where its next byte goes.
    file: Option<(Arc<Overflow>, u64)>,
    holds: Arc<oneshot::Sender<Infallible>>,
    deadline: Option<Instant>,
}

impl Writer {
    /// From now on, the writer fails once `deadline` has passed.
    pub(super) fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// Ends the data cleanly.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.flush_block()?;
        self.shared.state.lock().unwrap().writer = Side::Finished;
        Ok(())
    }

    fn flush_block(&mut self) -> io::Result<()> {
        if self.block.is_empty() {
            return Ok(());
        }
        if self.deadline.is_some_and(|deadline| Instant::now() > deadline) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let block = std::mem::take(&mut self.block).freeze();
        let pending = {
            let mut state = self.shared.state.lock().unwrap();
            if state.reader == Side::Gone {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            if state.memory + block.len() <= limits::SPOOL_MEMORY_BYTES {
                state.memory += block.len();
                state.queue.push_back(Piece::Memory(block));
                drop(state);
                self.shared.changed.notify_one();
                return Ok(());
            }
            state.file_pending
        };
        self.spill(&block, pending)
    }

    /// Puts `block` into the file, from its beginning if all of it was read.
    fn spill(&mut self, block: &[u8], pending: u64) -> io::Result<()> {
        check_room(&self.dir, block.len())?;
        let (file, end) = match self.file.take() {
            Some((file, _)) if pending == 0 => (file, 0),
            Some(file) => file,
            None => (Arc::new(self.overflow()?), 0),
        };
        os::write_at("spool:write", &file.file, block, end)?;
        let added = block.len() as u64;
        let mut state = self.shared.state.lock().unwrap();
        state.file_pending += added;
        match state.queue.back_mut() {
            Some(Piece::File { offset, len, .. }) if *offset + *len == end => *len += added,
            _ => state.queue.push_back(Piece::File { file: file.clone(), offset: end, len: added }),
        }
        drop(state);
        self.shared.changed.notify_one();
        self.file = Some((file, end + added));
        Ok(())
    }

    /// A file without a name.
    fn overflow(&self) -> io::Result<Overflow> {
        let path = unique_path(&self.dir);
        let file = os::create_new("spool:create", &path)?;
        os::remove("spool:unlink", &path)?;
        Ok(Overflow { file, _holds: self.holds.clone() })
    }
}

impl Write for Writer {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.block.capacity() == 0 {
            self.block.reserve(limits::BODY_PIECE_BYTES);
        }
        let len = data.len().min(limits::BODY_PIECE_BYTES - self.block.len());
        self.block.extend_from_slice(&data[..len]);
        if self.block.len() == limits::BODY_PIECE_BYTES {
            self.flush_block()?;
        }
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(()) // whole blocks only; finish() brings the rest
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock().unwrap();
        if state.writer == Side::Open {
            state.writer = Side::Gone;
        }
        drop(state);
        self.shared.changed.notify_one();
    }
}

/// The end that the data comes out of; asynchronous.
pub(super) struct Reader {
    shared: Arc<Shared>,
    dir: PathBuf,
}

impl Reader {
    /// The next data, at most [`limits::BODY_PIECE_BYTES`]; `None` at the clean end. A writer that
    /// gave up is [`io::ErrorKind::UnexpectedEof`]; its own error says why. Cancelled while the file
    /// is read, it loses data: then the reader must not be used again.
    pub(super) async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            match self.take() {
                Taken::Memory(data) => return Ok(Some(data)),
                Taken::File { file, offset, len } => {
                    return self.read(file, offset, len).await.map(Some);
                }
                Taken::End(Side::Open) => self.shared.changed.notified().await,
                Taken::End(Side::Finished) => return Ok(None),
                Taken::End(Side::Gone) => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
    }

    /// Waits until [`Reader::next`] has something, be it the end.
    pub(super) async fn ready(&self) {
        loop {
            if self.has_something() {
                return;
            }
            self.shared.changed.notified().await;
        }
    }

    fn has_something(&self) -> bool {
        let state = self.shared.state.lock().unwrap();
        !state.queue.is_empty() || state.writer != Side::Open
    }

    fn take(&self) -> Taken {
        let mut state = self.shared.state.lock().unwrap();
        match state.queue.pop_front() {
            None => Taken::End(state.writer),
            Some(Piece::Memory(data)) => {
                state.memory -= data.len();
                Taken::Memory(data)
            }
            Some(Piece::File { file, offset, len }) => {
                let part = len.min(limits::BODY_PIECE_BYTES as u64);
                if part < len {
                    let rest =
                        Piece::File { file: file.clone(), offset: offset + part, len: len - part };
                    state.queue.push_front(rest);
                }
                Taken::File { file, offset, len: part as usize } // at most BODY_PIECE_BYTES
            }
        }
    }

    async fn read(&self, file: Arc<Overflow>, offset: u64, len: usize) -> io::Result<Bytes> {
        let dir = self.dir.clone();
        let read = tokio::task::spawn_blocking(move || {
            keep_free(&dir, limits::FREE_SPACE_MIN)?;
            let mut data = vec![0; len];
            os::read_exact_at("read:spool", &file.file, &mut data, offset)?;
            Ok::<_, io::Error>(Bytes::from(data))
        });
        let data = read.await.map_err(io::Error::other)??;
        self.shared.state.lock().unwrap().file_pending -= len as u64;
        Ok(data)
    }
}

enum Taken {
    Memory(Bytes),
    File { file: Arc<Overflow>, offset: u64, len: usize },
    End(Side),
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.shared.state.lock().unwrap().reader = Side::Gone;
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot::error::TryRecvError;

    use super::*;

    /// Bytes that are different at each offset modulo a prime.
    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at % 251) as u8).collect()
    }

    async fn read_all(mut reader: Reader) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(data) = reader.next().await? {
            all.extend_from_slice(&data);
        }
        Ok(all)
    }

    #[tokio::test]
    async fn a_reader_that_comes_late_gets_everything_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let data = pattern(3 * limits::SPOOL_MEMORY_BYTES + 12_345);
        let (mut writer, reader, _) = pipe(dir.path());
        writer.write_all(&data).unwrap();
        writer.finish().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the file has no name");
        assert!(read_all(reader).await.unwrap() == data);
    }

    #[tokio::test]
    async fn a_reader_that_falls_behind_and_catches_up_gets_everything() {
        let dir = tempfile::tempdir().unwrap();
        let data = pattern(limits::SPOOL_MEMORY_BYTES * 2);
        let (mut writer, mut reader, _) = pipe(dir.path());
        let mut read = Vec::new();
        for _ in 0..3 {
            writer.write_all(&data).unwrap();
            while read.len() % data.len() < data.len() - limits::BODY_PIECE_BYTES {
                read.extend_from_slice(&reader.next().await.unwrap().unwrap());
            }
            read.extend_from_slice(&reader.next().await.unwrap().unwrap());
        }
        writer.finish().unwrap();
        assert_eq!(reader.next().await.unwrap(), None);
        assert!(read == data.repeat(3));
    }

    #[tokio::test]
    async fn a_writer_that_gives_up_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let (mut writer, reader, _) = pipe(dir.path());
        writer.write_all(&pattern(limits::BODY_PIECE_BYTES + 1)).unwrap();
        drop(writer);
        assert_eq!(read_all(reader).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_writer_whose_reader_left_fails() {
        let (mut writer, reader, _) = pipe(Path::new("/nonexistent"));
        drop(reader);
        let error = writer.write_all(&pattern(limits::BODY_PIECE_BYTES)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_writer_past_its_deadline_fails() {
        let (mut writer, _reader, _) = pipe(Path::new("/nonexistent"));
        writer.set_deadline(Some(Instant::now()));
        let error = writer.write_all(&pattern(limits::BODY_PIECE_BYTES)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_pipe_is_emptied_by_its_reader() {
        let dir = tempfile::tempdir().unwrap();
        let is_empty = |emptied: &mut Emptied| emptied.0.try_recv() == Err(TryRecvError::Closed);
        let data = pattern(2 * limits::SPOOL_MEMORY_BYTES);
        let (mut writer, reader, mut emptied) = pipe(dir.path());
        writer.write_all(&data).unwrap();
        writer.finish().unwrap();
        assert!(!is_empty(&mut emptied), "the end is on the disk");
        assert!(read_all(reader).await.unwrap() == data);
        emptied.wait().await;

        let (mut writer, reader, mut emptied) = pipe(dir.path());
        writer.write_all(&data).unwrap();
        writer.finish().unwrap();
        assert!(!is_empty(&mut emptied), "the end is on the disk");
        drop(reader);
        emptied.wait().await;

        let (mut writer, _reader, mut emptied) = pipe(dir.path());
        writer.write_all(&pattern(limits::SPOOL_MEMORY_BYTES)).unwrap();
        assert!(!is_empty(&mut emptied), "more may come");
        writer.finish().unwrap();
        emptied.wait().await;
    }

    #[test]
    fn leftovers_of_a_crash_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let spool = prepare(dir.path()).unwrap();
        os::create_new("test", &unique_path(&spool)).unwrap();
        prepare(dir.path()).unwrap();
        assert_eq!(std::fs::read_dir(spool).unwrap().count(), 0);
    }
}
