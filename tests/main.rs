//! All tests that are not beside the code, in one binary.

#![allow(clippy::disallowed_methods, reason = "tests make files in directories of their own")]
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

// What tests with real processes and mounts share.
mod support;

// Programs that people use: drivers, frameworks, applications.
mod apps;
// The command line: the real program with real files, no mount.
mod cli;
// Nodes on loopback, each a real process with a real mount: replication, and what breaks it.
mod cluster;
// Calls on an engine, without a mount and without a network.
mod engine;
// The API and the replication stream over real sockets on loopback.
mod http;
// Random scripts against a simple model.
mod model;
// SQLite on the mount of one real primary, and everything that can go wrong there.
mod mount;
// Nodes with a proxy in front of a small application.
mod proxy;
// SQLite's own test suite on the mount.
mod tcl;
// Each promise of docs/SEMANTICS.md, quoted above its test.
mod semantics;
// The rules of the source tree that no compiler checks.
mod tidy;
// SQLite on an engine whose file calls fail, stop or lose the power.
mod torture;
