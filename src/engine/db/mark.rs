//! Read marks that are set for readers, ahead of them.
//!
//! A reader of the WAL looks for a mark at the last committed frame. After each commit there is none, and it moves
//! one: it takes the READ lock of a mark exclusively and gives it back, then takes it shared (WAL-mode File
//! Format, section 2.3.1). A lock call of an application costs microseconds, and one of ours nothing. So a
//! commit moves a mark that nobody uses, before WRITE is given back, by the same rule: who holds the READ lock
//! exclusively may change the mark.

use super::Db;
use crate::engine::files::FileKind;
use crate::engine::locks::{LockKind, Owner};
use crate::os;
use crate::sqlite::lock_byte::{Lock, LockSet};
use crate::sqlite::wal_index::read_mark_at;

impl Db {
    /// Moves a free mark to `frame`, the last captured one. Called after a commit, with WRITE still held by
    /// its owner: so that frame is the last one of the wal-index, and nobody starts the log over. Only where
    /// we see the wal-index that clients see.
    pub(super) fn offer_mark(&self, frame: u32) {
        if !self.shared.is_passthrough() {
            return;
        }
        let Some(shm) = self.files.get(FileKind::Shm).filter(|_| frame > 0) else { return };
        let free = |i: &usize| {
            let mark = LockSet::one(Lock::READ[*i]);
            self.try_take(Owner::MARK, mark, LockKind::Exclusive)
        };
        if let Some(i) = (1..Lock::READ.len()).find(free) {
            let _moving = self.guard(Owner::MARK, LockSet::one(Lock::READ[i]));
            // If it fails, the next reader moves a mark itself.
            let _ = os::write_at("mark", &shm.file, &frame.to_ne_bytes(), read_mark_at(i) as u64);
        }
    }
}
