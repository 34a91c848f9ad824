//! The HTTP API and the replication stream.
//!
//! One listener serves HTTP/1.1 and HTTP/2 with prior knowledge; nodes speak HTTP/2 to each other.
//! [`proxy`] is a server of its own, in front of the application.
//! [`frame`] is bytes only; the others own sockets and are asynchronous. Locks of the engine are
//! held at disk speed, never at the speed of a peer: what a peer is slow to take is spooled.

use crate::limits;

pub mod body;
pub mod client;
mod events;
pub mod frame;
mod gauges;
mod halt;
mod page;
mod peers;
#[cfg(any(test, fuzzing))]
pub(crate) mod properties;
pub mod proxy;
mod query;
pub mod report;
mod rfc3339;
pub mod security;
pub mod server;
mod socket;
mod spool;
mod stream;
mod transfer;
pub mod url;
mod wire;

/// The header that carries the sender's node id, 16 hex digits.
pub const NODE_ID: &str = "litefs-id";
/// The header that carries the cluster id, if there is one yet.
pub const CLUSTER_ID: &str = "litefs-cluster-id";

/// The request header of a replica that takes a file which starts before its position and ends after
/// it, and so needs no snapshot when it stands in the middle of a file. LiteFS ignores it.
pub const OVERLAP: &str = "litefs-overlap";
/// The value of [`OVERLAP`].
pub const OVERLAP_ACCEPTED: &str = "accepted";

/// The response header of `/stream` that says where the primary's proxy takes writes of other nodes.
/// LiteFS ignores it.
pub const PROXY_URL: &str = "litefs-proxy-url";
/// The request header of a replica that says whether it may become primary: `true` or `false`.
pub const CANDIDATE: &str = "litefs-candidate";
/// The request header of a replica with its host name.
pub const HOSTNAME: &str = "litefs-hostname";
/// The header of a stream's answer with the number of the primaryship, in decimal digits.
pub const TERM: &str = "litefs-term";

/// The header of a stream's answer with the databases of which the replica has another history than the
/// primary: names separated by commas, escaped as in a query, or `*` for more than fit.
pub const CONTRADICTED: &str = "litefs-contradicted";
/// The longest such header, in bytes.
pub const CONTRADICTED_MAX: usize = 4096;

/// As many connections at a time as a listener may have with this part of the descriptors of the process.
fn connections_max(part: u64, most: usize) -> usize {
    use nix::sys::resource::{Resource, getrlimit};
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    let wanted = usize::try_from(descriptors / part).unwrap_or(usize::MAX);
    wanted.clamp(limits::CONNECTIONS_MIN, most)
}

/// Says when to stop: once the sender is dropped.
pub type Stop = tokio::sync::watch::Receiver<()>;

/// Waits until the sender of `stop` is dropped.
pub async fn stopped(stop: &mut Stop) {
    while stop.changed().await.is_ok() {}
}
