//! Commits of WAL mode: the frames between the last captured one and the end of what is committed.
//!
//! With passthrough the end is `mxFrame` of the wal-index, whose pages we share with the clients: what
//! a client wrote without getting as far as the header does not count, for SQLite will overwrite it.
//! Without passthrough the wal-index is out of sight, and the last valid commit frame counts; if it
//! is overwritten later, the next capture compares every page ([`super::resync`]).
//!
//! Work is proportional to the new frames: one or a few large reads, each frame's salts and running
//! checksum verified (WAL format, section 4.1), the last image of each page taken.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use ltx::{PageSize, Pgno};

use super::{Change, Sink, zero_page_sum};
use crate::engine::db::Db;
use crate::engine::error::{Error, Result};
use crate::engine::files::FileKind;
use crate::engine::locks::Handle;
use crate::engine::transaction::{Draft, Overlay, PageRef, WalSpan, ZERO_PAGE};
use crate::sqlite::wal::{self, Frame, Salts, WalCursor, WalHeader};
use crate::sqlite::wal_index::{CKPT_AT, IndexHeader};
use crate::{limits, os};

/// How far the WAL is captured.
#[derive(Debug, Default)]
pub struct WalState {
    /// After the last captured frame; none if nothing of the present WAL is captured.
    cursor: Option<WalCursor>,
    /// A client wrote over captured frames.
    overwritten: bool,
    /// A commit frame that was written and did not follow from the frames before it: its checksum, or
    /// theirs, will be written again.
    pub(super) incomplete: Option<u32>,
    /// The open file through which the present writer wrote; none if it has not yet, or there is none.
    writer: Option<Handle>,
    /// The last that the present writer was told is that its frames cannot stay.
    pub(super) refused: bool,
    /// They are invalid now, and the kernel may still have them as they were.
    pub(super) cut_is_untold: bool,
    /// The last captured frames were written by somebody who died, or was refused.
    pub(super) doubtful: bool,
    /// A page that the last captured transaction changed, if its frames were just followed.
    witness: Option<Pgno>,
    /// Reused for reading frames.
    buffer: Vec<u8>,
}

/// Up to where frames are committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// To this frame, says the wal-index.
    Frame(u32),
    /// As far as valid commit frames go.
    LastCommit,
}

/// How many frames are read first where nobody says how many there are: those of a small transaction,
/// and one behind them.
const FIRST_FRAMES: usize = 4;

/// Whether the chain has all that is committed to the WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Captured {
    /// It has, or will as soon as it is written.
    All,
    /// Frames may be missing; the database is in the failed state.
    Failed,
}

impl WalState {
    /// The last captured frame; 0 for none.
    pub fn frame(&self) -> u32 {
        self.cursor.map_or(0, |cursor| cursor.frame())
    }

    /// Everything up to `cursor` is captured.
    pub fn resume(&mut self, cursor: WalCursor) {
        self.clear();
        self.cursor = Some(cursor);
    }

    /// There is no WAL any more.
    pub fn clear(&mut self) {
        self.cursor = None;
        self.overwritten = false;
        self.doubtful = false;
        self.witness = None;
    }

    /// The same place.
    pub fn fork(&self) -> WalState {
        WalState { cursor: self.cursor, overwritten: self.overwritten, ..WalState::default() }
    }

    /// Whether the captured frames are of the WAL with these salts.
    fn is_of(&self, salts: Salts) -> bool {
        self.cursor.is_some_and(|cursor| cursor.salts() == salts)
    }

    /// Whether all frames to `end` of the WAL with these salts are captured.
    fn is_at(&self, end: End, salts: Salts) -> bool {
        end == End::Frame(if self.is_of(salts) { self.frame() } else { 0 })
    }

    /// Whether no frame follows on the captured ones in this file, whose header has these salts.
    fn is_all_of(&self, wal: &File, salts: Salts) -> bool {
        let next = match self.cursor.filter(|cursor| cursor.salts() == salts) {
            Some(cursor) => cursor.offset() + cursor.frame_size() as u64,
            None => wal::HEADER_SIZE as u64 + 1,
        };
        !self.overwritten && wal.metadata().is_ok_and(|meta| meta.len() < next)
    }

    /// Whether captured frames are no longer there.
    fn is_cut(&self, end: End) -> bool {
        self.overwritten || matches!(end, End::Frame(frame) if frame < self.frame())
    }

    /// After the last captured frame of the WAL with this header.
    pub(super) fn cursor_in(&self, header: &WalHeader) -> WalCursor {
        let captured = self.cursor.filter(|cursor| cursor.salts() == header.salts);
        captured.unwrap_or(WalCursor::start(header))
    }

    /// The frame that `write` may make valid: one of which it has the last bytes, or the header if
    /// that was still wrong.
    pub(super) fn ends_at(&self, header: &WalHeader, write: &Overlay<'_>) -> Option<u32> {
        let frame_size = wal::frame_size(header.page_size) as u64;
        let frames = |offset: u64| {
            let offset = offset.checked_sub(wal::HEADER_SIZE as u64)?;
            let count = u32::try_from(offset / frame_size).ok()?;
            (offset % frame_size == 0).then_some(count)
        };
        let last = frames(write.offset + write.data.len() as u64);
        let again = || {
            let is_header = write.data.len() == wal::FRAME_HEADER_SIZE;
            let frame = frames(write.offset).filter(|_| is_header)? + 1;
            (self.incomplete == Some(frame)).then_some(frame)
        };
        last.or_else(again).filter(|frame| *frame > self.cursor_in(header).frame())
    }

    /// Whether the present writer writes through this open file.
    pub(super) fn is_written_through(&self, via: Handle) -> bool {
        self.writer == Some(via)
    }

    /// A page that shows whether the last captured transaction is in the database file.
    pub(super) fn witness(&self) -> Option<Pgno> {
        self.witness
    }

    /// Whether the holder of WRITE has written anything.
    pub(super) fn has_writer(&self) -> bool {
        self.writer.is_some()
    }

    /// Whether a write at `offset` is the first over captured frames, or starts the log over.
    fn ends_captured(&self, offset: u64) -> bool {
        let over = |cursor: WalCursor| cursor.frame() > 0 && offset < cursor.offset();
        !self.overwritten && self.cursor.is_some_and(over)
    }

    /// The present writer gives its lock up.
    pub(super) fn end_writing(&mut self) {
        self.writer = None;
    }

    /// A write through us at `offset`, bytes into the file, is to be made.
    fn note_write(&mut self, offset: u64, via: Handle) {
        self.writer = Some(via);
        self.refused = false;
        self.doubtful &= self.cursor.is_none_or(|cursor| cursor.offset() != offset);
        self.overwritten |=
            offset > 0 && self.cursor.is_some_and(|cursor| offset < cursor.offset());
    }

    /// The write at `offset` was made. Not earlier: if it fails, the header of before may still stand there, and
    /// captured frames must not be taken for new ones. (Behind a torn header no frame is valid.)
    pub(super) fn note_written(&mut self, offset: u64) {
        if offset == 0 {
            // A header has a checksum of its own that the first frame continues.
            self.clear();
            self.incomplete = None;
        }
    }
}

impl Db {
    /// Captures what was committed to the WAL. A failure puts the database into the failed state;
    /// SQLite ignores the result of the unlock that this is called for. A file call that failed is made again.
    pub(crate) fn capture_wal(&self) -> Captured {
        self.capture_and_conclude(&mut self.change.lock().unwrap())
    }

    /// As [`Db::capture_wal`], of a database that has failed, by a worker: that waits for nobody who changes something, and
    /// leaves a comparison of all pages to the applier.
    pub(in crate::engine) fn try_capture(&self) -> Captured {
        match self.change.try_lock() {
            Ok(mut change) if !change.needs_resync => self.capture_and_conclude(&mut change),
            _ => {
                self.try_again();
                Captured::Failed
            }
        }
    }

    fn capture_and_conclude(&self, change: &mut Change) -> Captured {
        let start = Instant::now();
        let captured = self.capture_finished(change);
        self.conclude_capture(start, captured)
    }

    /// A write to the WAL is to be made. What captured transactions refer to is in their LTX files before it is
    /// overwritten: after a restart of the log it is in any case, but not if SQLite did not take them for committed.
    pub(super) fn begin_wal_write(
        &self,
        change: &mut Change,
        offset: u64,
        via: Handle,
    ) -> Result<()> {
        if change.wal.ends_captured(offset) {
            self.chain.flush()?;
        }
        change.wal.note_write(offset, via);
        Ok(())
    }

    /// Says what a capture that began at `start` means for the database. With the right to change, so that the last
    /// one counts.
    pub(super) fn conclude_capture(&self, start: Instant, captured: Result<()>) -> Captured {
        let error = match captured {
            Ok(()) => {
                self.counters.capture.note_since(start);
                self.mend();
                return Captured::All;
            }
            // It has failed before; who writes just now captures it all at the end.
            Err(Error::Busy { .. }) => return Captured::Failed,
            Err(error) => error,
        };
        self.fail(&error);
        // What does not fit together is the work of a client that died: the next one recovers it, and gives
        // WRITE up afterwards.
        if let Error::Io { .. } = error {
            self.try_again();
        }
        Captured::Failed
    }

    /// Whether a client is in a transaction of which only its unlock says that it is over, for the wal-index is out of
    /// sight. An exclusive connection gives up nothing when it has committed. What others committed before was
    /// captured when they gave WRITE up, unless the database has failed. A checkpoint moves these, and at most one
    /// more whose writer is just about to: its frames stay in the log until that has captured it.
    /// Asked with the right to change, so that the answer stays true: each write to the WAL takes that.
    fn is_commit_on_its_way(&self) -> bool {
        !self.shared.is_passthrough() && self.is_written() && !self.is_locked_exclusively()
    }

    /// Captures the new transactions of the WAL, but for one that may not be over. Those that came too late are
    /// set aside.
    pub(in crate::engine) fn capture_finished(&self, change: &mut Change) -> Result<()> {
        match (self.is_commit_on_its_way(), self.has_failed()) {
            (false, _) => self.capture_all(change),
            (true, false) => Ok(()),
            (true, true) => {
                Err(self.busy("a client writes, and what was committed before is not captured"))
            }
        }
    }

    /// As [`Db::capture_finished`], also what a client has written that holds WRITE.
    pub(super) fn capture_all(&self, change: &mut Change) -> Result<()> {
        self.refuse_lost()?;
        self.cut_late(change)?;
        let Some(backing) = self.files.get(FileKind::Wal) else { return Ok(()) };
        if change.wal.refused && !self.shared.is_passthrough() {
            return Ok(());
        }
        let Some((end, salts)) = self.committed_end(&backing.file)? else { return Ok(()) };
        let seen = change.strays.as_deref().unwrap_or(change);
        let known = match end {
            End::Frame(_) => seen.wal.is_at(end, salts),
            End::LastCommit => !seen.needs_resync && seen.wal.is_all_of(&backing.file, salts),
        };
        if known {
            return Ok(());
        }
        if change.strays.is_none() {
            if self.shared.is_writable() {
                return self.capture_to(end, salts, change, &backing.file, Sink::Chain);
            }
            // On a replica only what the primary has taken is no stray.
            if self.has_pending() {
                let captured = self.capture_to(end, salts, change, &backing.file, Sink::Chain);
                if !matches!(captured, Err(Error::NotTaken { .. })) {
                    return captured;
                }
            }
        }
        self.set_strays_aside(end, salts, change, &backing.file)
    }

    /// Captures what a connection committed to the WAL that keeps its wal-index to itself (a VFS without shared memory),
    /// when it moves frames to the database file: all valid ones, as for who builds the index from the log.
    /// Whether there was anything.
    pub(in crate::engine) fn capture_unindexed(&self, change: &mut Change) -> Result<bool> {
        let Some(backing) = self.files.get(FileKind::Wal) else { return Ok(false) };
        let Some(header) = self.wal_header(&backing.file)? else { return Ok(false) };
        if change.wal.is_all_of(&backing.file, header.salts) {
            return Ok(false);
        }
        if change.strays.is_some() || !self.shared.is_writable() {
            return Err(self.corrupt("checkpoint", "its wal-index is out of sight"));
        }
        let before = change.pos;
        self.capture_to(End::LastCommit, header.salts, change, &backing.file, Sink::Chain)?;
        Ok(change.pos != before)
    }

    /// Takes the transactions up to `end` into `change`.
    fn capture_to(
        &self,
        end: End,
        salts: Salts,
        change: &mut Change,
        wal: &Arc<File>,
        sink: Sink,
    ) -> Result<()> {
        if !change.wal.is_of(salts) {
            let header = self.wal_header(wal)?.filter(|header| header.salts == salts);
            let Some(header) = header else {
                // The last application of a persistent WAL with a size limit cuts it and leaves the wal-index as it is
                // (wal.c, `walLimitSize`). What it held was captured before.
                let meta = wal.metadata();
                if meta.map_err(self.files.error("stat", FileKind::Wal))?.len() == 0 {
                    return Ok(());
                }
                return Err(self.corrupt("read wal header", "its salts are not the wal-index's"));
            };
            change.wal.resume(WalCursor::start(&header));
        }
        if change.wal.is_cut(end) || change.needs_resync {
            change.needs_resync = true;
            self.resync_wal(change, wal, end, sink)?;
            // Which of its pages the last commit changed is not known.
            change.wal.doubtful = !self.shared.is_passthrough();
            return Ok(());
        }
        let result = self.read_frames(change, wal, end, sink);
        change.needs_resync |= result.is_err();
        result
    }

    /// Keeps what was committed when this node was no primary any more. The state of the chain stays
    /// what it is.
    fn set_strays_aside(
        &self,
        end: End,
        salts: Salts,
        change: &mut Change,
        wal: &Arc<File>,
    ) -> Result<()> {
        if !change.wal.is_of(salts) {
            // Started over: all captured frames are in the database file.
            change.wal.clear();
        }
        let mut strays = change.strays.take().unwrap_or_else(|| Box::new(change.fork()));
        let before = strays.pos;
        let kept = self.capture_to(end, salts, &mut strays, wal, Sink::LostFound);
        if strays.pos != before {
            self.has_strays.store(true, Ordering::SeqCst);
        }
        let has_strays = strays.pos != change.pos;
        change.strays = has_strays.then_some(strays);
        kept?;
        if change.wal.is_cut(end) {
            let text = "frames that are in the chain were overwritten";
            let error = self.corrupt("go back to the chain", text);
            self.fail_for_good(&error);
            self.shared.request_reconnect();
            // Else this would count as a capture that went well, which mends the database.
            return Err(error);
        }
        Ok(())
    }

    /// Where committed frames end, and the salts of their WAL; none if there is no valid WAL.
    fn committed_end(&self, wal: &File) -> Result<Option<(End, Salts)>> {
        if !self.shared.is_passthrough() {
            return Ok(self.wal_header(wal)?.map(|header| (End::LastCommit, header.salts)));
        }
        // Two copies that differ are a client that died while writing them: SQLite's next client
        // recovers the index, and what that finds is captured when it gives the WRITE lock back.
        let header = IndexHeader::parse(&self.index_header()?);
        Ok(header.map(|header| (End::Frame(header.mx_frame), header.salts)))
    }

    /// The header of the wal-index, zeros if it is not all there. Only with passthrough do we see what
    /// clients see.
    pub(super) fn index_header(&self) -> Result<[u8; CKPT_AT]> {
        let mut bytes = [0; CKPT_AT];
        let Some(shm) = self.files.get(FileKind::Shm) else { return Ok(bytes) };
        let read = os::read_up_to("read:index", &shm.file, &mut bytes, 0)
            .map_err(self.files.error("read wal-index", FileKind::Shm))?;
        Ok(if read == bytes.len() { bytes } else { [0; CKPT_AT] })
    }

    /// Whether the next client has to build the wal-index anew.
    pub(in crate::engine) fn needs_index(&self) -> Result<bool> {
        Ok(!IndexHeader::is_taken(&self.index_header()?))
    }

    pub(super) fn wal_header(&self, wal: &File) -> Result<Option<WalHeader>> {
        let mut bytes = [0; wal::HEADER_SIZE];
        let read = os::read_up_to("read:wal", wal, &mut bytes, 0)
            .map_err(self.files.error("read wal header", FileKind::Wal))?;
        Ok((read == bytes.len()).then(|| WalHeader::parse(&bytes).ok()).flatten())
    }

    /// Reads frames from the last captured one to `end` and takes each transaction among them.
    fn read_frames(
        &self,
        change: &mut Change,
        wal: &Arc<File>,
        end: End,
        sink: Sink,
    ) -> Result<()> {
        let cursor = change.wal.cursor.expect("the header was read before its frames");
        if change.page_size.is_some_and(|known| known != cursor.page_size()) {
            return Err(self.corrupt("read wal header", "its page size is not the database's"));
        }
        let frame_size = cursor.frame_size();
        let all = (limits::IO_BUFFER / frame_size).max(1);
        // Behind the last commit a log that was started over has the frames of before.
        let mut most = if end == End::LastCommit { FIRST_FRAMES.min(all) } else { all };
        let mut walk = Walk::new(cursor);
        let mut buffer = std::mem::take(&mut change.wal.buffer);
        let result = loop {
            let left = match end {
                End::Frame(last) => last.saturating_sub(walk.cursor.frame()) as usize,
                End::LastCommit => usize::MAX,
            };
            if left == 0 {
                break Ok(());
            }
            let want = left.min(most) * frame_size;
            most = (4 * most).min(all);
            buffer.resize(want.max(buffer.len()), 0);
            let filled =
                match os::read_up_to("read:wal", wal, &mut buffer[..want], walk.cursor.offset()) {
                    Ok(filled) => filled,
                    Err(error) => {
                        break Err(self.files.error("read wal", FileKind::Wal)(error));
                    }
                };
            match self.take_frames(change, &mut walk, wal, &buffer[..filled], sink) {
                Ok(()) if filled == want => {}
                Ok(()) | Err(Stop::End) if end == End::LastCommit => break Ok(()),
                Ok(()) | Err(Stop::End) => {
                    let text = format!("frame {} is not valid", walk.cursor.frame() + 1);
                    break Err(self.corrupt("read wal", &text));
                }
                Err(Stop::Failed(error)) => break Err(error),
            }
        };
        buffer.truncate(limits::IDLE_BUFFER);
        buffer.shrink_to(limits::IDLE_BUFFER);
        change.wal.buffer = buffer;
        if result.is_ok() && matches!(end, End::Frame(last) if change.wal.frame() != last) {
            return Err(self.corrupt("read wal", "the last frame does not commit"));
        }
        result
    }

    /// Walks over whole frames; each commit frame ends a transaction.
    fn take_frames(
        &self,
        change: &mut Change,
        walk: &mut Walk,
        wal: &Arc<File>,
        frames: &[u8],
        sink: Sink,
    ) -> Result<(), Stop> {
        for bytes in frames.chunks(walk.cursor.frame_size()) {
            let offset = walk.cursor.offset() + wal::FRAME_HEADER_SIZE as u64;
            let frame = walk.cursor.verify(bytes).map_err(|_| Stop::End)?;
            walk.take(&frame, offset);
            if let Some(commit) = frame.commit {
                let draft = self.draft(walk, change.pages(), commit, wal);
                let transaction = change.transaction(draft);
                let is_new = |page: &&PageRef| change.sums.get(page.pgno) != page.sum;
                let witness = transaction.pages.iter().find(is_new).map(|page| page.pgno);
                self.take_transaction(change, transaction, sink).map_err(Stop::Failed)?;
                change.wal.cursor = Some(walk.cursor);
                change.wal.witness = witness;
                walk.start = walk.cursor;
                self.verify_if_strict(change).map_err(Stop::Failed)?;
            }
        }
        Ok(())
    }

    pub(super) fn draft(
        &self,
        walk: &mut Walk,
        old_pages: u32,
        commit: u32,
        wal: &Arc<File>,
    ) -> Draft {
        let (start, end) = (walk.start, walk.cursor);
        Draft {
            page_size: start.page_size(),
            commit,
            pages: walk.finish(old_pages, commit),
            source: wal.clone(),
            timestamp_ms: (self.shared.clock)(),
            node_id: self.shared.node_id,
            wal: WalSpan {
                offset: start.offset(),
                size: end.offset() - start.offset(),
                salt: (start.salts().0, start.salts().1),
            },
        }
    }
}

/// A walk over the frames of one transaction.
pub(super) struct Walk {
    /// After the last frame taken.
    pub cursor: WalCursor,
    /// Before the first frame of the transaction.
    start: WalCursor,
    /// Its pages so far, in the order of their frames.
    pages: Vec<PageRef>,
    /// What the last frame says of the size of the database; 0 within a transaction.
    pub commit: u32,
}

/// Why a walk ends.
enum Stop {
    /// The frame is not valid.
    End,
    Failed(Error),
}

impl Walk {
    /// Begins after the last captured frame.
    pub fn new(cursor: WalCursor) -> Walk {
        Walk { cursor, start: cursor, pages: Vec::new(), commit: 0 }
    }

    /// Notes a frame whose page stands at `offset`.
    pub fn take(&mut self, frame: &Frame<'_>, offset: u64) {
        if frame.pgno != self.cursor.page_size().lock_pgno() {
            let sum = ltx::page_checksum(frame.pgno, frame.page);
            self.pages.push(PageRef { pgno: frame.pgno, sum, offset });
        }
    }

    /// The last image of each page, ascending, with images of zeros for pages by which the database
    /// grew and that nobody wrote.
    fn finish(&mut self, old_pages: u32, commit: u32) -> Vec<PageRef> {
        let mut pages = std::mem::take(&mut self.pages);
        pages.retain(|page| page.pgno.0 <= commit);
        if pages.len() > 1 {
            // The sort is stable: reversed, the last image of a page stands first.
            pages.reverse();
            pages.sort_by_key(|page| page.pgno);
            pages.dedup_by_key(|page| page.pgno);
        }
        fill_grown(pages, old_pages, commit, self.cursor.page_size())
    }
}

/// `pages` with an image of zeros for each page between the old and the new size that it lacks.
fn fill_grown(
    mut pages: Vec<PageRef>,
    old_pages: u32,
    commit: u32,
    page_size: PageSize,
) -> Vec<PageRef> {
    let grown = pages.partition_point(|page| page.pgno.0 <= old_pages);
    let lock = page_size.lock_pgno();
    let holds_lock = old_pages < lock.0 && lock.0 <= commit;
    let expected = commit.saturating_sub(old_pages) as usize - usize::from(holds_lock);
    if pages.len() - grown == expected {
        return pages;
    }
    let mut written = pages.split_off(grown).into_iter().peekable();
    for pgno in (old_pages + 1..=commit).map(Pgno).filter(|pgno| *pgno != lock) {
        pages.push(written.next_if(|page| page.pgno == pgno).unwrap_or_else(|| PageRef {
            pgno,
            sum: zero_page_sum(pgno, page_size),
            offset: ZERO_PAGE,
        }));
    }
    pages
}
