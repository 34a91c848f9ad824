//! The API over real sockets on loopback.

// A node with a real engine, and what tests ask of one.
mod node;

// A client against peers that send recordings, nonsense, half of everything, or nothing.
pub mod peers;
// The replica against primaries that are recorded or broken.
mod replicas;
// What peers may take up on the disk, and how long they make others wait.
mod room;
// Each route: what it answers, and what it refuses.
mod routes;
// A primary and replicas, all ours.
mod streams;
