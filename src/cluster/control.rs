//! What others ask of the task that decides the role of this node: the API, and whoever stops it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ltx::NodeId;
use tokio::sync::{mpsc, oneshot};

use super::election::Force;
use super::peers::Peers;

/// A request, and where its answer goes.
#[derive(Debug)]
pub enum Command {
    /// Give the lease to a connected replica.
    HandOff {
        /// Its process.
        to: NodeId,
        /// Once it is the primary, or not.
        answer: oneshot::Sender<Result<(), HandoffError>>,
    },
    /// Become primary.
    Promote {
        /// Whatever this node has.
        force: Force,
        /// Once it is the primary, or not.
        answer: oneshot::Sender<Result<(), PromoteError>>,
    },
    /// Give the lease to whom it may go, for this node is about to stop; and take none any more.
    StepDown {
        /// Once that is done, or has failed.
        answer: oneshot::Sender<()>,
    },
}

/// Why a lease was not handed over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandoffError {
    /// Only a primary has a lease.
    #[error("node is not currently primary")]
    NotPrimary,
    /// No stream of that process.
    #[error("target node is not currently connected")]
    NotConnected,
    /// The target said that it is no candidate.
    #[error("not eligible to become primary")]
    NotEligible,
    /// The lease is static.
    #[error("static lease does not support handoff")]
    Static,
    /// A step failed; this node goes on as the primary, unless it says otherwise.
    #[error("{0}")]
    Failed(String),
}

/// Why this node did not become primary.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PromoteError {
    /// It is no candidate.
    #[error("not eligible to become primary")]
    NotEligible,
    /// Nobody could hand the lease over.
    #[error("no primary is currently available for handoff, cannot promote")]
    NoPrimary,
    /// The primary refused, or the lease did not come.
    #[error("handoff failed: {0}")]
    Failed(String),
}

/// A way to the task that decides the role.
#[derive(Debug, Clone)]
pub struct Control {
    commands: mpsc::Sender<Command>,
    peers: Arc<Peers>,
    /// The number of this node's primaryship; 0 for none.
    term: Arc<AtomicU64>,
}

impl Control {
    /// A way to a new task, and its end there.
    pub(super) fn new() -> (Control, mpsc::Receiver<Command>) {
        let (commands, queue) = mpsc::channel(16);
        (Control { commands, peers: Arc::default(), term: Arc::default() }, queue)
    }

    /// The connected replicas.
    pub fn peers(&self) -> &Arc<Peers> {
        &self.peers
    }

    /// The number of this node's primaryship, if it is counted.
    pub fn term(&self) -> Option<u64> {
        Some(self.term.load(Ordering::SeqCst)).filter(|term| *term > 0)
    }

    /// Says the number of this node's primaryship.
    pub(super) fn set_term(&self, term: u64) {
        self.term.store(term, Ordering::SeqCst);
    }

    /// Hands the lease to the replica with that id.
    pub async fn hand_off(&self, to: NodeId) -> Result<(), HandoffError> {
        self.ask(|answer| Command::HandOff { to, answer })
            .await
            .unwrap_or(Err(HandoffError::NotPrimary))
    }

    /// Makes this node the primary.
    pub async fn promote(&self, force: Force) -> Result<(), PromoteError> {
        self.ask(|answer| Command::Promote { force, answer })
            .await
            .unwrap_or(Err(PromoteError::NoPrimary))
    }

    /// Gives the lease away, for this node is about to stop.
    pub async fn step_down(&self) {
        // None means that the task is over, and its lease given back.
        let _ = self.ask(|answer| Command::StepDown { answer }).await;
    }

    /// The answer; none if the task is over.
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(command(answer)).await.ok()?;
        answered.await.ok()
    }
}
