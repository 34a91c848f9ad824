//! From what an application did to its files to [`Transaction`] values: [`wal`] at the release of the
//! WRITE lock ([`refused`] has the cases in which SQLite may see it otherwise), [`journal`] at the end of a
//! rollback journal, [`resync`] when neither can tell.
//!
//! What is committed to a WAL when the node is no primary any more is a *stray*: no part of the chain,
//! kept as an LTX file in `lost+found/`, and taken out of the WAL by the applier.

use std::collections::BTreeSet;
use std::sync::Arc;

use ltx::{Checksum, PageSize, Pgno, Pos};

use super::checksum::PageSums;
use super::db::{Db, View};
use super::error::{Error, Result};
use super::recover::Recovered;
use super::transaction::{Draft, Transaction};
use crate::sqlite::header::JournalMode;

pub mod forward;
pub mod journal;
mod refused;
pub mod resync;
pub mod wal;

/// Everything about a database that a commit changes.
pub struct Change {
    /// The position.
    pub pos: Pos,
    /// Bytes of a page, if the database was ever written.
    pub page_size: Option<PageSize>,
    /// How it is journalled.
    pub mode: JournalMode,
    /// The checksum of each page, and of all.
    pub sums: PageSums,
    /// When the last transaction was made.
    pub timestamp_ms: i64,
    /// How far the WAL is captured.
    pub wal: wal::WalState,
    /// What the current rollback journal covers.
    pub journal: journal::JournalState,
    /// The next capture compares every page.
    pub needs_resync: bool,
    /// The highest change counter with which somebody may have read the database without a WAL since
    /// this process began; none if nobody has.
    pub counted: Option<u32>,
    /// The state that clients see of the WAL, if it has strays.
    pub strays: Option<Box<Change>>,
}

/// What becomes of a captured transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sink {
    /// It is the next one of the chain.
    Chain,
    /// It came too late: kept, and no part of anything.
    LostFound,
}

impl Change {
    /// The state after recovery: nothing in a WAL or a journal.
    pub fn new(recovered: Recovered) -> Change {
        Change {
            pos: recovered.pos,
            page_size: recovered.page_size,
            mode: recovered.mode,
            sums: recovered.sums,
            timestamp_ms: recovered.timestamp_ms,
            wal: wal::WalState::default(),
            journal: journal::JournalState::default(),
            needs_resync: false,
            counted: None,
            strays: None,
        }
    }

    /// The same state, to go another way from here.
    fn fork(&self) -> Change {
        Change {
            pos: self.pos,
            page_size: self.page_size,
            mode: self.mode,
            sums: self.sums.clone(),
            timestamp_ms: self.timestamp_ms,
            wal: self.wal.fork(),
            journal: journal::JournalState::default(),
            needs_resync: self.needs_resync,
            counted: self.counted,
            strays: None,
        }
    }

    /// Size of the database in pages.
    pub fn pages(&self) -> u32 {
        self.sums.len()
    }

    /// What readers of the position see of it.
    pub fn view(&self) -> View {
        View {
            pos: self.pos,
            page_size: self.page_size,
            pages: self.pages(),
            mode: self.mode,
            timestamp_ms: self.timestamp_ms,
        }
    }

    /// The transaction that makes `pages` current in a database of `commit` pages, with its new
    /// checksum; the state itself does not change yet. `pages` ascend.
    pub fn transaction(&self, draft: Draft) -> Transaction {
        let changes = draft.pages.iter().map(|page| (page.pgno, page.sum));
        let post = self.sums.rolling_after(draft.commit, changes);
        Transaction::new(self.pos.txid.next(), [self.pos.checksum, post], draft)
    }

    /// Forgets all pages and files; the position stays.
    pub fn reset(&mut self) {
        self.sums = PageSums::default();
        self.mode = JournalMode::Rollback;
        self.wal.clear();
        self.journal = journal::JournalState::default();
        self.needs_resync = false;
        self.strays = None;
    }

    /// The state after `transaction`, which [`Change::transaction`] made from this state.
    pub fn advance(&mut self, transaction: &Transaction) {
        for page in &transaction.pages {
            self.sums.set(page.pgno, page.sum);
        }
        self.sums.truncate(transaction.commit);
        debug_assert_eq!(
            self.sums.len(),
            transaction.commit,
            "every new page is in the transaction"
        );
        debug_assert_eq!(self.sums.rolling(), transaction.post, "the checksum was foretold");
        self.page_size = (transaction.commit > 0).then_some(transaction.page_size);
        self.pos = transaction.pos();
        self.timestamp_ms = transaction.timestamp_ms;
    }
}

impl Db {
    fn take_transaction(
        &self,
        change: &mut Change,
        transaction: Transaction,
        sink: Sink,
    ) -> Result<()> {
        if sink == Sink::Chain {
            let pos = transaction.pos();
            if !self.shared.is_writable() && !self.is_pending(pos) {
                return Err(Error::NotTaken { db: self.name.clone(), pos });
            }
            self.publish(change, transaction);
            self.note_committed(pos);
            return Ok(());
        }
        let path = self.chain.write_aside(&transaction)?;
        change.advance(&transaction);
        tracing::error!(db = %self.name, pos = %transaction.pos(), path = %path.display(), "a transaction was committed after this node had stopped being primary: it is in lost+found and nowhere else");
        Ok(())
    }

    /// A captured transaction counts: queued for its LTX file, visible as the position, announced.
    pub(super) fn publish(&self, change: &mut Change, transaction: Transaction) {
        change.advance(&transaction);
        let transaction = Arc::new(transaction);
        self.chain.push(transaction.clone());
        self.shared.writer.queued(&self.chain);
        self.announce(change, transaction.page_size);
    }
}

/// The pages of `dirty` and those by which the database grew, without the lock page, ascending.
pub(super) fn candidates(
    dirty: &BTreeSet<Pgno>,
    old_pages: u32,
    commit: u32,
    page_size: PageSize,
) -> impl Iterator<Item = Pgno> {
    let grown = (old_pages + 1..=commit).map(Pgno);
    let changed = dirty.iter().copied().filter(move |pgno| pgno.0 <= commit.min(old_pages));
    changed.chain(grown).filter(move |pgno| *pgno != page_size.lock_pgno())
}

/// The checksum of a page of zeros.
pub(super) fn zero_page_sum(pgno: Pgno, page_size: PageSize) -> Checksum {
    ltx::page_checksum(pgno, &[0; 65536][..page_size.bytes()])
}
