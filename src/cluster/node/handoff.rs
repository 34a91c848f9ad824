//! Handing the lease to a connected replica, so that no acknowledged transaction is lost.
//!
//! ```text
//! near enough -> writes paused, the last ones ended -> offer in Consul, with the positions that the
//! target must have -> its stream brings it there and gives it the lease -> it takes the offer up
//! ```
//!
//! The target takes the lease only if it has every position of the offer, and only as long as the
//! offer stands; taking it and taking it back are changes of one key that exclude each other. So
//! whatever fails, exactly one of the two nodes has the lease. A LiteFS target takes it without
//! looking, and has by then been sent everything; but it may get to that at any time later. So a lease that
//! is taken back has another session afterwards, and the one that was offered is of no use.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};

use super::Node;
use super::lead::Tenure;
use crate::cluster::consul::{self, Consul, Held, Holder, Lost};
use crate::cluster::control::HandoffError;
use crate::cluster::peers::Peer;
use crate::engine::{Drained, Engine, PrimaryInfo, chain_text};
use crate::limits;

/// Between two looks at how far the target is.
const LOOK: Duration = Duration::from_millis(5);
/// Between two attempts to reach Consul.
const RETRY: Duration = Duration::from_millis(200);

/// Writes are paused for as long as this lives.
pub(super) struct Paused(Arc<Engine>);

impl Drop for Paused {
    fn drop(&mut self) {
        self.0.resume_writes();
    }
}

/// A lease that another node has now.
pub(super) struct HandedOver {
    /// That node.
    pub(super) to: PrimaryInfo,
    /// No write may begin before the role is given up.
    pub(super) paused: Paused,
}

/// What became of the lease.
pub(super) enum Outcome {
    /// Another node has it.
    Done(HandedOver),
    /// This node still has it.
    Kept(HandoffError),
    /// Nobody knows who has it.
    Lost(Lost),
}

fn kept(text: String) -> Outcome {
    Outcome::Kept(HandoffError::Failed(text))
}

impl Node {
    /// Hands the lease to `peer`, and confirms it meanwhile.
    pub(super) async fn hand_over(&self, tenure: &mut Tenure, peer: &Arc<Peer>) -> Outcome {
        let identity = peer.identity();
        let id = self.engine.node_id();
        tracing::info!(
            "{id}: handing the lease over to {} {:?}",
            identity.node_id,
            identity.hostname
        );
        let mut handover = HandOver { node: self, tenure: tenure.again(), peer };
        let outcome = {
            let run = handover.run();
            tokio::pin!(run);
            tokio::select! {
                outcome = &mut run => outcome,
                // Perhaps because the target has taken it: the handover finds that out.
                _ = tenure.keep(&self.engine, &self.lineage) => run.await,
            }
        };
        let Tenure { session, index, .. } = handover.tenure;
        if session != tenure.session {
            let offered = std::mem::replace(&mut tenure.session, session);
            tenure.index = index;
            self.note_taken_back(&tenure.consul, offered, &tenure.session).await;
        }
        outcome
    }

    /// Notes that the lease was taken back: it has the session `own`, and the one that was offered is of no use.
    pub(super) async fn note_taken_back(&self, consul: &Arc<Consul>, offered: String, own: &str) {
        consul.end_unused(offered);
        // This process has the lease all the same.
        if let Err(error) = self.remember_session(Some(own.to_owned())).await {
            tracing::warn!(
                error = chain_text(&error),
                "note the session of the lease: the next start of this node waits for it to end"
            );
        }
    }
}

struct HandOver<'a> {
    node: &'a Node,
    tenure: Tenure,
    peer: &'a Arc<Peer>,
}

impl HandOver<'_> {
    /// The tenure has another session afterwards if the lease was taken back.
    async fn run(&mut self) -> Outcome {
        if !self.is_near().await {
            return kept("the target is too far behind".to_owned());
        }
        let engine = self.node.engine.clone();
        let paused = Paused(engine.clone());
        let stop = spawn_blocking(move || engine.stop_writes(limits::HANDOFF_DRAIN_WAIT));
        match stop.await {
            Ok(Drained { unfinished, .. }) if unfinished.is_empty() => {}
            Ok(Drained { unfinished, .. }) => {
                let names: Vec<_> = unfinished.iter().map(|name| name.as_str()).collect();
                return kept(format!("a write transaction does not end on {}", names.join(", ")));
            }
            Err(error) => return kept(error.to_string()),
        }
        let Tenure { consul, session, .. } = &self.tenure;
        let record = self.tenure.record(&self.node.engine, &self.node.lineage);
        let to = self.peer.identity().node_id;
        let index = match consul.offer(session, &record, to).await {
            Ok(Ok(index)) => index,
            Ok(Err(lost)) => return Outcome::Lost(lost),
            // It may have been made all the same: nobody takes it up, for nobody was told.
            Err(error) => return kept(chain_text(&error)),
        };
        self.peer.offer(session.clone());
        let taken = self.wait_until_taken(index).await;
        self.peer.withdraw();
        let why = match taken {
            Ok(Taken::By(held)) => return done(held, paused),
            Ok(Taken::Lost(lost)) => return Outcome::Lost(lost),
            Err(why) => why,
        };
        match self.revoke(index).await {
            Revoked::Yes { session, index } => {
                (self.tenure.session, self.tenure.index) = (session, index);
                kept(why)
            }
            Revoked::No(Taken::By(held)) => done(held, paused),
            Revoked::No(Taken::Lost(lost)) => Outcome::Lost(lost),
        }
    }

    /// Waits until the target was sent nearly everything; whether it came to that in time.
    async fn is_near(&self) -> bool {
        let end = Instant::now() + limits::HANDOFF_CATCH_UP_WAIT;
        loop {
            let record = self.tenure.record(&self.node.engine, &self.node.lineage);
            let left = record.standing.transactions.saturating_sub(self.peer.sent());
            if left <= limits::HANDOFF_LAG {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            sleep(LOOK).await;
        }
    }

    /// Waits until the key is not as it was at `index`; an error says why the target does not take it.
    async fn wait_until_taken(&self, mut index: u64) -> Result<Taken, String> {
        let end = Instant::now() + limits::HANDOFF_TAKE_WAIT;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let seen = tokio::select! {
                seen = timeout(left, self.tenure.consul.watch(index)) => seen,
                () = self.node.control.peers().came_back(self.peer) => {
                    return Err("the target did not take the lease; its log says why".to_owned());
                }
            };
            match seen {
                Err(_) => return Err("the target did not take the lease in time".to_owned()),
                Ok(Err(error)) => return Err(chain_text(&error)),
                Ok(Ok((now, holder))) => match self.taken(holder) {
                    Some(taken) => return Ok(taken),
                    None => index = now,
                },
            }
        }
    }

    /// What became of the lease; none as long as it is ours.
    fn taken(&self, holder: Holder) -> Option<Taken> {
        let Tenure { consul, session, .. } = &self.tenure;
        match holder {
            Holder::Somebody(held) if held.session != *session => {
                Some(Taken::Lost(Lost(format!("{:?} has it", held.primary.hostname))))
            }
            Holder::Somebody(held) if consul.is_mine(&held) => None,
            Holder::Somebody(held) => Some(Taken::By(held)),
            Holder::Released | Holder::Nobody => {
                Some(Taken::Lost(Lost("its key was given up".to_owned())))
            }
        }
    }

    /// Takes the offer back, however long that takes: until it is known who has the lease, or nobody
    /// can.
    async fn revoke(&self, index: u64) -> Revoked {
        let mut own = None;
        let end = Instant::now() + self.tenure.consul.timing().ttl;
        while Instant::now() < end {
            match self.take_back(index, &mut own).await {
                Ok(Some(revoked)) => return revoked,
                Ok(None) => {}
                Err(error) => tracing::warn!(error = chain_text(&error), "take the lease back"),
            }
            sleep(RETRY).await;
        }
        Revoked::No(Taken::Lost(Lost("consul does not say who has it".to_owned())))
    }

    /// Takes the offer back with the session `own`, made if there is none; none if that has to be tried again.
    async fn take_back(
        &self,
        index: u64,
        own: &mut Option<String>,
    ) -> Result<Option<Revoked>, consul::Error> {
        let Tenure { consul, session: offered, .. } = &self.tenure;
        let session = match own {
            Some(session) => session.clone(),
            None => own.insert(consul.open_session().await?).clone(),
        };
        if let Some(index) = consul.take_back(offered, index, &session).await? {
            return Ok(Some(Revoked::Yes { session, index }));
        }
        Ok(match consul.holder().await? {
            // An earlier attempt came through.
            Holder::Somebody(Held { session: now, index, .. }) if now == session => {
                Some(Revoked::Yes { session, index })
            }
            holder => self.taken(holder).map(Revoked::No),
        })
    }
}

fn done(held: Held, paused: Paused) -> Outcome {
    Outcome::Done(HandedOver { to: held.primary, paused })
}

/// Who has the lease after all.
enum Taken {
    By(Held),
    Lost(Lost),
}

/// Whether an offer was taken back.
enum Revoked {
    /// The lease has this session now, and its key this index.
    Yes {
        session: String,
        index: u64,
    },
    No(Taken),
}
