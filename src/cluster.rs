//! Who is primary, and following one.
//!
//! [`node`] is the one task that decides the role of this node: it asks the [`lease`] who is primary
//! and either leads, until it loses the lease, or follows with [`replica`], until the stream ends.

pub mod halt;
pub mod lease;
pub mod node;
mod replica;
