//! What a change of the node's role means for one database.

use std::time::Duration;

use super::Db;
use crate::engine::capture::wal::Captured;
use crate::engine::locks::{LockKind, Owner};
use crate::sqlite::lock_byte::{Lock, LockSet};

/// The locks of who writes. PENDING is among them because nobody may find RESERVED held, and take a
/// journal that a dead writer left for that of a live one.
pub(in crate::engine) const WRITERS: LockSet =
    LockSet::one(Lock::Pending).with(Lock::Reserved).with(Lock::Write);

impl Db {
    /// Waits until nobody writes and all that was committed is captured; whether that is so within
    /// `limit`. No write lock is granted meanwhile.
    pub(in crate::engine) fn drain(&self, limit: Duration) -> bool {
        if self.is_lost() {
            // Nothing is captured from it anyway.
            return true;
        }
        if self.take(Owner::DRAIN, WRITERS, LockKind::Exclusive, limit).is_err() {
            return false;
        }
        let _guard = self.guard(Owner::DRAIN, WRITERS);
        self.capture_wal() == Captured::All
    }

    /// Waits until a capture that has begun is over.
    pub(in crate::engine) fn finish_capture(&self) {
        drop(self.change.lock().unwrap());
    }

    /// The role of the node, or the mount, is another one: takes hold of the WAL or lets it go. What
    /// cannot be done at once, the applier does when it can.
    pub(in crate::engine) fn role_changed(&self) {
        let done = match self.inbox.try_turn() {
            Some(mut turn) => self.settle_hold(&mut turn, Duration::ZERO).is_ok(),
            None => false,
        };
        if !done {
            self.try_again();
        }
    }
}
