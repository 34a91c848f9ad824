//! Frames in the WAL of which SQLite may believe something else than what stands there.
//!
//! * **Refused**: a commit whose frames are written, and whose writer was told then that they cannot stay
//!   (the sync failed, or the lease is not confirmed). SQLite rolls back and leaves them where they are,
//!   for the next writer; but who builds the wal-index anew in the meantime would take them for a
//!   commit, as would we where the wal-index is out of sight. So they are made invalid before the
//!   writer's lock goes. If that fails the database does, and nobody gets WRITE before it is done: behind
//!   frames that somebody took for committed, theirs would be lost with these.
//! * **Doubtful**: without passthrough nobody can tell whether a writer that died behind its commit frame
//!   had got as far as the wal-index. The transaction counts; a writer that goes on behind it says that
//!   it does for SQLite too. If the log goes before that, the database file is compared. So it is for a commit of
//!   an exclusive connection that was refused.
//! * **Unseen**: without passthrough a writer may fail behind its commit frame where nobody is told, and live. Then the
//!   frames are overwritten, or the log goes, and the database file does not have what they changed: of one page that
//!   is always asked.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::wal::Captured;
use super::{Change, Sink};
use crate::engine::db::Db;
use crate::engine::error::Result;
use crate::engine::files::{Backing, FileKind};
use crate::engine::locks::{Handle, Owner};
use crate::sqlite::lock_byte::LockSet;
use crate::sqlite::wal;
use crate::sqlite::wal_index::IndexHeader;
use crate::{os, threads};

/// Frames that were made invalid, and that the kernel may still have as they were.
pub(in crate::engine) struct Cut {
    wal: Arc<Backing>,
    offset: u64,
}

impl Db {
    /// A sync through `via` failed: if it was the writer's, its frames do not count.
    pub(in crate::engine) fn note_refused_sync(&self, via: Handle) {
        if self.is_followed() {
            return;
        }
        let mut change = self.change.lock().unwrap();
        // With passthrough the wal-index says what became of it. Without, a checkpoint's sync must not refuse what
        // was committed through the same file.
        if self.shared.is_passthrough() || change.wal.is_written_through(via) {
            self.refuse_writer(&mut change);
        }
    }

    /// The wal-index could not be made longer through `via`: if that was the writer, its frames do not count. Who
    /// only builds the index has written none.
    pub(in crate::engine) fn note_refused_index(&self, via: Handle) {
        let mut change = self.change.lock().unwrap();
        let is_writer = self.holds_write_through(via) || self.is_locked_exclusively();
        if !self.shared.is_passthrough() && is_writer && change.wal.has_writer() {
            self.refuse_writer(&mut change);
        }
    }

    fn refuse_writer(&self, change: &mut Change) {
        match !self.shared.is_passthrough() && self.is_locked_exclusively() {
            // Before these frames may stand others that it committed, and gave no lock up.
            true => change.wal.doubtful = true,
            false => change.wal.refused = true,
        }
    }

    /// A writer gives its lock up: takes what it committed, and makes invalid what was refused. Also the last
    /// captured frame.
    pub(in crate::engine) fn capture_of_writer(&self) -> (Option<Cut>, u32) {
        let mut change = self.change.lock().unwrap();
        let (cut, _) = self.capture_writer(&mut change);
        (cut, change.wal.frame())
    }

    /// As [`Db::capture_of_writer`], for a writer that is gone.
    pub(in crate::engine) fn capture_of_gone_writer(&self) -> Option<Cut> {
        let mut change = self.change.lock().unwrap();
        let before = change.pos;
        let (cut, captured) = self.capture_writer(&mut change);
        let moved = captured == Captured::All && change.pos != before;
        if moved && !self.shared.is_passthrough() {
            change.wal.doubtful = true;
            drop(change);
            // Whoever overwrites the frames must not overwrite the only copy.
            if let Err(error) = self.chain.flush() {
                self.fail(&error);
            }
        }
        cut
    }

    /// As [`Db::capture_wal`], also what the client has written that holds WRITE: it gives it up.
    fn capture_writer(&self, change: &mut Change) -> (Option<Cut>, Captured) {
        let start = Instant::now();
        let cut = self.cut_refused(change);
        let captured = self.capture_all(change);
        (cut, self.conclude_capture(start, captured))
    }

    fn cut_refused(&self, change: &mut Change) -> Option<Cut> {
        change.wal.end_writing();
        if !change.wal.refused {
            return None;
        }
        let Ok(cut) = self.cut_after_committed(change) else {
            // The capture that follows tries again, and says why not.
            self.has_uncut.store(true, Ordering::SeqCst);
            return None;
        };
        change.wal.refused = false;
        cut.filter(|_| !self.shared.is_passthrough())
    }

    /// Makes invalid what could not be when its writer gave WRITE up. Nobody has had that since.
    pub(super) fn cut_late(&self, change: &mut Change) -> Result<()> {
        if !self.has_uncut.load(Ordering::SeqCst) || change.wal.cut_is_untold {
            return Ok(());
        }
        let cut = if change.wal.refused { self.cut_after_committed(change)? } else { None };
        match (cut, self.shared.page_cache(), self.me.upgrade()) {
            (Some(cut), Some(_), Some(me)) if !self.shared.is_passthrough() => {
                let tell = move || {
                    me.tell_kernel(&cut);
                    me.change.lock().unwrap().wal.cut_is_untold = false;
                    me.has_uncut.store(false, Ordering::SeqCst);
                };
                threads::spawn("litefs-cut", tell)
                    .map_err(self.files.error("start thread for cut frames", FileKind::Wal))?;
                change.wal.cut_is_untold = true;
            }
            _ => self.has_uncut.store(false, Ordering::SeqCst),
        }
        change.wal.refused = false;
        Ok(())
    }

    /// Makes the frame after the last committed one invalid, and so all that follow.
    fn cut_after_committed(&self, change: &Change) -> Result<Option<Cut>> {
        let Some(wal) = self.files.get(FileKind::Wal) else { return Ok(None) };
        let Some(header) = self.wal_header(&wal.file)? else { return Ok(None) };
        let offset = match self.shared.is_passthrough() {
            true => match IndexHeader::parse(&self.index_header()?) {
                Some(index) if index.salts == header.salts => {
                    wal::frame_offset(header.page_size, index.mx_frame + 1)
                }
                _ => return Ok(None),
            },
            false => {
                let seen = change.strays.as_deref().unwrap_or(change);
                seen.wal.cursor_in(&header).offset()
            }
        };
        let error = || self.files.error("cut refused frames", FileKind::Wal);
        if wal.file.metadata().map_err(error())?.len() <= offset {
            return Ok(None);
        }
        let zeros = [0; wal::FRAME_HEADER_SIZE];
        os::write_at("wal:cut", &wal.file, &zeros, offset).map_err(error())?;
        tracing::debug!(db = %self.name, offset, "refused frames were made invalid");
        Ok(Some(Cut { wal, offset }))
    }

    /// Gives locks up, and calls `done`, when the kernel knows of the cut: who gets the locks may build
    /// the wal-index. Not on this thread, which may have to answer what the kernel waits for.
    pub(in crate::engine) fn release_after(
        &self,
        cut: Cut,
        owner: Owner,
        set: LockSet,
        done: impl FnOnce() + Send + 'static,
    ) {
        let Some(me) = self.me.upgrade() else { return done() };
        let tell = move || {
            me.tell_kernel(&cut);
            me.release(owner, set);
            done();
        };
        if let Err(error) = threads::spawn("litefs-cut", tell) {
            tracing::error!(db = %self.name, %error, "start thread for cut frames: who makes the wal-index anew may take them for committed");
            self.release(owner, set);
        }
    }

    fn tell_kernel(&self, cut: &Cut) {
        if let Some(cache) = self.shared.page_cache() {
            cache.pages_changed(cut.wal.ino, cut.offset, wal::FRAME_HEADER_SIZE as u64);
        }
    }

    /// The log is about to go, so all that counts for SQLite is in the database file: takes what
    /// differs, if there was a doubt.
    pub(in crate::engine) fn settle_doubt(&self, change: &mut Change) -> Result<()> {
        if !change.wal.doubtful && self.has_witness(change)? {
            return Ok(());
        }
        if let Some(wal) = self.files.get(FileKind::Wal) {
            self.resync_file(change, &wal.file, Sink::Chain)?;
            self.chain.flush()?;
        }
        change.wal.doubtful = false;
        Ok(())
    }

    /// Whether the database file has what the last captured commit changed, as far as one page of it tells.
    fn has_witness(&self, change: &Change) -> Result<bool> {
        let (Some(pgno), Some(page_size), Some(database), false) = (
            change.wal.witness(),
            change.page_size,
            self.files.get(FileKind::Database),
            self.shared.is_passthrough(),
        ) else {
            return Ok(true);
        };
        let mut image = vec![0; page_size.bytes()];
        os::read_zero_extended("read:page", &database.file, &mut image, page_size.offset(pgno))
            .map_err(self.files.error("read page", FileKind::Database))?;
        Ok(ltx::page_checksum(pgno, &image) == change.sums.get(pgno))
    }
}
