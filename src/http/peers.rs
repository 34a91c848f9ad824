//! Who is connected: the replicas whose streams are open, for the status.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use ltx::NodeId;

use super::report::StatusPeer;

/// The address at the other end of a connection, in the extensions of its requests.
#[derive(Debug, Clone, Copy)]
pub(super) struct Address(pub(super) SocketAddr);

/// The open streams, in the order in which they came.
#[derive(Default)]
pub(super) struct Peers(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    next: u64,
    open: BTreeMap<u64, StatusPeer>,
}

/// One of them; dropped, it is gone.
pub(super) struct Peer {
    number: u64,
    state: Arc<Mutex<State>>,
}

impl Peers {
    /// A stream of `node` begins; `address` is unknown only where nobody noted it.
    pub(super) fn add(&self, node: NodeId, address: Option<Address>) -> Peer {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let peer = StatusPeer {
            node_id: node.to_string(),
            address: address.map_or_else(String::new, |Address(address)| address.to_string()),
            since_ms: i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
        };
        let mut state = self.0.lock().unwrap();
        let number = state.next;
        state.next += 1;
        state.open.insert(number, peer);
        Peer { number, state: self.0.clone() }
    }

    /// Those that are open now.
    pub(super) fn list(&self) -> Vec<StatusPeer> {
        self.0.lock().unwrap().open.values().cloned().collect()
    }

    /// How many are open now.
    pub(super) fn count(&self) -> usize {
        self.0.lock().unwrap().open.len()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.state.lock().unwrap().open.remove(&self.number);
    }
}
