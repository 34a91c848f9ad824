//! What tests with real processes and real mounts share.

#![allow(dead_code, reason = "a helper may be ahead of the tests that need it")]

/// An authority, a certificate for a node, and a token.
pub mod certificates;
/// Chance that can be had again.
pub mod chance;
/// A real Consul agent in memory, and links that a test can cut.
pub mod consul;
/// A small file system of its own for a data directory.
pub mod disk;
/// A database as its pages, read past the mount, and as its chain of LTX files.
pub mod image;
/// A node in this process, whose role a test decides.
pub mod local;
/// A kernel without caches, for engines without a mount.
pub mod no_cache;
/// One `litefs mount` process in directories of its own.
pub mod node;
/// A process that makes the file calls it is told.
pub mod process;
/// Programs that end.
pub mod program;
/// A `sqlite3` program that is told step by step what to do.
pub mod shell;
/// SQLite, in this process and in others.
pub mod sqlite;
/// Where backups go: a directory, and a server.
pub mod vault;
/// Waiting for a condition, with a deadline.
pub mod wait;
