//! The file system mounted for real, with a small volume over a temporary directory.

#![allow(clippy::unwrap_used, reason = "a step that fails fails the test")]

// The volume: files of a directory, POSIX locks, everything counted.
mod volume;
// Another process that opens, locks and waits as it is told.
mod child;
// Inputs that the fuzzer found.
mod corpus;
// Reading, writing, listing, removing; with and without backing files.
mod files;
// Locks between processes, waiting, interruption.
mod locks;
// What the mount itself does: ending, stale mounts, notifications, panics.
mod mounts;
// Which transport it is, and which CPUs its rings use.
mod rings;
// SQLite's own program at work on the mount.
mod sqlite;
