//! The lease: the one place that says which node is primary.
//!
//! Static: the configuration says it, the same on every node, and it never changes. The primary's
//! lease is always granted and never ends; there is no place for a cluster id outside the nodes.

use crate::engine::PrimaryInfo;

/// Why a lease was not granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Another node has the lease, or is configured to.
    #[error("primary exists")]
    PrimaryExists,
}

/// What a static cluster makes of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StaticRole {
    /// This node is the primary.
    Primary,
    /// The configured primary is another node.
    Replica,
}

/// Grants leases and knows who holds one.
#[derive(Debug, Clone)]
pub enum Leaser {
    /// The configuration names the primary.
    Static {
        /// Whether that is this node.
        role: StaticRole,
        /// The primary, whichever node that is.
        primary: PrimaryInfo,
    },
}

/// The right to be primary.
#[derive(Debug)]
pub enum Lease {
    /// For as long as the node runs.
    Static,
}

impl Leaser {
    /// The type, as in the configuration.
    pub fn kind(&self) -> &'static str {
        match self {
            Leaser::Static { .. } => "static",
        }
    }

    /// Where other nodes reach this node if it is primary; empty on a static replica.
    pub fn advertise_url(&self) -> &str {
        match self {
            Leaser::Static { role: StaticRole::Primary, primary } => &primary.advertise_url,
            Leaser::Static { role: StaticRole::Replica, .. } => "",
        }
    }

    /// Takes the lease if nobody has it.
    pub async fn acquire(&self) -> Result<Lease, Error> {
        match self {
            Leaser::Static { role: StaticRole::Primary, .. } => Ok(Lease::Static),
            Leaser::Static { role: StaticRole::Replica, .. } => Err(Error::PrimaryExists),
        }
    }

    /// Who has the lease, if it is another node.
    pub async fn primary_info(&self) -> Result<Option<PrimaryInfo>, Error> {
        match self {
            Leaser::Static { role: StaticRole::Primary, .. } => Ok(None),
            Leaser::Static { role: StaticRole::Replica, primary } => Ok(Some(primary.clone())),
        }
    }

    /// The cluster id that is kept beside the lease, as text.
    pub async fn cluster_id(&self) -> Result<Option<String>, Error> {
        match self {
            Leaser::Static { .. } => Ok(None),
        }
    }

    /// Keeps the cluster id beside the lease, where there was none.
    pub async fn set_cluster_id(&self, _id: &str) -> Result<(), Error> {
        match self {
            Leaser::Static { .. } => Ok(()),
        }
    }
}

impl Lease {
    /// What names the lease where it is kept; empty if it is kept nowhere.
    pub fn id(&self) -> &str {
        match self {
            Lease::Static => "",
        }
    }

    /// Waits until the lease is no longer this node's.
    pub async fn expired(&mut self) {
        match self {
            Lease::Static => std::future::pending().await,
        }
    }

    /// Gives the lease back.
    pub async fn close(self) {
        match self {
            Lease::Static => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaser(role: StaticRole) -> Leaser {
        let primary =
            PrimaryInfo { hostname: "h1".to_owned(), advertise_url: "http://h1:20202".to_owned() };
        Leaser::Static { role, primary }
    }

    #[tokio::test]
    async fn a_static_primary_always_gets_its_lease() {
        let leaser = leaser(StaticRole::Primary);
        assert_eq!(leaser.primary_info().await, Ok(None));
        assert_eq!(leaser.acquire().await.unwrap().id(), "");
        assert!(leaser.acquire().await.is_ok(), "and again after a restart");
        assert_eq!(leaser.advertise_url(), "http://h1:20202");
    }

    #[tokio::test]
    async fn a_static_replica_knows_its_primary_and_gets_no_lease() {
        let leaser = leaser(StaticRole::Replica);
        assert_eq!(leaser.primary_info().await.unwrap().unwrap().hostname, "h1");
        assert_eq!(leaser.acquire().await.unwrap_err().to_string(), "primary exists");
        assert_eq!(leaser.advertise_url(), "");
    }
}
