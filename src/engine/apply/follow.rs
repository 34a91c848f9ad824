//! A replica's hold on a WAL database: it is the one writer, and no client ever resets the wal-index.

use std::sync::Arc;

use super::Received;
use crate::engine::capture::Change;
use crate::engine::db::Db;
use crate::engine::error::Result;

/// The replica's hold on a WAL database.
pub struct Follower {}

impl Db {
    /// Whether a transaction can be appended to the WAL.
    pub(super) fn fits_wal(&self, _change: &Change, _received: &Received) -> bool {
        false
    }

    /// Appends transactions to the WAL.
    pub(super) fn apply_to_wal(
        &self,
        _change: &mut Change,
        _batch: &[Arc<Received>],
    ) -> Result<()> {
        Ok(())
    }

    /// Whether this node is the one writer of the database's WAL.
    pub(in crate::engine) fn is_followed(&self) -> bool {
        self.inbox.follower.lock().unwrap().is_some()
    }

    /// The role of the node changes: a primary's clients write the WAL themselves.
    pub(in crate::engine) fn role_changes(&self) {
        let mut change = self.change.lock().unwrap();
        if let Err(error) = self.let_go(&mut change) {
            self.fail(&error);
        }
    }

    /// Lets go.
    pub(in crate::engine) fn let_go(&self, _change: &mut Change) -> Result<()> {
        Ok(())
    }
}
