//! Every bound on a queue, body, cache or wait, with the reason for its size.

use std::time::Duration;

// Wire: what a peer may announce.

/// Longest database name taken from a peer, in bytes: a file name on Linux cannot be longer.
pub const PEER_NAME_BYTES_MAX: usize = 255;
/// Longest lease id taken from a peer, in bytes: Consul's are 36; leaves room for other leasers.
pub const LEASE_ID_BYTES_MAX: usize = 256;
/// Most entries of a position map: far above what one mount can hold open, and 18 MB at the most.
pub const POSITION_MAP_ENTRIES_MAX: usize = 65_536;
/// Largest position map in bytes: its count, then a name length, a name, a TXID and a checksum each.
pub const POSITION_MAP_BYTES_MAX: usize =
    4 + POSITION_MAP_ENTRIES_MAX * (4 + PEER_NAME_BYTES_MAX + 8 + 8);
