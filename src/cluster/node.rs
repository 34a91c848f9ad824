//! The role of this node: one task that leads or follows, again and again, until the node stops.
//!
//! ```text
//! find -- lease --> lead (until the lease is lost or handed over) --.
//!   ^ \-- primary -> follow (until the stream ends) ----------------+
//!   `------------- again, or after a pause ------------------------'
//! ```
//!
//! Invariants: only this task sets the engine's role, and Primary only with a lease in hand; the role
//! is taken back before the lease is; a node never becomes primary of a cluster that has another
//! cluster id, nor, unless a person forces it, of one that has an id while the node has none.

use std::sync::Arc;
use std::time::Duration;

use ltx::NodeId;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use super::consul;
use super::control::{Command, Control, HandoffError, PromoteError};
use super::election::Force;
use super::lease::{Leaser, StaticRole};
use super::lineage::Lineage;
use super::lookout::{Lookout, View};
use super::memory::Memory;
use super::peers::Identity;
use crate::engine::{self, ClusterId, Engine, PrimaryInfo, Role, chain_text};
use crate::http::client::{self, Client};
use crate::http::proxy::{Link, Links};
use crate::http::security::Security;
use crate::http::{Stop, stopped};
use crate::limits;

mod elect;
mod follow;
mod handoff;
mod lead;

use super::pace::{Backoff, Reports};
use elect::Campaign;
use lead::Lease;

/// What the task needs to know of the configuration.
#[derive(Debug, Clone)]
pub struct Options {
    /// Whether the node may become primary.
    pub candidacy: Candidacy,
    /// The longest pause before the next attempt, `lease.reconnect-delay`.
    pub reconnect_delay: Duration,
    /// The only databases to replicate; empty for all.
    pub databases: Vec<String>,
    /// The node's own host name.
    pub hostname: String,
    /// What other nodes are shown.
    pub security: Security,
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
    identity: Identity,
    ready: watch::Sender<bool>,
    /// Who the primary says it is, while the stream to it is open.
    link: watch::Sender<Option<Link>>,
    /// Whether this node is the primary, for those who wait for it.
    leads: watch::Sender<bool>,
    /// A database needs a snapshot, which a new connection brings.
    reconnect: Arc<Notify>,
    commands: mpsc::Receiver<Command>,
    control: Control,
    memory: Arc<Memory>,
    lineage: Arc<Lineage>,
    lookout: Option<Lookout>,
    backoff: Backoff,
    reports: Reports,
    /// The node is about to stop: it takes no lease any more.
    steps_down: bool,
    /// Those who want this node to take a free lease whatever it has.
    forced: Vec<oneshot::Sender<Result<(), PromoteError>>>,
    /// The last primary, for when the lease cannot be asked.
    last_primary: Option<PrimaryInfo>,
    campaign: Campaign,
}

/// Why the node can neither lead nor follow now.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("ask consul lease")]
    Consul(#[from] consul::Error),
    #[error("invalid cluster id on {kind} lease: {id:?}")]
    InvalidClusterId { kind: &'static str, id: String },
    #[error(
        "cannot connect, {kind} lease already initialized with different ID: {theirs} (local ID is {ours})"
    )]
    OtherCluster { kind: &'static str, theirs: ClusterId, ours: ClusterId },
    #[error(
        "cannot find primary; this node has no cluster id and the cluster has one ({theirs}), so it must \
         follow a primary before it may lead; `litefs promote -force` on this node begins anew with what it has"
    )]
    Unproven { theirs: ClusterId },
    #[error("cannot find primary & ineligible to become primary")]
    Ineligible,
    #[error("the lease is lost: {0}")]
    Lost(consul::Lost),
    #[error("draw cluster id")]
    Random(#[source] std::io::Error),
    #[error("store cluster id")]
    Store(#[source] engine::Error),
    #[error("role change failed")]
    Thread(#[from] tokio::task::JoinError),
}

/// What the lease says.
enum Found {
    /// It is this node's.
    Lease(Lease),
    /// It is another node's.
    Primary(Leader),
    /// It is nobody's, and this node does not take it yet.
    Wait(Duration),
}

/// Another node that has the lease.
#[derive(Debug, Clone)]
struct Leader {
    primary: PrimaryInfo,
    /// Its process; none if the lease is static or cannot be asked, and of LiteFS.
    node_id: Option<NodeId>,
}

/// What the task does next.
#[derive(Debug, PartialEq, Eq)]
enum Then {
    /// Tries again after a pause that grows.
    Pause,
    /// Tries again after this pause.
    PauseFor(Duration),
    /// Tries again at once.
    Again,
    Stop,
}

impl Node {
    /// A node that has no role yet, the way to it, and the signal that it is ready.
    pub fn new(engine: Arc<Engine>, leaser: Leaser, options: Options) -> (Node, Control, Ready) {
        let (ready, is_ready) = watch::channel(false);
        let reconnect = Arc::new(Notify::new());
        let request = reconnect.clone();
        engine.on_reconnect(Box::new(move || request.notify_one()));
        let (control, commands) = Control::new();
        let memory = Arc::new(Memory::load(engine.layout()));
        let identity = Identity {
            node_id: engine.node_id(),
            hostname: options.hostname.clone(),
            candidacy: Some(options.candidacy),
        };
        let node = Node {
            identity,
            ready,
            link: watch::Sender::new(None),
            leads: watch::Sender::new(false),
            reconnect,
            commands,
            control: control.clone(),
            lineage: Arc::new(Lineage::new(memory.clone())),
            memory,
            lookout: None,
            backoff: Backoff::new(options.reconnect_delay),
            reports: Reports::default(),
            steps_down: false,
            forced: Vec::new(),
            last_primary: None,
            campaign: Campaign::default(),
            engine,
            leaser,
            options,
        };
        (node, control, is_ready)
    }

    /// Whether the stream to the primary is open, and to whom, from now on.
    pub fn links(&self) -> Links {
        self.link.subscribe()
    }

    /// Whether this node is the primary, from now on.
    pub fn leads(&self) -> watch::Receiver<bool> {
        self.leads.subscribe()
    }

    /// Leads or follows until `stop`; the role is given up and the lease given back on return.
    pub async fn run(mut self, mut stop: Stop) {
        if let Leaser::Consul(consul) = &self.leaser {
            self.lookout = Some(Lookout::new(consul.clone()));
        }
        loop {
            let then = match self.turn(&mut stop).await {
                Ok(then) => then,
                Err(error) => {
                    let text = chain_text(&error);
                    let id = self.engine.node_id();
                    self.reports.warn(&text, format_args!("{id}: {text}, retrying"));
                    Then::Pause
                }
            };
            let pause = match then {
                Then::Stop => break,
                Then::Again => continue,
                Then::Pause => self.backoff.next(),
                Then::PauseFor(pause) => pause,
            };
            if self.pause(pause, &mut stop).await == Then::Stop {
                break;
            }
        }
        if let Err(error) = self.set_role(Role::Unknown).await {
            tracing::error!(error = chain_text(&error), "give up role");
        }
        self.end_campaign().await;
    }

    async fn turn(&mut self, stop: &mut Stop) -> Result<Then, Error> {
        let found = tokio::select! {
            found = self.find() => found,
            () = stopped(stop) => return Ok(Then::Stop),
        };
        match found {
            Ok(Found::Lease(lease)) => self.lead(lease, stop).await,
            Ok(Found::Primary(leader)) => self.follow(leader, stop).await,
            Ok(Found::Wait(pause)) => {
                self.set_role(Role::Unknown).await?;
                Ok(Then::PauseFor(pause))
            }
            Err(error) => {
                self.set_role(Role::Unknown).await?;
                Err(error)
            }
        }
    }

    /// Gets the lease, or finds who has it.
    async fn find(&mut self) -> Result<Found, Error> {
        let consul = match &self.leaser {
            Leaser::Static { role: StaticRole::Primary, .. } => {
                return Ok(Found::Lease(Lease::Static));
            }
            Leaser::Static { role: StaticRole::Replica, primary } => {
                return Ok(Found::Primary(Leader { primary: primary.clone(), node_id: None }));
            }
            Leaser::Consul(consul) => consul.clone(),
        };
        match (self.find_in(&consul).await, &self.last_primary) {
            // As long as nobody can say who is primary, the last one is asked: it says no if it is not.
            (Err(Error::Consul(error)), Some(primary)) if !is_refusal(&error) => {
                let text = chain_text(&error);
                let primary = primary.clone();
                self.reports.warn(
                    &text,
                    format_args!("{text}; following the last known primary {:?}", primary.hostname),
                );
                Ok(Found::Primary(Leader { primary, node_id: None }))
            }
            (found, _) => found,
        }
    }

    /// Waits, at most for `pause`: until the lease changes, or somebody wants something.
    async fn pause(&mut self, pause: Duration, stop: &mut Stop) -> Then {
        let mut view = self.view();
        let pause = sleep(pause);
        tokio::pin!(pause);
        loop {
            tokio::select! {
                () = &mut pause => return Then::Again,
                () = view.changed() => return Then::Again,
                () = stopped(stop) => return Then::Stop,
                Some(command) = self.commands.recv() => {
                    if self.command_without_lease(command) == Then::Again {
                        return Then::Again;
                    }
                }
            }
        }
    }

    fn view(&self) -> View {
        self.lookout.as_ref().map_or_else(View::blind, Lookout::view)
    }

    /// Does what can be done without a lease; whether to look at the lease at once.
    fn command_without_lease(&mut self, command: Command) -> Then {
        // Who asked may have gone; then nobody wants the answer.
        match command {
            Command::HandOff { answer, .. } => {
                let _ = answer.send(Err(HandoffError::NotPrimary));
            }
            Command::StepDown { answer } => {
                self.steps_down = true;
                let _ = answer.send(());
            }
            Command::Promote { answer, .. } if self.options.candidacy == Candidacy::ReplicaOnly => {
                let _ = answer.send(Err(PromoteError::NotEligible));
            }
            Command::Promote { force, answer } => match self.engine.role() {
                Role::Replica(primary) => self.promote_through(primary, answer),
                _ if force == Force::Yes => {
                    self.forced.push(answer);
                    return Then::Again;
                }
                _ => {
                    let _ = answer.send(Err(PromoteError::NoPrimary));
                }
            },
        }
        Then::Pause
    }

    /// Asks the primary for its lease, beside everything else.
    fn promote_through(
        &self,
        primary: PrimaryInfo,
        answer: oneshot::Sender<Result<(), PromoteError>>,
    ) {
        let (node_id, leads) = (self.engine.node_id(), self.leads.subscribe());
        let security = self.options.security.clone();
        tokio::spawn(async move {
            // Who asked may have gone.
            let _ = answer.send(ask_for_lease(&primary, node_id, &security, leads).await);
        });
    }

    /// Whether a person wants this node to lead whatever it has.
    fn force(&mut self) -> Force {
        self.forced.retain(|answer| !answer.is_closed());
        if self.forced.is_empty() { Force::No } else { Force::Yes }
    }

    fn check_cluster(&self, theirs: Option<&ClusterId>) -> Result<Membership, Error> {
        match (theirs, self.engine.cluster_id()) {
            (Some(theirs), Some(ours)) if *theirs != ours => {
                Err(Error::OtherCluster { kind: self.leaser.kind(), theirs: theirs.clone(), ours })
            }
            (Some(_), None) => Ok(Membership::Unproven),
            _ => Ok(Membership::Proven),
        }
    }

    async fn store_cluster_id(&self, id: ClusterId) -> Result<(), Error> {
        let engine = self.engine.clone();
        spawn_blocking(move || engine.set_cluster_id(&id)).await?.map_err(Error::Store)
    }

    /// Sets the role; the engine may wait for what a former role has begun.
    async fn set_role(&self, role: Role) -> Result<(), Error> {
        let engine = self.engine.clone();
        Ok(spawn_blocking(move || engine.set_role(role)).await?)
    }

    /// Remembers the session of the lease, or forgets it.
    async fn remember_session(&self, session: Option<String>) -> Result<(), Error> {
        let memory = self.memory.clone();
        let remembered = spawn_blocking(move || match session {
            Some(session) => memory.set_session(&session),
            None => memory.forget_session(),
        });
        if let Err(error) = remembered.await? {
            tracing::warn!(%error, "remember lease: after a crash this node has to wait for it");
        }
        Ok(())
    }
}

/// Whether Consul was there and said no: what it says is then about this node, not about Consul.
fn is_refusal(error: &consul::Error) -> bool {
    matches!(error, consul::Error::Refused { code: 400..=499, .. })
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

/// Asks `primary` for its lease and waits until this node leads.
async fn ask_for_lease(
    primary: &PrimaryInfo,
    node_id: NodeId,
    security: &Security,
    mut leads: watch::Receiver<bool>,
) -> Result<(), PromoteError> {
    let failed = |text: String| PromoteError::Failed(text);
    let client = Client::new(&primary.advertise_url, security)
        .map_err(|error| failed(chain_text(&error)))?;
    match client.hand_off(node_id).await {
        Ok(()) => {}
        Err(client::Error::Response { code: 409, .. }) => return Err(PromoteError::NotEligible),
        Err(client::Error::Response { text, .. }) => return Err(failed(text)),
        Err(error) => return Err(failed(chain_text(&error))),
    }
    match timeout(limits::HANDOFF_TAKE_WAIT, leads.wait_for(|leads| *leads)).await {
        Ok(Ok(_)) => Ok(()),
        _ => Err(failed("this node got the lease but does not lead yet".to_owned())),
    }
}
