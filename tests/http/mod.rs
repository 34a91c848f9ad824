//! The API over real sockets on loopback.

// A client against peers that send recordings, nonsense, half of everything, or nothing.
mod peers;
