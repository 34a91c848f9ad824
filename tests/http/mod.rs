//! The API over real sockets on loopback.

// A node with a real engine, and what tests ask of one.
mod node;

// A client against peers that send recordings, nonsense, half of everything, or nothing.
pub mod peers;
// The replica against primaries that are recorded or broken.
mod replicas;
// Each route: what it answers, and what it refuses.
mod routes;
// A primary and replicas, all ours.
mod streams;
