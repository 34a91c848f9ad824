//! The HTTP API and the replication stream.
//!
//! One listener serves HTTP/1.1 and HTTP/2 with prior knowledge; nodes speak HTTP/2 to each other.
//! [`frame`] is bytes only; the others own sockets and are asynchronous.

pub mod frame;
