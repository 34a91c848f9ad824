//! Commits of a replica under a HALT lock: each goes to the primary before it counts here.
//!
//! With a rollback journal that is easy: the end of the journal comes through us, and is held back.
//! In WAL mode SQLite makes a commit visible in shared memory and tells nobody before; but its frames
//! come through us, because a writer under a HALT lock has the WAL open without passthrough. So the
//! write is held back that makes the commit frame valid: the last bytes of its page or, where SQLite
//! wrote a page twice and computes the checksums anew, the last frame header. Until the primary has
//! the transaction, no reader and no recovery finds anything of it; if it does not take it, SQLite
//! gets an error for its write, and rolls back.

use std::io::{BufWriter, Write as _};
use std::sync::Arc;

use ltx::Pos;

use super::Change;
use super::wal::Walk;
use crate::engine::db::{Answer, Db, Refusal};
use crate::engine::error::{Error, Result};
use crate::engine::files::{Backing, FileKind};
use crate::engine::follow_on::LtxBytes;
use crate::engine::halt::Outgoing;
use crate::engine::locks::Handle;
use crate::engine::transaction::{Overlay, Transaction};
use crate::sqlite::wal::{self, WalCursor, WalHeader};
use crate::{limits, os};

/// Where a frame header says how large the database is after its transaction; 0 within one.
const COMMIT_AT: usize = 4;

impl Db {
    /// A write to the WAL that came through us.
    pub fn write_wal(
        &self,
        wal: &Arc<Backing>,
        via: Handle,
        offset: u64,
        data: &[u8],
        answer: Answer,
    ) {
        if self.shared.is_writable() || !self.is_borrowed() {
            return answer(self.write_wal_here(wal, via, offset, data));
        }
        let begun = self
            .refuse_unstorable()
            .and_then(|()| self.begin_wal_commit(wal, via, Overlay { offset, data }));
        let outgoing = match begun {
            Ok(Some(outgoing)) => outgoing,
            Ok(None) => return answer(Ok(())),
            Err(refusal) => return answer(Err(refusal)),
        };
        let Some(me) = self.me.upgrade() else { return answer(Err(Refusal::Os(libc::EIO))) };
        let (base, wal, data) = (outgoing.base, wal.clone(), data.to_vec());
        let finish = move |result: Result<(), Refusal>| {
            answer(result.and_then(|()| me.finish_wal_commit(base, &wal, offset, &data)));
        };
        self.forward(outgoing, Box::new(finish));
    }

    fn write_wal_here(
        &self,
        wal: &Backing,
        via: Handle,
        offset: u64,
        data: &[u8],
    ) -> Result<(), Refusal> {
        if !self.may_commit() {
            self.note_refused_write();
            return Err(Refusal::ReadOnly);
        }
        self.refuse_unstorable()?;
        let mut change = self.change.lock().unwrap();
        if offset == 0 {
            self.settle_doubt(&mut change)?;
        }
        self.begin_wal_write(&mut change, offset, via)?;
        if offset == 0 {
            // Nobody looks at the log before the engine knows that it starts over.
            return self.write_and_note(&mut change, wal, Overlay { offset, data });
        }
        drop(change);
        self.write_to_wal(wal, offset, data)
    }

    fn write_and_note(
        &self,
        change: &mut Change,
        wal: &Backing,
        write: Overlay<'_>,
    ) -> Result<(), Refusal> {
        self.write_to_wal(wal, write.offset, write.data)?;
        change.wal.note_written(write.offset);
        Ok(())
    }

    /// Who builds a wal-index is let in even then.
    fn refuse_unstorable(&self) -> Result<(), Refusal> {
        if self.shared.is_full() {
            return Err(Refusal::Os(libc::ENOSPC));
        }
        if self.has_failed() || self.chain.has_failed() {
            return Err(Refusal::Os(libc::EIO));
        }
        Ok(())
    }

    fn write_to_wal(&self, wal: &Backing, offset: u64, data: &[u8]) -> Result<(), Refusal> {
        Ok(os::write_at("wal:write", &wal.file, data, offset)
            .map_err(self.files.error("write wal", FileKind::Wal))?)
    }

    /// Writes to the WAL, unless the write completes a transaction: then that is to be sent first.
    fn begin_wal_commit(
        &self,
        wal: &Backing,
        via: Handle,
        write: Overlay<'_>,
    ) -> Result<Option<Outgoing>, Refusal> {
        let mut change = self.change.lock().unwrap();
        if !wal.is_current() {
            // Nobody reads it any more.
            self.write_to_wal(wal, write.offset, write.data)?;
            return Ok(None);
        }
        self.begin_wal_write(&mut change, write.offset, via)?;
        let Some(transaction) = self.completed_by(&mut change, wal, &write)? else {
            self.write_and_note(&mut change, wal, write)?;
            return Ok(None);
        };
        self.outgoing(&change, &transaction, &write).map(Some)
    }

    /// The primary has the transaction: the write that was held back makes it count here.
    fn finish_wal_commit(
        &self,
        base: Pos,
        wal: &Backing,
        offset: u64,
        data: &[u8],
    ) -> Result<(), Refusal> {
        let change = self.change.lock().unwrap();
        let finished = match change.pos == base {
            true => self.write_to_wal(wal, offset, data),
            false => Err(Refusal::Os(libc::EIO)),
        };
        // It comes again with the primary's stream.
        finished.inspect_err(|_| self.settle())
    }

    /// Makes a transaction pending, and its LTX file. `overlay` is what its source does not have yet.
    pub(in crate::engine) fn outgoing(
        &self,
        change: &Change,
        transaction: &Transaction,
        overlay: &Overlay<'_>,
    ) -> Result<Outgoing, Refusal> {
        let id = self.begin_forward(transaction.pos())?;
        let ltx = self.encode_outgoing(transaction, overlay).inspect_err(|_| self.settle())?;
        Ok(Outgoing { id, ltx, base: change.pos, pos: transaction.pos() })
    }

    fn encode_outgoing(
        &self,
        transaction: &Transaction,
        overlay: &Overlay<'_>,
    ) -> Result<LtxBytes> {
        let ltx = |source| self.ltx_error("encode transaction", source);
        let compression = self.shared.compression;
        if transaction.size_hint() <= limits::ENCODE_IN_MEMORY {
            let bytes = Vec::with_capacity(transaction.size_hint());
            let bytes = transaction.write_with(bytes, compression, overlay).map_err(ltx)?;
            return Ok(LtxBytes::Memory(bytes.into()));
        }
        let file = self.spool_file()?;
        let out = BufWriter::with_capacity(limits::IO_BUFFER, os::Labelled::new("forward", &file));
        let mut out = transaction.write_with(out, compression, overlay).map_err(ltx)?;
        let flushed = out.flush();
        drop(out);
        let len = flushed.and_then(|()| file.metadata()).map(|meta| meta.len());
        let len = len.map_err(Error::io("write spool file", self.dir.path()))?;
        Ok(LtxBytes::File(file, len))
    }

    /// The transaction that `write` completes, if it does that.
    fn completed_by(
        &self,
        change: &mut Change,
        wal: &Backing,
        write: &Overlay<'_>,
    ) -> Result<Option<Transaction>> {
        let mut bytes = [0; wal::HEADER_SIZE];
        let filled = self.read_wal(wal, &mut bytes, 0, write)?;
        let header = (filled == bytes.len()).then(|| WalHeader::parse(&bytes).ok()).flatten();
        let Some(header) = header else { return Ok(None) };
        let Some(frame) = change.wal.ends_at(&header, write) else { return Ok(None) };
        if !self.is_commit_frame(wal, &header, frame, write)? {
            return Ok(None);
        }
        // What an exclusive connection committed before, and what nobody may go on from.
        self.capture_finished(change)?;
        if change.strays.is_some() {
            return Err(self.corrupt("write wal", "it has transactions that the primary has not"));
        }
        let cursor = change.wal.cursor_in(&header);
        let Some(mut walk) = self.walk_to(cursor, frame, wal, write)? else {
            change.wal.incomplete = Some(frame);
            return Ok(None);
        };
        change.wal.incomplete = None;
        if change.page_size.is_some_and(|known| known != cursor.page_size()) {
            return Err(self.corrupt("write wal", "its page size is not the database's"));
        }
        let (pages, commit) = (change.pages(), walk.commit);
        let draft = self.draft(&mut walk, pages, commit, &wal.file);
        Ok(Some(change.transaction(draft)))
    }

    fn is_commit_frame(
        &self,
        wal: &Backing,
        header: &WalHeader,
        frame: u32,
        write: &Overlay<'_>,
    ) -> Result<bool> {
        let mut commit = [0; 4];
        let offset = wal::frame_offset(header.page_size, frame) + COMMIT_AT as u64;
        let filled = self.read_wal(wal, &mut commit, offset, write)?;
        Ok(filled == commit.len() && commit != [0; 4])
    }

    /// Walks from `cursor` to `last`, which commits; none if not every frame is valid yet.
    fn walk_to(
        &self,
        cursor: WalCursor,
        last: u32,
        wal: &Backing,
        write: &Overlay<'_>,
    ) -> Result<Option<Walk>> {
        let mut walk = Walk::new(cursor);
        let frame_size = cursor.frame_size();
        let mut buffer = Vec::new();
        while walk.cursor.frame() < last {
            let left = (last - walk.cursor.frame()) as usize;
            let want = left.min((limits::IO_BUFFER / frame_size).max(1)) * frame_size;
            buffer.resize(want, 0);
            let filled = self.read_wal(wal, &mut buffer, walk.cursor.offset(), write)?;
            if filled < want {
                return Ok(None);
            }
            for bytes in buffer.chunks(frame_size) {
                let offset = walk.cursor.offset() + wal::FRAME_HEADER_SIZE as u64;
                let Ok(frame) = walk.cursor.verify(bytes) else { return Ok(None) };
                walk.take(&frame, offset);
                walk.commit = frame.commit.unwrap_or(0);
                if walk.commit > 0 && walk.cursor.frame() < last {
                    return Err(self.corrupt("write wal", "a transaction is not complete yet"));
                }
            }
        }
        Ok(Some(walk))
    }

    fn read_wal(
        &self,
        wal: &Backing,
        bytes: &mut [u8],
        offset: u64,
        write: &Overlay<'_>,
    ) -> Result<usize> {
        let filled = os::read_up_to("read:forward", &wal.file, bytes, offset)
            .map_err(self.files.error("read wal", FileKind::Wal))?;
        Ok(write.lay_over(bytes, offset, filled))
    }
}
