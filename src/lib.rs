//! litefs replicates SQLite databases between machines through a FUSE file system.
//!
//! A kernel request comes in through `fuse`, [`volume`] turns it into a call on one database of the
//! [`engine`]: locks, capture, checksum, chain, feed. [`http`] streams the chain to the replicas,
//! [`cluster`] says who is primary and applies what comes from there.

pub mod cli;
pub mod cluster;
pub mod config;
pub mod engine;
pub mod http;
pub mod limits;
pub mod os;
pub mod sqlite;
pub mod supervisor;
pub mod telemetry;
pub mod volume;
