//! litefs replicates SQLite databases between machines through a FUSE file system.
//!
//! ```text
//! kernel -> fuse -> volume -> engine: locks -> capture -> checksum -> chain -> feed     primary
//!                                                                      |
//!                                               http: stream -> wire -> client
//!                                                                      |
//! kernel <- fuse <- volume <- engine: feed <- chain <- apply <- cluster: replica        replica
//! ```
//!
//! The end of a transaction is a lock given up or a journal ended. [`volume`] turns the kernel's
//! requests into calls on one database of the [`engine`], [`http`] streams the LTX files of its chain,
//! [`cluster`] says who is primary and takes in what comes from there. `docs/ARCHITECTURE.md` has the
//! map, `docs/SEMANTICS.md` what an application may rely on.

pub mod boot_time;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod engine;
pub mod http;
pub mod limits;
pub mod os;
#[cfg(any(test, fuzzing))]
pub mod properties;
pub mod sqlite;
pub mod supervisor;
pub mod telemetry;
pub mod threads;
pub mod tls;
pub mod volume;
