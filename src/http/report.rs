//! The JSON documents of the API: `/info` (LiteFS's) and `/status` (ours).
//!
//! Unknown fields are ignored when reading, so that nodes of different versions understand each
//! other.

use ltx::Pos;
use serde::{Deserialize, Serialize};

/// `GET /info`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Info {
    /// The cluster id; absent until there is one.
    #[serde(rename = "clusterID", default, skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<String>,
    /// Whether the node is the primary.
    pub is_primary: bool,
    /// Whether the node may become primary.
    pub candidate: bool,
    /// The data directory.
    pub path: String,
    /// The primary as the node knows it.
    pub primary: InfoPrimary,
}

/// The primary in [`Info`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InfoPrimary {
    /// Its host name; empty if unknown.
    pub hostname: String,
}

/// The answer to `POST /halt`, one line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HaltLock {
    /// What the holder drew.
    pub id: i64,
    /// Where the database stood when the lock was granted.
    pub pos: HaltPos,
    /// When the lock ends unless it is renewed, by the primary's clock.
    pub expires: String,
}

/// A position as LiteFS writes it in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HaltPos {
    /// 16 hex digits.
    #[serde(rename = "TXID")]
    pub txid: String,
    /// 16 hex digits.
    #[serde(rename = "PostApplyChecksum")]
    pub post_apply: String,
}

impl HaltPos {
    /// `pos` in this form.
    pub fn new(pos: Pos) -> HaltPos {
        HaltPos { txid: pos.txid.to_string(), post_apply: pos.checksum.to_string() }
    }

    /// The position; none if it is not one.
    pub fn pos(&self) -> Option<Pos> {
        format!("{}/{}", self.txid, self.post_apply).parse().ok()
    }
}

/// `GET /status`: what `litefs status` prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The version of the program.
    pub version: String,
    /// The node id, drawn anew at each start.
    pub node_id: String,
    /// The cluster id; absent until there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<String>,
    /// What the node is.
    pub role: StatusRole,
    /// Whether the node has led, or has had all that its primary had, and before that all that its backup has; from the
    /// start with `skip-sync`. Absent in answers of older versions.
    #[serde(default)]
    pub ready: bool,
    /// Whether the node may become primary.
    pub candidate: bool,
    /// The data directory.
    pub path: String,
    /// The primary that the node follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary: Option<StatusPrimary>,
    /// How far a replica is behind, in milliseconds; absent on the primary and before first contact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_ms: Option<i64>,
    /// The replicas that are connected to this node; absent in answers of older versions.
    #[serde(default)]
    pub peers: Vec<StatusPeer>,
    /// The databases by name.
    pub databases: Vec<StatusDatabase>,
}

/// A connected replica in [`Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusPeer {
    /// Its node id.
    pub node_id: String,
    /// Where it calls from.
    pub address: String,
    /// When its stream began, in milliseconds since the Unix epoch.
    pub since_ms: i64,
}

/// The role in [`Status`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StatusRole {
    /// Takes writes.
    Primary,
    /// Follows a primary.
    Replica,
    /// Knows no primary.
    Unknown,
}

/// The primary in [`Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusPrimary {
    /// Its host name.
    pub hostname: String,
    /// Where its API answers.
    pub advertise_url: String,
}

/// A database in [`Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusDatabase {
    /// Its name in the mount.
    pub name: String,
    /// Its position, `TXID/CHECKSUM`.
    pub position: String,
    /// Its journal mode: `wal` or `rollback`.
    pub mode: String,
    /// Bytes of a page; 0 if nothing was ever written.
    pub page_size: u32,
    /// Its size in pages.
    pub page_count: u32,
    /// Why it cannot be written or followed; absent if all is well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// Whether its files are read and written past the daemon; absent if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passthrough: Option<bool>,
    /// The transaction before which everything is in the backup; 0 without one.
    pub hwm: u64,
    /// Why its backup stands still; absent if it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup_problem: Option<String>,
    /// How many files recovery or a rejoin set aside.
    pub lost_found: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The answer of a LiteFS primary.
    const RECORDED: &str = include_str!("../../tests/fixtures/stream/info.json");

    #[test]
    fn info_reads_and_writes_what_litefs_answers() {
        let info: Info = serde_json::from_str(RECORDED).unwrap();
        assert!(info.is_primary && info.candidate);
        assert_eq!(info.primary.hostname, "primary");
        assert_eq!(serde_json::to_string_pretty(&info).unwrap() + "\n", RECORDED);
    }
}
