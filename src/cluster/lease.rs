//! The lease: the one place that says which node is primary.
//!
//! Static: the configuration says it, the same on every node, and it never changes. The primary's
//! lease is always granted and never ends; there is no place for a cluster id outside the nodes.
//! Consul: the node that has a key locked there, see [`super::consul`].

use std::sync::Arc;

use super::consul::Consul;
use crate::engine::PrimaryInfo;

/// What a static cluster makes of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StaticRole {
    /// This node is the primary.
    Primary,
    /// The configured primary is another node.
    Replica,
}

/// Where the lease is.
#[derive(Clone)]
pub enum Leaser {
    /// The configuration names the primary.
    Static {
        /// Whether that is this node.
        role: StaticRole,
        /// The primary, whichever node that is.
        primary: PrimaryInfo,
    },
    /// A key in Consul.
    Consul(Arc<Consul>),
}

impl Leaser {
    /// The type, as in the configuration.
    pub fn kind(&self) -> &'static str {
        match self {
            Leaser::Static { .. } => "static",
            Leaser::Consul(_) => "consul",
        }
    }

    /// Where other nodes reach this node if it is primary; empty on a static replica.
    pub fn advertise_url(&self) -> &str {
        match self {
            Leaser::Static { role: StaticRole::Primary, primary } => &primary.advertise_url,
            Leaser::Static { role: StaticRole::Replica, .. } => "",
            Leaser::Consul(consul) => &consul.me().advertise_url,
        }
    }
}
