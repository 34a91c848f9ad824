//! The HTTP API and the replication stream.
//!
//! One listener serves HTTP/1.1 and HTTP/2 with prior knowledge; nodes speak HTTP/2 to each other.
//! [`frame`] is bytes only; the others own sockets and are asynchronous. Locks of the engine are
//! held at disk speed, never at the speed of a peer: what a peer is slow to take is spooled.

pub mod body;
pub mod client;
mod events;
pub mod frame;
mod gauges;
mod halt;
mod page;
mod peers;
mod query;
pub mod report;
mod rfc3339;
pub mod server;
mod socket;
mod spool;
mod stream;
mod transfer;

/// The header that carries the sender's node id, 16 hex digits.
pub const NODE_ID: &str = "litefs-id";
/// The header that carries the cluster id, if there is one yet.
pub const CLUSTER_ID: &str = "litefs-cluster-id";

/// The request header of a replica that takes a file which starts before its position and ends after
/// it, and so needs no snapshot when it stands in the middle of a file. LiteFS ignores it.
pub const OVERLAP: &str = "litefs-overlap";
/// The value of [`OVERLAP`].
pub const OVERLAP_ACCEPTED: &str = "accepted";

/// Says when to stop: once the sender is dropped.
pub type Stop = tokio::sync::watch::Receiver<()>;

/// Waits until the sender of `stop` is dropped.
pub async fn stopped(stop: &mut Stop) {
    while stop.changed().await.is_ok() {}
}
