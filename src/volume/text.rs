//! The files of the mount that are made of words: `NAME-pos`, `.primary`, `.lag`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::engine::db::Db;
use crate::engine::{Engine, Role};

/// The size of `NAME-pos` in bytes.
pub const POS_LEN: u64 = 34;
/// The size of `.lag` in bytes.
pub const LAG_LEN: u64 = 11;

/// What `.lag` says before the first news of a primary.
const LAG_UNKNOWN: i64 = i32::MAX as i64;
/// The largest lag that has room.
const LAG_MAX: i64 = 999_999_999;

/// `TXID/CHECKSUM` and a newline.
pub fn pos(db: &Db) -> String {
    format!("{}\n", db.pos())
}

/// The host name of the primary and a newline; nothing if there is no other primary.
pub fn primary(engine: &Engine) -> String {
    match engine.role() {
        Role::Replica(info) => format!("{}\n", info.hostname),
        Role::Primary | Role::Unknown => String::new(),
    }
}

/// Milliseconds since the last news of the primary, with a sign and nine digits, and a newline. The
/// value for "never" has ten digits, and no room for the newline.
pub fn lag(engine: &Engine) -> String {
    match engine.lag_ms() {
        None => format!("{LAG_UNKNOWN:+}"),
        Some(lag) => format!("{:+010}\n", lag.clamp(-LAG_MAX, LAG_MAX)),
    }
}

/// The time of the last news: now on a primary, the epoch before the first.
pub fn lag_mtime(engine: &Engine) -> SystemTime {
    match engine.lag_timestamp_ms() {
        None => UNIX_EPOCH,
        Some(0) => SystemTime::now(),
        Some(timestamp) => time(timestamp),
    }
}

/// A time in milliseconds since the Unix epoch.
pub fn time(timestamp_ms: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(timestamp_ms).unwrap_or(0))
}
