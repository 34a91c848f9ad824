//! The HTTP API and the replication stream.
//!
//! One listener serves HTTP/1.1 and HTTP/2 with prior knowledge; nodes speak HTTP/2 to each other.
//! [`frame`] is bytes only; the others own sockets and are asynchronous.

pub mod body;
pub mod client;
pub mod frame;
pub mod report;

/// The header that carries the sender's node id, 16 hex digits.
pub const NODE_ID: &str = "litefs-id";
/// The header that carries the cluster id, if there is one yet.
pub const CLUSTER_ID: &str = "litefs-cluster-id";
