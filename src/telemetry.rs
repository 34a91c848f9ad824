//! What a node says about itself: log lines ([`log`]) and metrics ([`metrics`]).

pub mod log;
pub mod metrics;

pub use metrics::{DbMetrics, Metrics};
