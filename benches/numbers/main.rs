//! The numbers of `docs/benchmarks.md`: what the mount costs, as ratios to the bare file system in
//! the same run on the same machine.
//!
//! `make bench` runs it; a markdown report comes on stdout, progress on stderr. Each case starts the
//! built program as a person would, with a configuration file and a static lease, and measures in
//! rounds: the bare directory beside the data directory, then the mount. A report shows medians
//! with their spread, and the ratio of each round rather than of the medians, so that a machine
//! that is slower for a while is so for both.
//!
//! Environment: `ROUNDS` (5), `ONLY` (words; a case runs if its name contains one), `SCALE` (1;
//! 0.01 tries everything in a minute), `TRANSPORT` and `PASSTHROUGH` (as in `litefs.yml`), `SESSION` (`own`: nodes
//! have a session of their own, as services have, so that the scheduler groups them apart from the client), `DIR`
//! (where to work; it needs 20 GB at scale 1).

#![allow(clippy::disallowed_methods, reason = "a benchmark makes files as an application does")]

use std::path::PathBuf;

use anyhow::{Context as _, Result};

/// What is measured.
mod cases;
/// One `litefs mount` process.
mod node;
/// Medians, ratios, the table.
mod report;
/// What an application does: SQLite and locks.
mod work;

/// How a run differs from the default one.
pub struct Plan {
    /// How often each measurement is repeated.
    rounds: usize,
    /// The words of `ONLY`.
    only: Vec<String>,
    /// Factor on durations and sizes.
    scale: f64,
    /// `fuse.transport`.
    transport: String,
    /// `fuse.passthrough`.
    passthrough: String,
    /// Whose session nodes are in.
    session: Session,
}

/// In which session(7) nodes are, and so, outside of containers, in which group of the scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Session {
    /// In that of the client.
    Same,
    /// Each in its own.
    Own,
}

impl Plan {
    fn of_environment() -> Result<Plan> {
        let rounds = variable("ROUNDS", "5");
        let scale = variable("SCALE", "1");
        let session = match variable("SESSION", "same").as_str() {
            "same" => Session::Same,
            "own" => Session::Own,
            other => anyhow::bail!("SESSION={other}: same or own"),
        };
        let plan = Plan {
            rounds: rounds.parse().with_context(|| format!("ROUNDS={rounds}"))?,
            only: variable("ONLY", "").split_whitespace().map(str::to_owned).collect(),
            scale: scale.parse().with_context(|| format!("SCALE={scale}"))?,
            transport: variable("TRANSPORT", "auto"),
            passthrough: variable("PASSTHROUGH", "auto"),
            session,
        };
        anyhow::ensure!(plan.rounds > 0 && plan.scale > 0.0, "ROUNDS and SCALE are above zero");
        Ok(plan)
    }

    fn wants(&self, case: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|word| case.contains(word))
    }

    /// `full` things, scaled; at least one.
    fn scaled(&self, full: u64) -> u64 {
        ((full as f64 * self.scale) as u64).max(1)
    }
}

/// A variable of the environment; one that is set to nothing, as make does, is not set.
fn variable(name: &str, default: &str) -> String {
    std::env::var(name).ok().filter(|text| !text.is_empty()).unwrap_or_else(|| default.to_owned())
}

fn main() -> Result<()> {
    let plan = Plan::of_environment()?;
    let dir = PathBuf::from(variable("DIR", env!("CARGO_TARGET_TMPDIR")));
    let dir =
        tempfile::Builder::new().prefix("bench").tempdir_in(&dir).context("make directory")?;
    let mut environment = report::Environment::of_machine(dir.path());
    let mut rows = Vec::new();
    for case in cases::ALL.iter().filter(|case| plan.wants(case.name)) {
        eprintln!("{}", case.name);
        let root = dir.path().join(case.name);
        let bench = cases::Bench::new(&plan, root.clone())?;
        let found = (case.run)(&bench).with_context(|| case.name.to_owned())?;
        found.iter().for_each(|row| eprintln!("  {}", row.progress()));
        environment.add(bench.ways());
        rows.extend(found);
        std::fs::remove_dir_all(&root).context("remove directory of case")?;
    }
    print!("{}", report::Report { plan: &plan, environment: &environment, rows: &rows });
    Ok(())
}
