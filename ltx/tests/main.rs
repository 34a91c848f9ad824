//! Tests of the file format from outside the crate.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

/// Files that the reference programs wrote, byte for byte.
mod golden;

mod util;
