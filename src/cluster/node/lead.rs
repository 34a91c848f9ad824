//! Being primary: from a lease in hand to the moment at which it is lost, given back or handed over.
//!
//! A lease in Consul is confirmed once a period, and each confirmation moves the engine's fence
//! ([`crate::engine::fence`]) to a moment counted from before the request was sent. What this node
//! has is written beside the lease at the same time, if it changed.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::handoff::{HandedOver, Outcome};
use super::{Candidacy, Error, Node, Then, draw_cluster_id};
use crate::boot_time::BootTime;
use crate::cluster::consul::{self, Consul, Lost};
use crate::cluster::control::{Command, HandoffError};
use crate::cluster::election::Record;
use crate::cluster::lineage::Lineage;
use crate::cluster::peers::Peer;
use crate::engine::{ClusterId, Engine, Role, chain_text};
use crate::http::{Stop, stopped};

/// The right to be primary.
pub(super) enum Lease {
    /// For as long as the node runs.
    Static,
    /// As long as Consul confirms it.
    Consul(Tenure),
}

/// A lease in Consul, and what came of it.
pub(super) struct Tenure {
    pub(super) consul: Arc<Consul>,
    pub(super) session: String,
    /// The index of the lease's key.
    pub(super) index: u64,
    /// The number of the primaryship.
    pub(super) term: u64,
    /// Before the last request was sent whose answer confirmed the lease.
    pub(super) confirmed: BootTime,
    /// What was last written beside the lease.
    pub(super) written: Option<Record>,
    /// Writes are refused, and the log says so.
    pub(super) fenced: bool,
}

/// Why a node stops being primary.
enum Left {
    Lost(Lost),
    HandedOver(HandedOver),
    Stop,
}

impl Tenure {
    /// The same lease, for somebody who does not confirm it.
    pub(super) fn again(&self) -> Tenure {
        let (consul, session) = (self.consul.clone(), self.session.clone());
        Tenure { consul, session, written: None, ..*self }
    }

    /// Confirms the lease once a period until it is lost. May be dropped and called again.
    pub(super) async fn keep(&mut self, engine: &Engine, lineage: &Lineage) -> Lost {
        loop {
            let period = self.consul.timing().period;
            sleep(period.saturating_sub(BootTime::now().since(self.confirmed))).await;
            if let Err(lost) = self.confirm(engine).await {
                return lost;
            }
            self.write_record(engine, lineage).await;
        }
    }

    /// Confirms the lease, as often as it takes.
    async fn confirm(&mut self, engine: &Engine) -> Result<(), Lost> {
        loop {
            let sent = BootTime::now();
            match self.consul.confirm(&self.session).await {
                Ok(Ok(index)) => {
                    self.index = index;
                    self.confirmed_at(sent, engine);
                    return Ok(());
                }
                Ok(Err(lost)) => return Err(lost),
                Err(error) => self.not_confirmed(&error)?,
            }
            // A call that failed at once is not made again at once.
            let pause = self.consul.timing().period / 5;
            sleep(pause.saturating_sub(BootTime::now().since(sent))).await;
        }
    }

    /// Lets this node commit until the fence after a request that was sent at `sent`.
    pub(super) fn confirmed_at(&mut self, sent: BootTime, engine: &Engine) {
        self.confirmed = sent;
        engine.shared().fence.confirm(sent.after(self.consul.timing().fence));
        if self.fenced {
            self.fenced = false;
            tracing::info!("lease confirmed again: writes are allowed");
        }
    }

    /// The lease could not be confirmed; it counts as lost once its session may be over.
    fn not_confirmed(&mut self, error: &consul::Error) -> Result<(), Lost> {
        let since = BootTime::now().since(self.confirmed);
        let timing = self.consul.timing();
        let text = chain_text(error);
        if since >= timing.ttl {
            return Err(Lost(format!("not confirmed for {}: {text}", seconds(since))));
        }
        if since >= timing.fence && !self.fenced {
            self.fenced = true;
            tracing::error!(
                "writes are refused: the lease could not be confirmed for {}: {text}",
                seconds(since)
            );
        }
        tracing::debug!(error = text, "confirm lease");
        Ok(())
    }

    /// Writes beside the lease how far this node is, if that has changed. What fails is tried again;
    /// the next confirmation says whether the lease is still ours.
    async fn write_record(&mut self, engine: &Engine, lineage: &Lineage) {
        let record = self.record(engine, lineage);
        if self.written.as_ref() == Some(&record) {
            return;
        }
        match self.consul.publish(self.index, &record).await {
            Ok(true) => self.written = Some(record),
            Ok(false) => tracing::debug!("positions not written: the lease's key has changed"),
            Err(error) => {
                tracing::debug!(error = chain_text(&error), "write positions beside the lease");
            }
        }
    }

    /// What this node has.
    pub(super) fn record(&self, engine: &Engine, lineage: &Lineage) -> Record {
        Record {
            hostname: self.consul.me().hostname.clone(),
            node_id: engine.node_id().to_string(),
            ..lineage.record(engine, self.term)
        }
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f32())
}

impl Node {
    /// Is primary until the lease is lost, given back or handed over.
    pub(super) async fn lead(&mut self, lease: Lease, stop: &mut Stop) -> Result<Then, Error> {
        let (id, url) = (self.engine.node_id(), self.leaser.advertise_url());
        tracing::info!("{id}: primary lease acquired, advertising as {url}");
        let led = match lease {
            Lease::Static => self.lead_for_good(stop).await,
            Lease::Consul(tenure) => self.lead_for_now(tenure, stop).await,
        };
        self.leads.send_replace(false);
        led
    }

    async fn lead_for_good(&mut self, stop: &mut Stop) -> Result<Then, Error> {
        if self.engine.cluster_id().is_none() {
            let id = draw_cluster_id()?;
            tracing::info!("set cluster id on {:?} lease {:?}", self.leaser.kind(), id.as_str());
            self.store_cluster_id(id).await?;
        }
        self.begin().await?;
        loop {
            let command = tokio::select! {
                Some(command) = self.commands.recv() => command,
                () = stopped(stop) => break,
            };
            match command {
                Command::HandOff { answer, .. } => {
                    let _ = answer.send(Err(HandoffError::Static));
                }
                command => self.command_as_primary(command),
            }
        }
        tracing::info!("{}: exiting primary", self.engine.node_id());
        Ok(Then::Stop)
    }

    async fn lead_for_now(&mut self, mut tenure: Tenure, stop: &mut Stop) -> Result<Then, Error> {
        let left = match self.take_office(&mut tenure).await {
            Ok(()) => self.hold(&mut tenure, stop).await,
            Err(Error::Lost(lost)) => Ok(Left::Lost(lost)),
            Err(error) => {
                self.leave(&tenure).await?;
                return Err(error);
            }
        };
        let id = self.engine.node_id();
        match left? {
            Left::Stop => {
                tracing::info!("{id}: exiting primary, destroying lease");
                self.leave(&tenure).await?;
                Ok(Then::Stop)
            }
            Left::Lost(lost) => {
                tracing::warn!("{id}: exiting primary, lease lost: {lost}");
                // The session may still be there: it is looked for when Consul answers again.
                self.set_role(Role::Unknown).await?;
                self.control.set_term(0);
                Ok(Then::Again)
            }
            Left::HandedOver(HandedOver { to, paused }) => {
                tracing::info!("{id}: lease handed over to {:?}", to.hostname);
                self.remember_session(None).await?;
                self.set_role(Role::Replica(to)).await?;
                self.control.set_term(0);
                drop(paused);
                Ok(Then::Again)
            }
        }
    }

    /// Gives the role up, and then the lease back.
    async fn leave(&mut self, tenure: &Tenure) -> Result<(), Error> {
        self.set_role(Role::Unknown).await?;
        self.control.set_term(0);
        // Nothing is committed any more: who has all of this may lead at once.
        let record = Record { complete: true, ..tenure.record(&self.engine, &self.lineage) };
        if let Err(error) = tenure.consul.publish(tenure.index, &record).await {
            tracing::warn!(error = chain_text(&error), "write positions beside the lease");
        }
        tenure.consul.release(&tenure.session).await;
        self.remember_session(None).await
    }

    /// Makes a lease that was just taken count: its term, the cluster's id, and then the role.
    async fn take_office(&mut self, tenure: &mut Tenure) -> Result<(), Error> {
        let record = tenure.record(&self.engine, &self.lineage);
        let sent = BootTime::now();
        if !tenure.consul.publish(tenure.index, &record).await? {
            return Err(Error::Lost(Lost("its key has changed".to_owned())));
        }
        tenure.written = Some(record);
        self.establish_cluster_id(&tenure.consul).await?;
        // Only now: a term that nobody else knows of must not count for more than one that is known.
        let (lineage, term) = (self.lineage.clone(), tenure.term);
        tokio::task::spawn_blocking(move || lineage.begin(term)).await?;
        self.control.set_term(term);
        tenure.confirmed_at(sent, &self.engine);
        self.begin().await
    }

    /// Makes sure that Consul and this node have the cluster id, a new one if neither has one.
    async fn establish_cluster_id(&mut self, consul: &Consul) -> Result<(), Error> {
        let theirs = self.leased_cluster_id(consul).await?;
        self.check_cluster(theirs.as_ref())?;
        let id = match (theirs, self.engine.cluster_id()) {
            (Some(_), Some(_)) => return Ok(()),
            // Forced: the node belongs to this cluster from now on.
            (Some(theirs), None) => theirs,
            (None, ours) => self.create_cluster_id(consul, ours).await?,
        };
        self.store_cluster_id(id).await
    }

    async fn create_cluster_id(
        &mut self,
        consul: &Consul,
        ours: Option<ClusterId>,
    ) -> Result<ClusterId, Error> {
        let id = match ours {
            Some(id) => id,
            None => draw_cluster_id()?,
        };
        if consul.create_cluster_id(&id).await? {
            tracing::info!("set cluster id on \"consul\" lease {:?}", id.as_str());
            return Ok(id);
        }
        // Another node was first.
        let theirs = self.leased_cluster_id(consul).await?;
        self.check_cluster(theirs.as_ref())?;
        Ok(theirs.unwrap_or(id))
    }

    /// The role is this node's.
    async fn begin(&mut self) -> Result<(), Error> {
        self.set_role(Role::Primary).await?;
        self.leads.send_replace(true);
        self.ready.send_replace(true);
        self.backoff.reset();
        self.reports.clear();
        for answer in self.forced.drain(..) {
            // Who asked may have gone.
            let _ = answer.send(Ok(()));
        }
        Ok(())
    }

    async fn hold(&mut self, tenure: &mut Tenure, stop: &mut Stop) -> Result<Left, Error> {
        loop {
            let command = tokio::select! {
                lost = tenure.keep(&self.engine, &self.lineage) => return Ok(Left::Lost(lost)),
                Some(command) = self.commands.recv() => command,
                () = stopped(stop) => return Ok(Left::Stop),
            };
            let left = match command {
                Command::HandOff { to, answer } => {
                    let handed = match self.target(to) {
                        Ok(peer) => self.hand_over(tenure, &peer).await,
                        Err(error) => Outcome::Kept(error),
                    };
                    let (result, left) = self.handed(handed).await?;
                    let _ = answer.send(result);
                    left
                }
                Command::StepDown { answer } => {
                    let left = self.step_down(tenure).await?;
                    let _ = answer.send(());
                    left
                }
                command => {
                    self.command_as_primary(command);
                    None
                }
            };
            if let Some(left) = left {
                return Ok(left);
            }
        }
    }

    /// The node is about to stop: hands the lease to the candidate that has most.
    async fn step_down(&mut self, tenure: &mut Tenure) -> Result<Option<Left>, Error> {
        self.steps_down = true;
        let Some(peer) = self.control.peers().freshest_candidate() else {
            tracing::info!("no candidate is connected that could take the lease");
            return Ok(None);
        };
        let handed = self.hand_over(tenure, &peer).await;
        let (result, left) = self.handed(handed).await?;
        if let Err(error) = result {
            tracing::warn!("the lease is not handed over: {error}");
        }
        Ok(left)
    }

    /// What to answer, and whether this node stops being primary. If it does, its role is given up
    /// here: whoever is told must find it so.
    async fn handed(
        &self,
        outcome: Outcome,
    ) -> Result<(Result<(), HandoffError>, Option<Left>), Error> {
        Ok(match outcome {
            Outcome::Done(handed) => {
                self.set_role(Role::Replica(handed.to.clone())).await?;
                (Ok(()), Some(Left::HandedOver(handed)))
            }
            Outcome::Kept(error) => {
                tracing::warn!("{}: handoff failed: {error}", self.engine.node_id());
                (Err(error), None)
            }
            Outcome::Lost(lost) => {
                let error = HandoffError::Failed(format!("the lease was lost: {lost}"));
                (Err(error), Some(Left::Lost(lost)))
            }
        })
    }

    fn command_as_primary(&mut self, command: Command) {
        // Who asked may have gone; then nobody wants the answer.
        match command {
            Command::Promote { answer, .. } => _ = answer.send(Ok(())),
            Command::StepDown { answer } => _ = answer.send(()),
            Command::HandOff { answer, .. } => _ = answer.send(Err(HandoffError::NotPrimary)),
        }
    }

    /// The connected replica to which the lease is to go.
    fn target(&self, to: ltx::NodeId) -> Result<Arc<Peer>, HandoffError> {
        let peer = self.control.peers().find(to).ok_or(HandoffError::NotConnected)?;
        match peer.candidacy() {
            Some(Candidacy::ReplicaOnly) => Err(HandoffError::NotEligible),
            // A LiteFS node does not say it.
            Some(Candidacy::Candidate) | None => Ok(peer),
        }
    }
}
