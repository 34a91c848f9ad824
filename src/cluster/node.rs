//! The role of this node: one task that leads or follows, again and again, until the node stops.
//!
//! ```text
//! find -- lease --> lead (until the lease is lost) --.
//!   ^ \-- primary -> follow (until the stream ends) --+
//!   `----------------- pause ------------------------'
//! ```
//!
//! Invariants: only this task sets the engine's role, and Primary only with a lease in hand; the role
//! is taken back before the lease is; a node never becomes primary of a cluster that has another
//! cluster id, nor of one that has an id while the node has none.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::lease::{self, Lease, Leaser};
use super::replica;
use crate::engine::{self, ClusterId, Engine, PrimaryInfo, Role, chain_text};
use crate::http::proxy::{Link, Links};
use crate::http::{Stop, stopped};

/// What the task needs to know of the configuration.
#[derive(Debug, Clone)]
pub struct Options {
    /// Whether the node may become primary.
    pub candidacy: Candidacy,
    /// Pause before the next attempt, `lease.reconnect-delay`.
    pub reconnect_delay: Duration,
    /// The only databases to replicate; empty for all.
    pub databases: Vec<String>,
}

/// Whether a node may become primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Candidacy {
    /// It may.
    Candidate,
    /// It only follows.
    ReplicaOnly,
}

/// True once the node has been primary, or has had everything its primary had.
pub type Ready = watch::Receiver<bool>;

/// The task that decides the role of a node.
pub struct Node {
    engine: Arc<Engine>,
    leaser: Leaser,
    options: Options,
    ready: watch::Sender<bool>,
    /// Who the primary says it is, while the stream to it is open.
    link: watch::Sender<Option<Link>>,
    /// A database needs a snapshot, which a new connection brings.
    reconnect: Arc<Notify>,
}

/// Why the node can neither lead nor follow now.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("ask {kind} lease")]
    Lease {
        kind: &'static str,
        #[source]
        source: lease::Error,
    },
    #[error("invalid cluster id on {kind} lease: {id:?}")]
    InvalidClusterId { kind: &'static str, id: String },
    #[error(
        "cannot connect, {kind} lease already initialized with different ID: {theirs} (local ID is {ours})"
    )]
    OtherCluster { kind: &'static str, theirs: ClusterId, ours: ClusterId },
    #[error("cannot find primary")]
    NoPrimary,
    #[error("cannot find primary & ineligible to become primary")]
    Ineligible,
    #[error("draw cluster id")]
    Random(#[source] std::io::Error),
    #[error("store cluster id")]
    Store(#[source] engine::Error),
    #[error("role change failed")]
    Thread(#[from] tokio::task::JoinError),
}

/// What the lease says.
enum Found {
    Lease(Lease),
    Primary(PrimaryInfo),
}

/// What the task does next.
#[derive(PartialEq, Eq)]
enum Then {
    Pause,
    Stop,
}

impl Node {
    /// A node that has no role yet, and the signal that it is ready.
    pub fn new(engine: Arc<Engine>, leaser: Leaser, options: Options) -> (Node, Ready) {
        let (ready, is_ready) = watch::channel(false);
        let reconnect = Arc::new(Notify::new());
        let request = reconnect.clone();
        engine.on_reconnect(Box::new(move || request.notify_one()));
        let link = watch::channel(None).0;
        (Node { engine, leaser, options, ready, link, reconnect }, is_ready)
    }

    /// Whether the stream to the primary is open, and to whom, from now on.
    pub fn links(&self) -> Links {
        self.link.subscribe()
    }

    /// Leads or follows until `stop`; the role is given up and the lease given back on return.
    pub async fn run(self, mut stop: Stop) {
        loop {
            let then = match self.turn(&mut stop).await {
                Ok(then) => then,
                Err(error) => {
                    let text = chain_text(&error);
                    tracing::warn!("{}: {text}, retrying", self.engine.node_id());
                    Then::Pause
                }
            };
            if then == Then::Stop {
                break;
            }
            tokio::select! {
                () = sleep(self.options.reconnect_delay) => {}
                () = stopped(&mut stop) => break,
            }
        }
        if let Err(error) = self.set_role(Role::Unknown).await {
            tracing::error!(error = chain_text(&error), "give up role");
        }
    }

    async fn turn(&self, stop: &mut Stop) -> Result<Then, Error> {
        match self.find().await {
            Ok(Found::Lease(lease)) => self.lead(lease, stop).await,
            Ok(Found::Primary(primary)) => self.follow(primary, stop).await,
            Err(error) => {
                self.set_role(Role::Unknown).await?;
                Err(error)
            }
        }
    }

    /// Gets the lease, or finds who has it.
    async fn find(&self) -> Result<Found, Error> {
        let theirs = self.leased_cluster_id().await?;
        if let Some(primary) = self.primary_info().await? {
            self.check_cluster(theirs)?;
            return Ok(Found::Primary(primary));
        }
        if self.options.candidacy == Candidacy::ReplicaOnly {
            return Err(Error::Ineligible);
        }
        if self.check_cluster(theirs)? == Membership::Unproven {
            return Err(Error::NoPrimary);
        }
        match self.leaser.acquire().await {
            Ok(lease) => Ok(Found::Lease(lease)),
            Err(lease::Error::PrimaryExists) => {
                let primary = self.primary_info().await?;
                primary.map(Found::Primary).ok_or(Error::NoPrimary)
            }
        }
    }

    fn check_cluster(&self, theirs: Option<ClusterId>) -> Result<Membership, Error> {
        match (theirs, self.engine.cluster_id()) {
            (Some(theirs), Some(ours)) if theirs != ours => {
                Err(Error::OtherCluster { kind: self.leaser.kind(), theirs, ours })
            }
            (Some(_), None) => Ok(Membership::Unproven),
            _ => Ok(Membership::Proven),
        }
    }

    async fn primary_info(&self) -> Result<Option<PrimaryInfo>, Error> {
        self.leaser.primary_info().await.map_err(|source| self.lease_error(source))
    }

    async fn leased_cluster_id(&self) -> Result<Option<ClusterId>, Error> {
        let id = self.leaser.cluster_id().await.map_err(|source| self.lease_error(source))?;
        let parse = |id: String| {
            let kind = self.leaser.kind();
            ClusterId::new(&id).ok_or(Error::InvalidClusterId { kind, id })
        };
        id.map(parse).transpose()
    }

    fn lease_error(&self, source: lease::Error) -> Error {
        Error::Lease { kind: self.leaser.kind(), source }
    }

    /// Is primary until the lease is lost.
    async fn lead(&self, mut lease: Lease, stop: &mut Stop) -> Result<Then, Error> {
        let led = self.hold(&mut lease, stop).await;
        tracing::info!("{}: exiting primary, destroying lease", self.engine.node_id());
        self.set_role(Role::Unknown).await?;
        lease.close().await;
        led
    }

    async fn hold(&self, lease: &mut Lease, stop: &mut Stop) -> Result<Then, Error> {
        let (id, url) = (self.engine.node_id(), self.leaser.advertise_url());
        tracing::info!("{id}: primary lease acquired, advertising as {url}");
        self.establish_cluster_id().await?;
        self.set_role(Role::Primary).await?;
        self.ready.send_replace(true);
        tokio::select! {
            () = lease.expired() => {
                tracing::warn!("{id}: lease expired");
                Ok(Then::Pause)
            }
            () = stopped(stop) => Ok(Then::Stop),
        }
    }

    /// Makes sure that the lease and this node have the cluster id, a new one if neither has one.
    async fn establish_cluster_id(&self) -> Result<(), Error> {
        if self.leased_cluster_id().await?.is_some() {
            return Ok(()); // find() has compared it with ours
        }
        let id = match self.engine.cluster_id() {
            Some(id) => id,
            None => draw_cluster_id()?,
        };
        let set = self.leaser.set_cluster_id(id.as_str()).await;
        set.map_err(|source| self.lease_error(source))?;
        tracing::info!("set cluster id on {:?} lease {:?}", self.leaser.kind(), id.as_str());
        let engine = self.engine.clone();
        spawn_blocking(move || engine.set_cluster_id(&id)).await?.map_err(Error::Store)
    }

    /// Follows `primary` until the stream ends. The role stays: as long as the lease names this
    /// primary, writes belong there, reachable or not.
    async fn follow(&self, primary: PrimaryInfo, stop: &mut Stop) -> Result<Then, Error> {
        let PrimaryInfo { hostname, advertise_url } = &primary;
        tracing::info!(
            "{}: existing primary found ({hostname}), connecting as replica to {advertise_url:?}",
            self.engine.node_id()
        );
        self.set_role(Role::Replica(primary.clone())).await?;
        let replica = replica::Replica {
            engine: &self.engine,
            primary: &primary,
            databases: &self.options.databases,
            ready: &self.ready,
            link: &self.link,
            reconnect: &self.reconnect,
        };
        match replica.run(stop).await {
            Ok(replica::End::Stopped) => return Ok(Then::Stop),
            Ok(replica::End::Closed) => {
                tracing::info!("{}: disconnected from primary", self.engine.node_id());
            }
            Ok(replica::End::Handoff { lease_id }) => {
                // No lease that exists can be handed over: only a broken primary does this.
                tracing::warn!(
                    "ignored handoff of lease {lease_id:?}: not supported by this lease"
                );
            }
            Err(error) => {
                let text = chain_text(&error);
                tracing::warn!("{}: disconnected from primary: {text}", self.engine.node_id());
            }
        }
        Ok(Then::Pause)
    }

    /// Sets the role; the engine may wait for what a former role has begun.
    async fn set_role(&self, role: Role) -> Result<(), Error> {
        let engine = self.engine.clone();
        Ok(spawn_blocking(move || engine.set_role(role)).await?)
    }
}

/// Whether this node is known to belong to the cluster of its lease.
#[derive(PartialEq, Eq)]
enum Membership {
    /// It has the cluster's id, or the cluster has none.
    Proven,
    /// The cluster has an id and the node none: it must follow before it may lead.
    Unproven,
}

fn draw_cluster_id() -> Result<ClusterId, Error> {
    let mut bytes = [0; size_of::<u64>()];
    let drawn = getrandom::fill(&mut bytes);
    drawn.map_err(|error| Error::Random(std::io::Error::other(error.to_string())))?;
    let text = format!("LFSC{:016X}", u64::from_be_bytes(bytes));
    let invalid = || Error::InvalidClusterId { kind: "new", id: text.clone() };
    ClusterId::new(&text).ok_or_else(invalid)
}
