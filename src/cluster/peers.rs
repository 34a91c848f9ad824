//! The replicas that are connected to this node: who they are, how far they have been sent, and the
//! lease that one of them is to get.
//!
//! A stream joins when it begins and leaves when it is dropped; what hands the lease over finds the
//! stream's replica here.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ltx::NodeId;
use tokio::sync::Notify;

use super::node::Candidacy;

/// What a replica says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its process.
    pub node_id: NodeId,
    /// Its host name; empty if it does not say it.
    pub hostname: String,
    /// Whether it may become primary; a LiteFS node does not say it.
    pub candidacy: Option<Candidacy>,
}

/// A connected replica.
#[derive(Debug)]
pub struct Peer {
    identity: Identity,
    /// The sum of the TXIDs that it was sent, or had.
    sent: AtomicU64,
    /// The lease that it is to get.
    lease: Mutex<Option<String>>,
    offered: Notify,
}

/// The connected replicas.
#[derive(Debug, Default)]
pub struct Peers {
    inner: Mutex<Inner>,
    joined: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    /// In the order in which they joined.
    peers: BTreeMap<u64, Arc<Peer>>,
}

/// A replica for as long as its stream lasts.
#[derive(Debug)]
pub struct Membership {
    peers: Arc<Peers>,
    number: u64,
    peer: Arc<Peer>,
}

impl Peers {
    /// A stream to this replica begins.
    pub fn join(self: &Arc<Peers>, identity: Identity) -> Membership {
        let peer = Arc::new(Peer {
            identity,
            sent: AtomicU64::new(0),
            lease: Mutex::default(),
            offered: Notify::new(),
        });
        let mut inner = self.inner.lock().unwrap();
        let number = inner.next;
        inner.next += 1;
        inner.peers.insert(number, peer.clone());
        drop(inner);
        self.joined.notify_waiters();
        Membership { peers: self.clone(), number, peer }
    }

    /// The last stream of that process.
    pub fn find(&self, node_id: NodeId) -> Option<Arc<Peer>> {
        let inner = self.inner.lock().unwrap();
        inner.peers.values().rev().find(|peer| peer.identity.node_id == node_id).cloned()
    }

    /// The candidate that has been sent most.
    pub fn freshest_candidate(&self) -> Option<Arc<Peer>> {
        let inner = self.inner.lock().unwrap();
        let is_candidate = |peer: &&Arc<Peer>| peer.candidacy() == Some(Candidacy::Candidate);
        inner.peers.values().filter(is_candidate).max_by_key(|peer| peer.sent()).cloned()
    }

    /// Waits until the process of `peer` has begun another stream.
    pub async fn came_back(&self, peer: &Arc<Peer>) {
        loop {
            let joined = self.joined.notified();
            tokio::pin!(joined);
            joined.as_mut().enable();
            let now = self.find(peer.identity.node_id);
            if now.is_some_and(|now| !Arc::ptr_eq(&now, peer)) {
                return;
            }
            joined.await;
        }
    }
}

impl Peer {
    /// Who it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Whether it may become primary, if it says so.
    pub fn candidacy(&self) -> Option<Candidacy> {
        self.identity.candidacy
    }

    /// The sum of the TXIDs that it was sent.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Has its stream bring it up to date, give it the lease, and end.
    pub fn offer(&self, lease: String) {
        *self.lease.lock().unwrap() = Some(lease);
        self.offered.notify_one();
    }

    /// Keeps the lease from it, if its stream has not picked it up yet.
    pub fn withdraw(&self) {
        self.lease.lock().unwrap().take();
    }
}

impl Membership {
    /// The replica's process.
    pub fn node_id(&self) -> NodeId {
        self.peer.identity.node_id
    }

    /// Notes how far the replica was sent.
    pub fn set_sent(&self, transactions: u64) {
        self.peer.sent.store(transactions, Ordering::Relaxed);
    }

    /// Waits until the replica is to get the lease; which one.
    pub async fn lease(&self) -> String {
        loop {
            if let Some(lease) = self.peer.lease.lock().unwrap().take() {
                return lease;
            }
            self.peer.offered.notified().await;
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.peers.inner.lock().unwrap().peers.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(node_id: u64, candidacy: Option<Candidacy>) -> Identity {
        Identity { node_id: NodeId(node_id), hostname: String::new(), candidacy }
    }

    #[test]
    fn the_candidate_that_was_sent_most_is_the_freshest() {
        let peers = Arc::new(Peers::default());
        assert!(peers.freshest_candidate().is_none());
        let of = |id, candidacy, sent| {
            let member = peers.join(identity(id, candidacy));
            member.set_sent(sent);
            member
        };
        let members = [
            of(1, Some(Candidacy::Candidate), 5),
            of(2, Some(Candidacy::Candidate), 7),
            of(3, Some(Candidacy::ReplicaOnly), 9),
            of(4, None, 9),
        ];
        assert_eq!(peers.freshest_candidate().unwrap().identity().node_id, NodeId(2));
        drop(members);
        assert!(peers.find(NodeId(2)).is_none());
    }

    #[tokio::test]
    async fn an_offer_reaches_the_stream() {
        let peers = Arc::new(Peers::default());
        let member = peers.join(identity(1, None));
        let peer = peers.find(NodeId(1)).unwrap();
        peer.offer("session".to_owned());
        assert_eq!(member.lease().await, "session");
        peer.offer("withdrawn".to_owned());
        peer.withdraw();
        tokio::select! {
            biased;
            lease = member.lease() => panic!("{lease}"),
            () = std::future::ready(()) => {}
        }
        peer.offer("another".to_owned());
        assert_eq!(member.lease().await, "another");
        drop(member);
        let _again = peers.join(identity(1, None));
        peers.came_back(&peer).await;
    }
}
