//! Tests of the file format from outside the crate.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

/// What the fuzzer found worth keeping, replayed.
mod corpus;
/// Files that the reference programs wrote, byte for byte.
mod golden;
/// Broken, cut and flipped bytes: an error or the same content, never a panic.
mod hostile;
/// What is written is read back, also around the lock page; chains become one file.
mod round_trip;
/// Each rule of the format, and the error that names it.
mod rules;

mod properties;
mod util;
