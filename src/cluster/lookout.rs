//! Looks at the lease all the time, so that a node notices at once when another one has it.
//!
//! What is seen is a hint: it may be a moment old. Who acts on it reads the key again.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::consul::{Consul, Holder};
use crate::engine::PrimaryInfo;

/// Between two looks: a key that is not there wakes for every other key too.
const REST: Duration = Duration::from_millis(20);
/// Between two attempts to reach Consul; whoever needs it says so in the log.
const RETRY: Duration = Duration::from_secs(1);

/// A task that looks at the lease, for as long as this lives.
pub struct Lookout {
    seen: watch::Receiver<Option<Holder>>,
    task: JoinHandle<()>,
}

impl Lookout {
    /// Begins to look.
    pub fn new(consul: Arc<Consul>) -> Lookout {
        let (sender, seen) = watch::channel(None);
        let task = tokio::spawn(look(consul, sender));
        Lookout { seen, task }
    }

    /// A view of it.
    pub fn view(&self) -> View {
        View { seen: Some(self.seen.clone()) }
    }
}

impl Drop for Lookout {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn look(consul: Arc<Consul>, seen: watch::Sender<Option<Holder>>) {
    let mut index = 0;
    loop {
        match consul.watch(index).await {
            Ok((now, holder)) => {
                // An index that goes back starts over.
                index = if now < index { 0 } else { now };
                seen.send_if_modified(|last| {
                    let changed = last.as_ref() != Some(&holder);
                    *last = Some(holder);
                    changed
                });
                sleep(REST).await;
            }
            Err(_) => sleep(RETRY).await,
        }
    }
}

/// What a lookout sees; of a lease that does not change, nothing.
#[derive(Clone)]
pub struct View {
    seen: Option<watch::Receiver<Option<Holder>>>,
}

impl View {
    /// The view of a lease that does not change.
    pub fn blind() -> View {
        View { seen: None }
    }

    /// Whether it is of a lease that does not change.
    pub fn is_static(&self) -> bool {
        self.seen.is_none()
    }

    /// Waits until the lease is seen to be somebody else's than `primary`'s.
    pub async fn other_than(&mut self, primary: &PrimaryInfo) {
        self.wait_for(|holder| match holder {
            Holder::Somebody(held) => held.primary != *primary,
            Holder::Released | Holder::Nobody => false,
        })
        .await;
    }

    /// Waits until the lease is seen not to be `primary`'s.
    pub async fn not(&mut self, primary: &PrimaryInfo) {
        self.wait_for(|holder| match holder {
            Holder::Somebody(held) => held.primary != *primary,
            Holder::Released | Holder::Nobody => true,
        })
        .await;
    }

    /// Waits until what is seen changes.
    pub async fn changed(&mut self) {
        let Some(seen) = &mut self.seen else { return std::future::pending().await };
        if seen.changed().await.is_err() {
            std::future::pending().await
        }
    }

    async fn wait_for(&mut self, mut holds: impl FnMut(&Holder) -> bool) {
        let Some(seen) = &mut self.seen else { return std::future::pending().await };
        if seen.wait_for(|holder| holder.as_ref().is_some_and(&mut holds)).await.is_err() {
            std::future::pending().await
        }
    }
}
