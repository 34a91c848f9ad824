//! Commits of rollback-journal mode.
//!
//! The database file is written through us, so the changed pages are known. The commit is the end of
//! the journal: unlinked (DELETE), cut to nothing (TRUNCATE), or 28 zeros over its header (PERSIST;
//! SQLite's pager.c, `zeroJournalHdr`). The LTX file is written before that, and synced if the
//! application synced its journal, so a commit that SQLite believes in is in the chain.
//!
//! A rolled-back transaction ends its journal in the same way; it is told apart by its pages, which
//! are all as they were.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use ltx::{PageSize, Pgno, Pos};

use super::{Change, candidates};
use crate::engine::chain::Durability;
use crate::engine::checksum::PageSums;
use crate::engine::db::{Answer, Db, Refusal};
use crate::engine::error::{Error, Result, chain_text};
use crate::engine::files::{Backing, FileKind};
use crate::engine::follow_on::LtxBytes;
use crate::engine::halt::Outgoing;
use crate::engine::transaction::{Draft, Overlay, PageRef, Transaction, WalSpan, ZERO_PAGE};
use crate::sqlite::header::{DatabaseHeader, JournalMode, MAGIC};
use crate::{limits, os};

/// The bytes of a journal header that SQLite zeroes to end a journal (file format, section 3).
const HEADER_SIZE: usize = 28;

/// What the current rollback journal covers.
#[derive(Debug, Default)]
pub struct JournalState {
    /// A journal was begun and not ended yet.
    pub active: bool,
    /// The application synced it.
    pub synced: bool,
    /// The pages written since the last commit.
    pub dirty: BTreeSet<Pgno>,
}

/// A commit whose journal is not ended yet.
pub(in crate::engine) struct Pending {
    transaction: Transaction,
    header: DatabaseHeader,
    durability: Durability,
    /// When the application asked for the end of its journal.
    start: Instant,
}

/// How a journal ends.
pub(in crate::engine) enum JournalEnd {
    /// DELETE: it is removed.
    Remove,
    /// TRUNCATE: it is cut to nothing.
    Cut(Arc<Backing>),
    /// PERSIST: its header is zeroed.
    Zero(Arc<Backing>),
    /// A hot one: it is cut to nothing, for good.
    CutForGood(Arc<Backing>),
}

/// The end of a journal whose transaction the primary is to take first.
struct Forwarded {
    outgoing: Outgoing,
    pending: Pending,
    end: JournalEnd,
}

/// What is left to do about the end of a journal; nothing if it has ended.
type Left = Option<Box<Forwarded>>;

/// What the database file holds that the chain does not.
struct Found {
    draft: Draft,
    header: DatabaseHeader,
}

impl Db {
    /// Removes the journal, which commits what was written under it. An error leaves the journal as
    /// it is: SQLite rolls the transaction back.
    pub fn remove_journal(&self, answer: Answer) {
        let end = || {
            self.refuse_followed()?;
            self.refuse_lost()?;
            let mut change = self.change.lock().unwrap();
            self.refuse_strangers(&change)?;
            self.end_journal(&mut change, JournalEnd::Remove)
        };
        self.go_on(end(), answer);
    }

    /// Cuts the journal to `len` bytes; to nothing, that commits.
    pub fn truncate_journal(&self, journal: &Arc<Backing>, len: u64, answer: Answer) {
        let end = || {
            self.refuse_followed()?;
            self.refuse_lost()?;
            let mut change = self.change.lock().unwrap();
            // With journal_size_limit, PERSIST cuts a journal whose header it has zeroed already.
            if len > 0 || !change.journal.active {
                os::truncate("journal:truncate", &journal.file, len)
                    .map_err(self.files.error("truncate journal", FileKind::Journal))?;
                return Ok(None);
            }
            self.refuse_strangers(&change)?;
            self.end_journal(&mut change, JournalEnd::Cut(journal.clone()))
        };
        self.go_on(end(), answer);
    }

    /// Writes to the journal; zeros over its header commit.
    pub fn write_journal(&self, journal: &Arc<Backing>, offset: u64, data: &[u8], answer: Answer) {
        let end = || {
            self.refuse_lost()?;
            let mut change = self.change.lock().unwrap();
            // What began when this node could write may still be rolled back.
            if !self.may_write() && !change.journal.active {
                return Err(Refusal::ReadOnly);
            }
            if offset > 0 || data.len() != HEADER_SIZE || data.iter().any(|byte| *byte != 0) {
                os::write_at("journal:write", &journal.file, data, offset)
                    .map_err(self.files.error("write journal", FileKind::Journal))?;
                change.journal.active = true;
                return Ok(None);
            }
            self.end_journal(&mut change, JournalEnd::Zero(journal.clone()))
        };
        self.go_on(end(), answer);
    }

    /// Answers, or has the primary take the transaction first.
    fn go_on(&self, left: Result<Left, Refusal>, answer: Answer) {
        let Forwarded { outgoing, pending, end } = match left {
            Ok(Some(forwarded)) => *forwarded,
            Ok(None) => return answer(Ok(())),
            Err(refusal) => return answer(Err(refusal)),
        };
        let Some(me) = self.me.upgrade() else { return answer(Err(Refusal::Os(libc::EIO))) };
        let base = outgoing.base;
        let finish = move |result: Result<(), Refusal>| {
            answer(result.and_then(|()| me.finish_forwarded_commit(base, pending, &end)));
        };
        self.forward(outgoing, Box::new(finish));
    }

    /// The primary has the transaction: it counts here too.
    fn finish_forwarded_commit(
        &self,
        base: Pos,
        pending: Pending,
        end: &JournalEnd,
    ) -> Result<(), Refusal> {
        let mut change = self.change.lock().unwrap();
        let pos = pending.transaction.pos();
        let finished = match change.pos == base && change.journal.active {
            true => self.commit(&mut change, pending, end),
            false => Err(Refusal::Os(libc::EIO)),
        };
        match &finished {
            Ok(()) => self.note_committed(pos),
            // It comes again with the primary's stream.
            Err(_) => self.settle(),
        }
        finished
    }

    /// A journal that covers written pages is ended only by who holds a write lock: anything else
    /// (`rm`) would turn a half-written transaction into a commit.
    fn refuse_strangers(&self, change: &Change) -> Result<(), Refusal> {
        if change.journal.dirty.is_empty() || self.has_writer() {
            return Ok(());
        }
        tracing::warn!(db = %self.name, "refused to remove a journal that is still needed");
        Err(Refusal::Busy)
    }

    /// Ends the journal; before that the transaction that the database file now holds, if there is
    /// one, is stored here or is to be sent to the primary.
    fn end_journal(&self, change: &mut Change, end: JournalEnd) -> Result<Left, Refusal> {
        let Some(pending) = self.prepare_commit(change)? else {
            self.finish_journal(&end)?;
            change.journal = JournalState::default();
            return Ok(None);
        };
        if !self.may_commit() {
            return Err(Refusal::ReadOnly);
        }
        if !self.shared.is_writable() {
            let outgoing = self.outgoing(change, &pending.transaction, &Overlay::NONE)?;
            if let LtxBytes::Memory(bytes) = &outgoing.ltx {
                pending.transaction.set_encoded(bytes.clone());
            }
            return Ok(Some(Box::new(Forwarded { outgoing, pending, end })));
        }
        self.commit(change, pending, &end)?;
        Ok(None)
    }

    /// Ends a journal that a client has left, and whose former pages are played back. What differs even
    /// then is a transaction, which only a primary can make.
    pub(in crate::engine) fn end_hot_journal(
        &self,
        change: &mut Change,
        journal: Arc<Backing>,
    ) -> Result<(), Refusal> {
        let end = JournalEnd::CutForGood(journal);
        match self.prepare_commit(change)? {
            Some(_) if !self.shared.may_commit() => Err(Refusal::ReadOnly),
            Some(pending) => self.commit(change, pending, &end),
            None => {
                self.finish_journal(&end)?;
                change.journal = JournalState::default();
                Ok(())
            }
        }
    }

    /// The transaction that the database file now holds; none if all pages are as they were.
    fn prepare_commit(&self, change: &mut Change) -> Result<Option<Pending>, Refusal> {
        if change.journal.dirty.is_empty() && !change.needs_resync {
            return Ok(None);
        }
        let start = Instant::now();
        let Some(database) = self.files.get(FileKind::Database) else { return Ok(None) };
        let found = self.changed_pages(change, &database.file);
        let found = found.inspect_err(|error| {
            tracing::error!(db = %self.name, error = chain_text(error), "refused a commit");
        });
        let Some(found) = found? else { return Ok(None) };
        let resized = change.page_size.is_some_and(|size| size != found.draft.page_size);
        let mut transaction = match resized {
            true => Change::empty_at(change).transaction(found.draft),
            false => change.transaction(found.draft),
        };
        if resized {
            transaction.make_snapshot();
        }
        // A snapshot replaces all files before it, so it must be there for certain.
        let durability = match change.journal.synced || resized {
            true => Durability::Synced,
            false => Durability::Unsynced,
        };
        Ok(Some(Pending { transaction, header: found.header, durability, start }))
    }

    /// Stores the transaction, then ends the journal, which makes it count. If that fails SQLite rolls
    /// back, and the transaction must not come back at the next start.
    ///
    /// The lease is looked at before and after. Before, the journal stays and SQLite can roll back;
    /// after, it is gone, and SQLite, which is told of a failure, must not find it in the kernel's
    /// caches: it would play it back over a transaction that counts. What a replica commits its primary
    /// has taken.
    fn commit(
        &self,
        change: &mut Change,
        pending: Pending,
        end: &JournalEnd,
    ) -> Result<(), Refusal> {
        let Pending { transaction, header, durability, start } = pending;
        let streamed = self.shared.feed.subscriber_count() > 0;
        if streamed && transaction.size_hint() <= limits::ENCODE_IN_MEMORY {
            let encoded = transaction.encoded(self.shared.compression);
            encoded.map_err(|source| self.ltx_error("encode transaction", source))?;
        }
        self.chain.flush()?;
        let size = self.chain.write_now(&transaction, durability)?;
        let journal = self.files.get(FileKind::Journal);
        let ended = match self.is_pending(transaction.pos()) || self.shared.may_commit() {
            true => self.finish_journal(end).map_err(Refusal::from),
            false => Err(Refusal::ReadOnly),
        };
        ended.inspect_err(|_| self.chain.withdraw(&transaction))?;
        change.journal = JournalState::default();
        if change.page_size != Some(transaction.page_size) {
            change.sums = PageSums::default();
        }
        change.mode = header.journal_mode;
        change.counted = change.counted.max(Some(header.change_counter));
        change.needs_resync = false;
        change.advance(&transaction);
        let transaction = Arc::new(transaction);
        self.chain.confirm(transaction.clone(), size);
        self.shared.writer.queued(&self.chain);
        self.announce(change, transaction.page_size);
        self.counters.capture.note_since(start);
        self.refuse_late_commit().inspect_err(|_| {
            if let (Some(journal), Some(cache)) = (journal, self.shared.page_cache()) {
                cache.file_mistaken(journal.ino, &format!("{}-journal", self.name));
            }
        })
    }

    fn finish_journal(&self, end: &JournalEnd) -> Result<()> {
        match end {
            JournalEnd::Remove => self.files.remove(FileKind::Journal).map(drop),
            JournalEnd::Cut(journal) => os::truncate("journal:truncate", &journal.file, 0)
                .map_err(self.files.error("truncate journal", FileKind::Journal)),
            JournalEnd::Zero(journal) => zero_header(&journal.file)
                .map_err(self.files.error("write journal", FileKind::Journal)),
            JournalEnd::CutForGood(journal) => os::truncate("rollback:journal", &journal.file, 0)
                .and_then(|()| os::sync("rollback:journal", &journal.file))
                .map_err(self.files.error("cut journal", FileKind::Journal)),
        }
    }

    fn changed_pages(&self, change: &Change, database: &Arc<File>) -> Result<Option<Found>> {
        let Some((header, len)) = self.read_header(database)? else { return Ok(None) };
        let page_size = header.page_size;
        let commit = header.page_count_or_len(len).unwrap_or(0);
        let known = if change.page_size == Some(page_size) { change.pages() } else { 0 };
        let everything;
        let dirty = if change.needs_resync {
            everything = (1..=known).map(Pgno).collect();
            &everything
        } else {
            &change.journal.dirty
        };
        let pages = candidates(dirty, known, commit, page_size);
        let sums = if known == 0 { &PageSums::default() } else { &change.sums };
        let pages = read_changed(sums, database, page_size, pages)
            .map_err(self.files.error("read database", FileKind::Database))?;
        if pages.is_empty() && commit == known {
            return Ok(None);
        }
        let draft = Draft {
            page_size,
            commit,
            pages,
            source: database.clone(),
            timestamp_ms: (self.shared.clock)(),
            node_id: self.shared.node_id,
            wal: WalSpan::default(),
        };
        Ok(Some(Found { draft, header }))
    }

    /// The header of the database file and the file's length in bytes; none if it is empty.
    pub(in crate::engine) fn read_header(
        &self,
        database: &File,
    ) -> Result<Option<(DatabaseHeader, u64)>> {
        let read = || -> io::Result<_> {
            let len = database.metadata()?.len();
            let mut first = [0; 100];
            if len > 0 {
                os::read_exact_at("read:header", database, &mut first, 0)?;
            }
            Ok((len, first))
        };
        let (len, first) =
            read().map_err(self.files.error("read database header", FileKind::Database))?;
        if len == 0 {
            return Ok(None);
        }
        let header = DatabaseHeader::parse(&first).map_err(|error| Error::Corrupt {
            what: "read database header",
            db: self.name.clone(),
            detail: error.to_string(),
        })?;
        Ok(Some((header, len)))
    }

    /// A write to the database file: of a transaction under a journal, or of a checkpoint.
    pub fn write_database(
        &self,
        backing: &Backing,
        offset: u64,
        data: &[u8],
    ) -> Result<(), Refusal> {
        let write = || -> Result<(), Refusal> {
            Ok(os::write_at("database:write", &backing.file, data, offset)
                .map_err(self.files.error("write database", FileKind::Database))?)
        };
        if !backing.is_current() {
            return write();
        }
        self.refuse_lost()?;
        let mut change = self.change.lock().unwrap();
        self.forget_cold_journal(&mut change);
        if change.journal.active {
            // On a node that is no primary any more, to roll back what began before.
            change.mark_dirty(offset, data.len());
            return write();
        }
        if !self.may_write() {
            self.note_refused_write();
            return Err(Refusal::ReadOnly);
        }
        if change.mode == JournalMode::Wal && self.is_checkpointing() {
            self.before_checkpoint_write(&mut change)?;
            return write();
        }
        match change.page_size.is_none() && offset == 0 && !data.starts_with(MAGIC) {
            true => self.note_no_database(),
            false => self.note_no_transaction("journal_mode is MEMORY or OFF"),
        }
        Err(Refusal::NoTransaction)
    }

    /// A change of the database file's size: what a transaction or a checkpoint leaves behind.
    pub fn truncate_database(&self, backing: &Backing, len: u64) -> Result<(), Refusal> {
        let current = backing.is_current();
        if current {
            self.refuse_lost()?;
        }
        let mut change = self.change.lock().unwrap();
        self.forget_cold_journal(&mut change);
        if current && !self.may_write() && !change.journal.active {
            return Err(Refusal::ReadOnly);
        }
        let committed = change.page_size.map_or(0, |size| size.offset(Pgno(change.pages() + 1)));
        // A checkpoint cuts the file to the size of the state that it copied.
        let checkpoint = change.mode == JournalMode::Wal && self.is_checkpointing();
        if current && !change.journal.active && !checkpoint && len < committed {
            self.note_no_transaction("the file would be shorter than the database");
            return Err(Refusal::NoTransaction);
        }
        Ok(os::truncate("database:truncate", &backing.file, len)
            .map_err(self.files.error("truncate database", FileKind::Database))?)
    }

    /// The application synced its journal.
    pub(crate) fn journal_synced(&self) {
        if self.is_followed() {
            return;
        }
        let mut change = self.change.lock().unwrap();
        change.journal.synced = change.journal.active;
    }
}

impl Change {
    /// The same position with no page known: the state that a snapshot is built from.
    fn empty_at(change: &Change) -> Change {
        Change {
            pos: change.pos,
            page_size: None,
            mode: change.mode,
            counted: change.counted,
            sums: PageSums::default(),
            timestamp_ms: change.timestamp_ms,
            wal: super::wal::WalState::default(),
            journal: JournalState::default(),
            needs_resync: false,
            strays: None,
        }
    }

    fn mark_dirty(&mut self, offset: u64, len: usize) {
        // Until the page size is known every page counts as new, and one mark says that there are any.
        let page_size = self.page_size.unwrap_or(PageSize::MAX);
        let last = offset + (len as u64).saturating_sub(1);
        let (Some(first), Some(last)) = (page_size.pgno_at(offset), page_size.pgno_at(last)) else {
            return;
        };
        self.journal.dirty.extend((first.0..=last.0).map(Pgno));
    }
}

/// Writes zeros over the header of a journal. If that ends early, the journal has ended all the same:
/// SQLite plays none back whose first byte is zero (pager.c, `hasHotJournal`), so the transaction counts.
fn zero_header(journal: &File) -> io::Result<()> {
    os::write_at("journal:write", journal, &[0; HEADER_SIZE], 0).or_else(|error| {
        let mut first = [1];
        match os::read_exact_at("read:journal", journal, &mut first, 0) {
            Ok(()) if first == [0] => Ok(()),
            _ => Err(error),
        }
    })
}

/// Those of `pages` whose image is not the one in `sums`. A page past the end of the file is one of
/// zeros: SQLite does not write pages that it allocated and freed in one transaction.
fn read_changed(
    sums: &PageSums,
    database: &File,
    page_size: PageSize,
    pages: impl Iterator<Item = Pgno>,
) -> io::Result<Vec<PageRef>> {
    let mut image = vec![0; page_size.bytes()];
    let mut changed = Vec::new();
    for pgno in pages {
        let offset = page_size.offset(pgno);
        let filled = os::read_up_to("read:database", database, &mut image, offset)?;
        image[filled..].fill(0);
        let sum = ltx::page_checksum(pgno, &image);
        if sums.get(pgno) == sum {
            continue;
        }
        let offset = match filled {
            0 => ZERO_PAGE,
            n if n == image.len() => offset,
            _ => {
                let text = format!("the database would end within page {pgno}");
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
            }
        };
        changed.push(PageRef { pgno, sum, offset });
    }
    Ok(changed)
}
