//! What a node says about itself: log lines ([`log`]) and metrics ([`metrics`]) for machines, and
//! a few status lines on stdout that scripts wait for ([`say`]). What a person must read although no
//! log line can be written, or is wanted, goes to stderr ([`complain`]).

use std::fmt::Display;
use std::io::{self, Write as _};

mod histogram;
pub mod log;
pub mod metrics;
pub mod trace;

pub use metrics::{DbMetrics, Metrics, ProxyMetrics, ProxyWait};

/// Prints a status line to stdout. A closed stdout is no reason to stop.
pub fn say(line: impl Display) {
    let _ = writeln!(io::stdout(), "{line}");
}

/// Prints a line to stderr. Whoever read it may have gone (`2>&1 | head`): that is no reason to stop, nor to
/// panic, as `eprintln` does.
pub fn complain(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}
