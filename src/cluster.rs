//! Who is primary, and following one.
//!
//! [`node`] is the one task that decides the role of this node: it asks the [`lease`] who is primary
//! and either leads, until it loses the lease, or follows with [`replica`], until the stream ends.
//! Others ask it for something through a [`control::Control`]. [`consul`] is the lease as it stands in Consul,
//! [`election`] says who may take it when it is free. [`backup`] is the second copy that a primary keeps
//! elsewhere.

pub mod backup;
pub mod consul;
pub mod control;
pub mod election;
pub mod halt;
pub mod lease;
mod lineage;
mod lookout;
pub(crate) mod memory;
pub mod node;
mod pace;
pub mod peers;
mod replica;
