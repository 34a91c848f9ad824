//! The databases of one node.

pub mod layout;
pub mod locks;
