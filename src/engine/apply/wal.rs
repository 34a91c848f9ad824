//! The replica's writer of a WAL: transactions go into a WAL-mode database the way SQLite itself
//! writes them, so open readers keep their snapshot and new readers see the new state.
//!
//! ```text
//! append   frames to the log, their entries into the wal-index     nobody sees them
//! publish  the wal-index header                                    new readers see them
//! checkpoint  frames to the database file, up to the oldest reader's mark
//! restart  new salts, frame 1 again, when nobody reads from the log
//! ```
//!
//! What the caller holds: WRITE exclusively while appending, publishing and restarting (a reader that
//! meets a header in the making asks for WRITE and, granted, rebuilds the wal-index), CKPT while
//! checkpointing, DMS shared all the time (so that no client resets the wal-index) and SHARED on the
//! database file (so that the last client to leave neither checkpoints nor removes the log). The
//! READ locks are taken here, through [`CheckpointLocks`].
//!
//! Clients either have the very pages of the wal-index mapped, or (without passthrough) pages of the
//! mount that hold what was read when they were last dropped ([`Index::OutOfSight`]). In the latter case they write
//! nothing into it: nobody gets READ1 to READ4 exclusively. Each publish sets a mark for the readers to come,
//! who are spared two lock calls by that where they could set it themselves.
//!
//! Order, as in SQLite (WAL-mode File Format, section 2; "Write-Ahead Logging"): frames, then
//! entries, then header copy 1, then copy 0. A checkpoint syncs the log before it writes to the
//! database file, and syncs the database file before the log may start over; a new log's header is
//! synced before its first frame. Appending syncs nothing: the LTX files are what is durable.
//!
//! Invariants: frames up to the published one are never written again before a restart; the lock
//! page is in no frame; frames that were taken back do not follow from the frames before them.

mod mirror;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, BufReader};
use std::sync::Arc;

use ltx::{PageSize, Pgno};

use self::mirror::{Growth, Mirror};
use crate::engine::unsynced;
use crate::os;
use crate::sqlite::lock_byte::{Lock, LockSet};
use crate::sqlite::wal::{
    self, ByteOrder, FRAME_HEADER_SIZE, Frame, FrameReader, HEADER_SIZE, Salts, WalChecksum,
    WalCursor, WalHeader,
};
use crate::sqlite::wal_index::{CheckpointInfo, IndexHeader, READ_MARK_UNUSED, READ_MARKS};

/// How many bytes are written to the log or the database file at once, at most, if a page is not
/// larger: beyond about 1 MiB a write gains nothing.
const WRITE_SIZE: usize = 1 << 20;

/// How large the buffer of frames stays between transactions, in bytes: enough for small ones, and
/// little for each of many databases.
const IDLE_CAPACITY: usize = 64 << 10;

/// The number of the last read mark.
const LAST_MARK: usize = READ_MARKS - 1;

/// Why the log could not be written. After an error of append or publish the caller takes back what
/// is not published ([`WalWriter::rollback_unpublished`]) before it tries again; a checkpoint or a
/// restart can be tried again as it is.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file call failed.
    #[error("{step}")]
    Io {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A page that no log can hold: page 0, the lock page, or not of the database's page size.
    #[error("page {pgno} cannot be in a wal")]
    Page {
        /// Its number.
        pgno: Pgno,
    },
}

fn io_error(step: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { step, source }
}

/// The READ locks, as a checkpoint needs them.
pub trait CheckpointLocks {
    /// Takes all of `set` exclusively if nobody else has any of it; whether it did. Must not wait.
    fn try_lock(&mut self, set: LockSet) -> bool;
    /// Gives them back.
    fn unlock(&mut self, set: LockSet);
}

/// What clients have cached of the files; a call returns when nothing stale is left. Of the log they
/// have nothing cached.
pub trait ReaderCache {
    /// `len` bytes of the database file at `offset` are new.
    fn pages_changed(&self, offset: u64, len: u64);
    /// The database file may have another length.
    fn size_changed(&self);
    /// `len` bytes of the wal-index at `offset` are new.
    fn index_written(&self, offset: u64, len: u64);
    /// The wal-index has become longer.
    fn index_grown(&self);
}

/// The open files of one database, for reading and writing.
#[derive(Debug, Clone)]
pub struct WalFiles {
    /// The database file.
    pub database: Arc<File>,
    /// The log.
    pub wal: Arc<File>,
    /// The wal-index, the very file whose pages clients map.
    pub shm: Arc<File>,
}

/// How far a checkpoint came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// So many frames, from the first, are in the database file.
    pub backfilled: u32,
    /// So many frames are in the log.
    pub frames: u32,
}

impl Progress {
    /// Whether the log may be restarted as soon as nobody reads from it.
    pub fn is_complete(self) -> bool {
        self.backfilled == self.frames
    }
}

/// Whether the log starts over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restart {
    /// The next frame is frame 1.
    Done,
    /// Frames are not in the database file yet, or somebody reads from the log, or something is not
    /// published.
    Blocked,
}

/// Which pages of the wal-index clients have mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Index {
    /// Ours.
    Shared,
    /// Copies, into which they write nothing.
    OutOfSight,
}

/// Whether the header of the log stands in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Log {
    /// The first frame writes it.
    Fresh,
    Started,
}

/// Writes the WAL of one database; the only writer while it lives.
#[derive(Debug)]
pub struct WalWriter {
    files: WalFiles,
    page_size: PageSize,
    random: fn() -> u32,
    index: Index,
    log: Log,
    header: WalHeader,
    /// Where the next frame goes.
    cursor: WalCursor,
    /// What readers see.
    published: IndexHeader,
    /// What they will see after the next publish: the end of the last whole transaction.
    appended: IndexHeader,
    /// So many frames are in the database file.
    backfilled: u32,
    mirror: Mirror,
    /// The number of the mark that was set last, but for mark 1.
    marked: usize,
    /// The page that was appended last; it becomes a frame when it is known whether it is the last
    /// of its transaction.
    held: Option<Pgno>,
    held_page: Vec<u8>,
    /// Frames that are not written to the log yet; they end at the cursor.
    frames: Vec<u8>,
    /// The log was written up to this byte.
    written: u64,
}

impl WalWriter {
    /// Goes on with the log and the wal-index as they are. If the wal-index does not count, it is
    /// made from the log, or made empty over a database of `pages` pages if the log is empty; that
    /// needs every other user of the files to be locked out. `random` draws salts.
    pub fn open_or_create(
        files: WalFiles,
        page_size: PageSize,
        pages: u32,
        random: fn() -> u32,
    ) -> Result<WalWriter, Error> {
        let (mut writer, has_log) = WalWriter::new(files, page_size, pages, random)?;
        if !writer.adopt(has_log).map_err(io_error("read wal-index"))? {
            writer.make_index(has_log)?;
        }
        Ok(writer)
    }

    /// Goes on with the log, and makes the wal-index anew: what clients know of it is out of sight.
    /// From here on they write nothing into it. Every other user of the files is locked out, and the
    /// caller then drops what they have cached.
    pub fn take_over(
        files: WalFiles,
        page_size: PageSize,
        pages: u32,
        random: fn() -> u32,
    ) -> Result<WalWriter, Error> {
        let (mut writer, has_log) = WalWriter::new(files, page_size, pages, random)?;
        writer.index = Index::OutOfSight;
        writer.make_index(has_log)?;
        Ok(writer)
    }

    /// A writer that does not know the wal-index yet, and whether there is a log.
    fn new(
        files: WalFiles,
        page_size: PageSize,
        pages: u32,
        random: fn() -> u32,
    ) -> Result<(WalWriter, bool), Error> {
        let mirror = Mirror::new(files.shm.clone()).map_err(io_error("open wal-index"))?;
        let log_header = read_log_header(&files.wal, page_size).map_err(io_error("read wal"))?;
        let header = log_header.unwrap_or(WalHeader {
            order: ByteOrder::NATIVE,
            page_size,
            sequence: 0,
            salts: Salts(random(), random()),
        });
        let empty = IndexHeader {
            change: 1,
            order: header.order,
            page_size,
            mx_frame: 0,
            pages,
            frame_checksum: WalChecksum::default(),
            salts: header.salts,
        };
        let writer = WalWriter {
            files,
            page_size,
            random,
            index: Index::Shared,
            log: Log::Started,
            header,
            cursor: WalCursor::start(&header),
            published: empty,
            appended: empty,
            backfilled: 0,
            mirror,
            marked: LAST_MARK,
            held: None,
            held_page: Vec::with_capacity(page_size.bytes()),
            frames: Vec::new(),
            written: 0,
        };
        Ok((writer, log_header.is_some()))
    }

    fn make_index(&mut self, has_log: bool) -> Result<(), Error> {
        let made = if has_log { self.rebuild() } else { self.clear() };
        made.map_err(io_error("rebuild wal-index"))?;
        self.begin_log_if_blind()
    }

    /// Where the wal-index is out of sight, the log alone tells which frames count. So the header of
    /// a new run does not wait for its first frame.
    fn begin_log_if_blind(&mut self) -> Result<(), Error> {
        match self.index {
            Index::OutOfSight => self.begin_log(),
            Index::Shared => Ok(()),
        }
    }

    /// Writes the header of a new run, if the log has started over and has no frame yet. Before others
    /// write the log: if they build the wal-index anew, they must not find the frames of the former run.
    pub fn begin_log(&mut self) -> Result<(), Error> {
        match self.log {
            Log::Fresh => self.start_log().map_err(io_error("write wal header")),
            _ => Ok(()),
        }
    }

    /// Tells readers of what they were not told, because it was not published.
    pub fn tell(&mut self, cache: &dyn ReaderCache) {
        self.mirror.tell(cache);
    }

    /// Goes on with a wal-index that counts and agrees with the log; whether there is one.
    fn adopt(&mut self, has_log: bool) -> io::Result<bool> {
        let Some((index, info)) = self.mirror.read_header()? else { return Ok(false) };
        let end = wal::frame_offset(self.page_size, 1)
            + u64::from(index.mx_frame) * wal::frame_size(self.page_size) as u64;
        let same_log = has_log
            && (index.salts, index.order) == (self.header.salts, self.header.order)
            && self.files.wal.metadata()?.len() >= end;
        let agrees = index.mx_frame == 0 || (same_log && self.mirror.has_room(index.mx_frame));
        if index.page_size != self.page_size || !agrees {
            return Ok(false);
        }
        self.mirror.load(index.mx_frame)?;
        if index.mx_frame == 0 {
            self.published = IndexHeader { pages: self.published.pages, ..index };
            self.header.salts = index.salts;
            let (header, index) = self.next_run();
            self.start_over(header, index);
            return Ok(true);
        }
        self.published = index;
        self.appended = index;
        self.backfilled = info.backfill.min(index.mx_frame);
        self.cursor = WalCursor::resume(&self.header, end, index.frame_checksum);
        Ok(true)
    }

    /// Makes the wal-index from the log: every frame up to the last commit counts.
    fn rebuild(&mut self) -> io::Result<()> {
        let log = BufReader::with_capacity(
            WRITE_SIZE,
            os::FileCursor::at("read:apply-wal", self.files.wal.clone(), HEADER_SIZE as u64),
        );
        let mut reader = FrameReader::new(log, self.cursor);
        let mut committed = self.published;
        while let Ok(Frame { pgno, commit, .. }) = reader.next_frame()? {
            let cursor = *reader.cursor();
            self.mirror.push(cursor.frame(), pgno);
            if let Some(pages) = commit {
                let (mx_frame, frame_checksum) = (cursor.frame(), cursor.checksum());
                committed = IndexHeader { mx_frame, pages, frame_checksum, ..committed };
                self.cursor = cursor;
            }
        }
        if committed.mx_frame == 0 {
            return self.clear();
        }
        self.mirror.drop_after(committed.mx_frame);
        self.mirror.write_entries()?;
        let mut info = CheckpointInfo { attempted: committed.mx_frame, ..CheckpointInfo::EMPTY };
        info.read_marks[1] = committed.mx_frame;
        self.mirror.write_info(&info)?;
        self.mirror.write_header(&committed)?;
        self.published = committed;
        self.appended = committed;
        Ok(())
    }

    /// Makes the wal-index of an empty log.
    fn clear(&mut self) -> io::Result<()> {
        let (header, index) = self.next_run();
        self.start_over(header, index);
        self.mirror.clear_file()?;
        self.mirror.write_info(&CheckpointInfo::EMPTY)?;
        self.mirror.write_header(&index)
    }

    /// The header of the next run of the log, and what the wal-index says while it is empty.
    fn next_run(&self) -> (WalHeader, IndexHeader) {
        let header = WalHeader {
            order: ByteOrder::NATIVE,
            page_size: self.page_size,
            sequence: self.header.sequence.wrapping_add(1),
            salts: self.header.salts.next((self.random)()),
        };
        let WalHeader { order, salts, .. } = header;
        (header, IndexHeader { order, salts, mx_frame: 0, ..self.published })
    }

    /// Goes over to a new run of the log, whose header the first frame writes.
    fn start_over(&mut self, header: WalHeader, index: IndexHeader) {
        self.header = header;
        self.log = Log::Fresh;
        self.cursor = WalCursor::start(&header);
        self.written = 0;
        self.backfilled = 0;
        self.mirror.drop_after(0);
        self.published = index;
        self.appended = index;
    }

    /// The size of the database in pages, with all appended transactions.
    pub fn pages(&self) -> u32 {
        self.appended.pages
    }

    /// Behind the last appended transaction.
    pub fn cursor(&self) -> WalCursor {
        self.cursor_after(&self.appended)
    }

    /// How many frames are in the log, and how many of them in the database file.
    pub fn progress(&self) -> Progress {
        Progress { backfilled: self.backfilled, frames: self.published.mx_frame }
    }

    /// The newest frame of a page, with all appended transactions; `None` if the page is not in the
    /// log.
    pub fn find(&self, pgno: Pgno) -> Option<u32> {
        self.mirror.find(self.appended.mx_frame, pgno)
    }

    /// Reads the newest version of a page, with all appended transactions, into `page`, which has
    /// the size of a page. A page that was never written is zero.
    pub fn read_page(&self, pgno: Pgno, page: &mut [u8]) -> Result<(), Error> {
        match self.find(pgno) {
            Some(frame) => self.read_frame(frame, page),
            None => {
                let (file, offset) = (&self.files.database, self.page_size.offset(pgno));
                os::read_zero_extended("read:apply-database", file, page, offset)
                    .map_err(io_error("read page"))
            }
        }
    }

    fn read_frame(&self, frame: u32, page: &mut [u8]) -> Result<(), Error> {
        let offset = wal::frame_offset(self.page_size, frame) + FRAME_HEADER_SIZE as u64;
        os::read_exact_at("read:apply-wal", &self.files.wal, page, offset)
            .map_err(io_error("read wal frame"))
    }

    /// Appends one transaction, after which the database has `commit` pages. Nobody sees it.
    pub fn append<'a>(
        &mut self,
        commit: u32,
        pages: impl IntoIterator<Item = (Pgno, &'a [u8])>,
    ) -> Result<(), Error> {
        for (pgno, page) in pages {
            self.append_page(pgno, page)?;
        }
        self.append_commit(commit)
    }

    /// Appends a page to the transaction that [`WalWriter::append_commit`] will end.
    pub fn append_page(&mut self, pgno: Pgno, page: &[u8]) -> Result<(), Error> {
        let fits = pgno.0 > 0 && pgno != self.page_size.lock_pgno();
        if !fits || page.len() != self.page_size.bytes() {
            return Err(Error::Page { pgno });
        }
        self.seal(None)?;
        self.held = Some(pgno);
        self.held_page.clear();
        self.held_page.extend_from_slice(page);
        Ok(())
    }

    /// Ends a transaction, after which the database has `commit` pages.
    pub fn append_commit(&mut self, commit: u32) -> Result<(), Error> {
        if self.held.is_none() {
            if commit == self.appended.pages {
                return Ok(());
            }
            // Only a frame can carry the new size.
            let mut page = vec![0; self.page_size.bytes()];
            self.read_page(Pgno(1), &mut page)?;
            self.append_page(Pgno(1), &page)?;
        }
        self.seal(Some(commit))?;
        self.flush()?;
        self.appended = IndexHeader {
            change: self.published.change.wrapping_add(1),
            mx_frame: self.cursor.frame(),
            pages: commit,
            frame_checksum: self.cursor.checksum(),
            ..self.appended
        };
        Ok(())
    }

    /// Makes the held page a frame.
    fn seal(&mut self, commit: Option<u32>) -> Result<(), Error> {
        let Some(pgno) = self.held.take() else { return Ok(()) };
        if self.log == Log::Fresh {
            self.start_log().map_err(io_error("write wal header"))?;
        }
        self.cursor.encode(&Frame { pgno, commit, page: &self.held_page }, &mut self.frames);
        self.mirror.push(self.cursor.frame(), pgno);
        if self.frames.len() >= WRITE_SIZE { self.flush() } else { Ok(()) }
    }

    /// Writes the header of a new run. It is synced, so that after a power failure no frame of the
    /// former run follows from it.
    fn start_log(&mut self) -> io::Result<()> {
        os::write_at("apply:wal", &self.files.wal, &self.header.encode_log(), 0)?;
        os::sync("apply:wal", &self.files.wal)?;
        self.log = Log::Started;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Error> {
        let end = self.cursor.offset();
        // Even a write that fails may have written something.
        self.written = self.written.max(end);
        let start = end - self.frames.len() as u64;
        os::write_at("apply:wal", &self.files.wal, &self.frames, start)
            .map_err(io_error("write wal frames"))?;
        self.frames.clear();
        Ok(())
    }

    /// Makes all appended transactions visible at once.
    pub fn publish(
        &mut self,
        locks: &mut dyn CheckpointLocks,
        cache: &dyn ReaderCache,
    ) -> Result<(), Error> {
        if self.appended.mx_frame == self.published.mx_frame {
            return Ok(());
        }
        let growth = self.mirror.write_entries().map_err(io_error("write wal-index"))?;
        if growth == Growth::Grown {
            cache.index_grown();
        }
        self.tell(cache);
        let mark = self.take_mark(locks);
        let written = self.write_published(mark);
        self.mirror.tell(cache);
        mark.into_iter().for_each(|i| locks.unlock(LockSet::one(Lock::READ[i])));
        written.map_err(io_error("write wal-index header"))?;
        self.published = self.appended;
        self.frames.shrink_to(IDLE_CAPACITY);
        Ok(())
    }

    /// Takes the lock of a mark that no reader uses; its number, if there is one. Preferably not that of the mark which
    /// the next reader would take now; and mark 1 last, which so stays where a checkpoint or a restart left it: at no frame
    /// that somebody does not know yet.
    fn take_mark(&mut self, locks: &mut dyn CheckpointLocks) -> Option<usize> {
        let after = |i: usize| if i < LAST_MARK { i + 1 } else { 2 };
        let (next, then) = (after(self.marked), after(after(self.marked)));
        let mut order = [next, then, self.marked, 1].into_iter();
        let free = order.find(|i| locks.try_lock(LockSet::one(Lock::READ[*i])));
        self.marked = free.filter(|i| *i > 1).unwrap_or(self.marked);
        free
    }

    /// Writes the header, and mark number `mark` for its new readers.
    fn write_published(&mut self, mark: Option<usize>) -> io::Result<()> {
        if let Some(i) = mark {
            self.mirror.write_mark(i, self.appended.mx_frame)?;
        }
        self.mirror.write_header(&self.appended).inspect_err(|_| {
            // Readers must not be left with two copies that differ; the first error tells.
            let _ = mark.map(|i| self.mirror.write_mark(i, self.published.mx_frame));
            let _ = self.mirror.write_header(&self.published);
        })
    }

    /// Takes back the pages that were appended since the last whole transaction.
    pub fn rollback_transaction(&mut self) -> Result<(), Error> {
        self.roll_back_to(self.appended)
    }

    /// Takes back everything that was appended since the last publish.
    pub fn rollback_unpublished(&mut self) -> Result<(), Error> {
        self.roll_back_to(self.published)
    }

    fn roll_back_to(&mut self, target: IndexHeader) -> Result<(), Error> {
        self.held = None;
        self.frames.clear();
        self.mirror.drop_after(target.mx_frame);
        self.appended = target;
        self.cursor = self.cursor_after(&target);
        let end = self.cursor.offset();
        if self.written <= end {
            return Ok(());
        }
        // After a crash every commit frame counts that follows from those before it.
        let nothing = [0; FRAME_HEADER_SIZE];
        os::write_at("apply:wal", &self.files.wal, &nothing, end)
            .map_err(io_error("take back wal frames"))?;
        self.written = end;
        Ok(())
    }

    fn cursor_after(&self, index: &IndexHeader) -> WalCursor {
        if index.mx_frame == 0 {
            return WalCursor::start(&self.header);
        }
        let frames = u64::from(index.mx_frame) * wal::frame_size(self.page_size) as u64;
        WalCursor::resume(&self.header, HEADER_SIZE as u64 + frames, index.frame_checksum)
    }

    /// Copies published frames into the database file, as far as readers allow.
    pub fn checkpoint(
        &mut self,
        locks: &mut dyn CheckpointLocks,
        cache: &dyn ReaderCache,
    ) -> Result<Progress, Error> {
        if self.backfilled < self.published.mx_frame {
            let safe = self.safe_frame(locks, cache).map_err(io_error("read wal-index marks"))?;
            // READ0 keeps those out who read the database file alone.
            let read_0 = LockSet::one(Lock::Read0);
            if self.backfilled < safe && locks.try_lock(read_0) {
                let copied = self.backfill(safe, cache);
                self.mirror.tell(cache);
                locks.unlock(read_0);
                copied?;
            }
        }
        Ok(self.progress())
    }

    /// The last frame that no reader minds in the database file. Marks that nobody uses are moved
    /// out of the way.
    fn safe_frame(
        &mut self,
        locks: &mut dyn CheckpointLocks,
        cache: &dyn ReaderCache,
    ) -> io::Result<u32> {
        let mut safe = self.published.mx_frame;
        for (i, lock) in Lock::READ.into_iter().enumerate().skip(1) {
            let mark = self.mirror.read_mark(i)?;
            if mark >= safe {
                continue;
            }
            if !locks.try_lock(LockSet::one(lock)) {
                safe = mark;
                continue;
            }
            let moved = self.mirror.write_mark(i, if i == 1 { safe } else { READ_MARK_UNUSED });
            self.mirror.tell(cache);
            locks.unlock(LockSet::one(lock));
            moved?;
        }
        Ok(safe)
    }

    /// Copies the frames up to `safe`.
    fn backfill(&mut self, safe: u32, cache: &dyn ReaderCache) -> Result<(), Error> {
        self.mirror.write_attempted(safe).map_err(io_error("write wal-index"))?;
        os::sync("apply:wal", &self.files.wal).map_err(io_error("sync wal"))?;
        self.copy_pages(&self.newest_frames(safe), cache)?;
        if safe == self.published.mx_frame {
            let len = u64::from(self.published.pages) * u64::from(self.page_size.get());
            os::truncate("apply:database", &self.files.database, len)
                .map_err(io_error("truncate database"))?;
            // What is not copied again may be among what was to be written.
            unsynced::sync("apply:database", &self.files.database)
                .map_err(io_error("sync database"))?;
        }
        cache.size_changed();
        self.mirror.write_backfill(safe).map_err(io_error("write wal-index"))?;
        self.backfilled = safe;
        Ok(())
    }

    /// The pages to copy, ascending, each with its frame. A page whose newest frame is after `safe`
    /// is left for later: until then everybody finds it in the log.
    fn newest_frames(&self, safe: u32) -> Vec<(Pgno, u32)> {
        let frames = self.backfilled + 1..=safe;
        let mut newest: Vec<(Pgno, u32)> = frames
            .map(|frame| (Pgno(self.mirror.pgno_of(frame)), frame))
            .filter(|(pgno, _)| pgno.0 <= self.published.pages)
            .collect();
        newest.sort_unstable_by_key(|&(pgno, frame)| (pgno, u32::MAX - frame));
        newest.dedup_by_key(|(pgno, _)| *pgno);
        if safe < self.published.mx_frame {
            let mx_frame = self.published.mx_frame;
            newest.retain(|&(pgno, frame)| self.mirror.find(mx_frame, pgno) == Some(frame));
        }
        newest
    }

    /// Copies frames to their pages, neighbours in one write.
    fn copy_pages(&self, newest: &[(Pgno, u32)], cache: &dyn ReaderCache) -> Result<(), Error> {
        let page_size = self.page_size.bytes();
        let mut buffer = vec![0; WRITE_SIZE.min(newest.len() * page_size)];
        for run in newest.chunk_by(|(one, _), (next, _)| one.0 + 1 == next.0) {
            for part in run.chunks(WRITE_SIZE / page_size) {
                let bytes = &mut buffer[..part.len() * page_size];
                for (&(_, frame), page) in part.iter().zip(bytes.chunks_exact_mut(page_size)) {
                    self.read_frame(frame, page)?;
                }
                let offset = self.page_size.offset(part[0].0);
                os::write_at("apply:database", &self.files.database, bytes, offset)
                    .map_err(io_error("write database"))?;
                cache.pages_changed(offset, bytes.len() as u64);
            }
        }
        Ok(())
    }

    /// Lets the log start over if all of it is in the database file and nobody reads from it.
    pub fn restart(
        &mut self,
        locks: &mut dyn CheckpointLocks,
        cache: &dyn ReaderCache,
    ) -> Result<Restart, Error> {
        if self.published.mx_frame == 0 {
            return Ok(Restart::Done);
        }
        let at_rest = self.cursor == self.cursor_after(&self.published) && self.held.is_none();
        if !self.progress().is_complete() || !at_rest || !locks.try_lock(LockSet::MARKS) {
            return Ok(Restart::Blocked);
        }
        let (header, index) = self.next_run();
        let written = self.write_empty_index(&index);
        self.mirror.tell(cache);
        locks.unlock(LockSet::MARKS);
        written.map_err(io_error("restart wal"))?;
        self.start_over(header, index);
        self.begin_log_if_blind()?;
        Ok(Restart::Done)
    }

    fn write_empty_index(&mut self, index: &IndexHeader) -> io::Result<()> {
        let written = self.mirror.write_header(index);
        let written = written.and_then(|()| self.mirror.write_info(&CheckpointInfo::EMPTY));
        written.inspect_err(|_| {
            // Readers must find one state or the other; the first error is the one that tells.
            let mut info = CheckpointInfo { backfill: self.backfilled, ..CheckpointInfo::EMPTY };
            info.read_marks[1] = self.published.mx_frame;
            let _ = self.mirror.write_info(&info);
            let _ = self.mirror.write_header(&self.published);
        })
    }
}

/// The header of a log that can be continued; `None` if SQLite would take the log for empty.
fn read_log_header(wal: &File, page_size: PageSize) -> io::Result<Option<WalHeader>> {
    let mut bytes = [0; HEADER_SIZE];
    match os::read_exact_at("read:apply-wal", wal, &mut bytes, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    Ok(WalHeader::parse(&bytes).ok().filter(|header| header.page_size == page_size))
}
