//! Dropping a database: a transaction that leaves nothing.

use std::fs::File;
use std::sync::Arc;

use ltx::Pos;

use super::{Answer, Db, Guard, Refusal};
use crate::engine::capture::forward::Outgoing;
use crate::engine::capture::{Change, Draft};
use crate::engine::chain::Durability;
use crate::engine::error::Result;
use crate::engine::files::FileKind;
use crate::engine::locks::Owner;
use crate::engine::transaction::{Overlay, Transaction, WalSpan};
use crate::sqlite::lock_byte::LockSet;

/// A drop that the primary is to take first. Its locks stay with [`Owner::DROP`].
struct Removal {
    outgoing: Outgoing,
    transaction: Transaction,
}

impl Db {
    /// Drops the database. Refused while somebody has it locked.
    pub fn drop_database(&self, answer: Answer) {
        let Removal { outgoing, transaction } = match self.begin_drop() {
            Ok(Some(removal)) => removal,
            Ok(None) => return answer(Ok(())),
            Err(refusal) => return answer(Err(refusal)),
        };
        let Some(me) = self.me.upgrade() else {
            drop(self.dropping());
            return answer(Err(Refusal::Os(libc::EIO)));
        };
        let base = outgoing.base;
        let finish = move |result: Result<(), Refusal>| {
            let locks = me.dropping();
            let finished = result.and_then(|()| me.finish_drop(base, transaction));
            drop(locks);
            answer(finished);
        };
        self.forward(outgoing.id, outgoing.ltx, Box::new(finish));
    }

    /// The locks of who drops the database, which it holds.
    fn dropping(&self) -> Guard<'_> {
        self.guard(Owner::DROP, LockSet::ALL)
    }

    fn begin_drop(&self) -> Result<Option<Removal>, Refusal> {
        let guard = self.may_begin().then(|| self.lock_everything_now()).flatten();
        // Asked again under the locks, for which a change of the role waits.
        if !self.may_begin() {
            self.note_refused_write();
            return Err(Refusal::ReadOnly);
        }
        let Some(guard) = guard.filter(|_| !self.is_behind()) else { return Err(Refusal::Busy) };
        let mut change = self.change.lock().unwrap();
        let database = self.files.get(FileKind::Database).ok_or(Refusal::NotFound)?;
        self.capture_frames(&mut change)?;
        if change.pages() == 0 {
            self.remove_files()?;
            change.reset();
            self.shared.names_changed(self.name.as_str());
            return Ok(None);
        }
        let transaction = self.deletion(&change, &database.file);
        if !self.shared.is_writable() {
            let outgoing = self.outgoing(&change, &transaction, &Overlay::NONE)?;
            guard.keep();
            return Ok(Some(Removal { outgoing, transaction }));
        }
        self.remove_as(&mut change, transaction)?;
        self.refuse_late_commit()?;
        Ok(None)
    }

    /// The primary has dropped it.
    fn finish_drop(&self, base: Pos, transaction: Transaction) -> Result<(), Refusal> {
        let mut change = self.change.lock().unwrap();
        let pos = transaction.pos();
        let removed = match change.pos == base {
            true => self.remove_as(&mut change, transaction).map_err(Refusal::from),
            false => Err(Refusal::Os(libc::EIO)),
        };
        match &removed {
            Ok(()) => self.note_committed(pos),
            // It comes again with the primary's stream.
            Err(_) => self.settle(),
        }
        removed
    }

    fn remove_as(&self, change: &mut Change, transaction: Transaction) -> Result<()> {
        self.chain.flush()?;
        self.chain.write_now(&transaction, Durability::Synced)?;
        self.remove_files()?;
        change.reset();
        change.advance(&transaction);
        let transaction = Arc::new(transaction);
        self.chain.confirm(transaction.clone());
        self.announce(change, &transaction);
        self.shared.names_changed(self.name.as_str());
        Ok(())
    }

    /// The transaction that leaves nothing.
    pub(super) fn deletion(&self, change: &Change, database: &Arc<File>) -> Transaction {
        change.transaction(Draft {
            page_size: change.page_size.expect("a database with pages has a page size"),
            commit: 0,
            pages: Vec::new(),
            source: database.clone(),
            timestamp_ms: (self.shared.clock)(),
            node_id: self.shared.node_id,
            wal: WalSpan::default(),
        })
    }
}
