//! The databases of one node.
