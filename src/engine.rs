//! The databases of one node.

pub mod layout;
