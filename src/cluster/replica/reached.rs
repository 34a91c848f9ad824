//! When everything is here that a primary had.
//!
//! A node is ready, and has reached the primaryship, as soon as what can be applied is applied: a database that failed
//! here keeps nobody from using the others, and counts nothing. Only when no database lacks anything is all of it of
//! that primary's line: from then on its snapshots take the place of what is here without keeping that.

use std::collections::BTreeSet;
use std::sync::Arc;

use ltx::Pos;
use tokio::sync::{Notify, watch};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use crate::cluster::lineage::{Connection, Lineage};
use crate::engine::{DbName, DbState, Engine};
use crate::limits;

/// What was received over a connection until its primary had sent everything.
pub(super) struct Awaited {
    pub(super) engine: Arc<Engine>,
    pub(super) lineage: Arc<Lineage>,
    pub(super) connection: Connection,
    /// Where each database of the primary stands when that is applied.
    pub(super) targets: Vec<(DbName, Pos)>,
    /// The databases of which a file could not be taken: what follows on it is of no use over this connection.
    pub(super) failing: watch::Receiver<BTreeSet<String>>,
    pub(super) ready: watch::Sender<bool>,
}

impl Awaited {
    /// Announces that the node is ready, and that the primaryship is reached. Outlives its connection, for a
    /// primary that has gone since was reached all the same; but not the next one.
    pub(super) async fn announce(self) {
        wait_applied(&self.engine, self.targets.clone()).await;
        let mut lacking = self.lacking();
        self.reach(lacking.clone()).await;
        self.ready.send_replace(true);
        while !lacking.is_empty() {
            if !self.failing.borrow().is_empty() || !self.lineage.is_present(self.connection) {
                return;
            }
            // What failed is tried again every second, and nobody is told.
            sleep(limits::HEARTBEAT_PERIOD).await;
            let before = std::mem::replace(&mut lacking, self.lacking());
            if lacking != before {
                self.reach(lacking.clone()).await;
            }
        }
    }

    async fn reach(&self, lacking: BTreeSet<String>) {
        let (lineage, connection) = (self.lineage.clone(), self.connection);
        // Blocks for one small file.
        let _ = spawn_blocking(move || lineage.reached(connection, lacking)).await;
    }

    /// The databases that lack something.
    fn lacking(&self) -> BTreeSet<String> {
        let failing = self.failing.borrow().clone();
        let lacks = |(name, target): &&(DbName, Pos)| {
            let db = self.engine.database(name.as_str());
            db.is_some_and(|db| !db.has_applied(*target))
        };
        let lacking = self.targets.iter().filter(lacks).map(|(name, _)| name.to_string());
        lacking.chain(failing).collect()
    }
}

/// Waits until each database stands at its target or has failed. One in whose place a snapshot comes may be beyond the
/// number of that, with another history.
pub(in crate::cluster) async fn wait_applied(engine: &Engine, mut targets: Vec<(DbName, Pos)>) {
    let applied = Arc::new(Notify::new());
    let wake = applied.clone();
    let subscription = engine.subscribe(Box::new(move || wake.notify_one()));
    loop {
        targets.retain(|(name, target)| match engine.database(name.as_str()) {
            Some(db) => {
                let waits = db.pos().txid < target.txid || db.has_queued_snapshot();
                waits && db.state() == DbState::Ready
            }
            None => false,
        });
        if targets.is_empty() {
            return;
        }
        // A failure wakes nobody, so it is looked for once a second.
        let _ = timeout(limits::HEARTBEAT_PERIOD, applied.notified()).await;
        subscription.take();
    }
}
