//! Medians with their spread, ratios, targets, and the markdown that shows them.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::path::Path;
use std::process::Command;

use super::{Plan, Session};

/// The values of one measurement, one for each round, never empty.
#[derive(Debug, Clone)]
pub struct Stats(Vec<f64>);

impl Stats {
    /// Of these values; none of them is NaN.
    pub fn new(mut values: Vec<f64>) -> Stats {
        assert!(!values.is_empty(), "a measurement has rounds");
        values.sort_by(f64::total_cmp);
        Stats(values)
    }

    /// The middle one.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The value below which `part` (0 to 1) of the values are.
    pub fn quantile(&self, part: f64) -> f64 {
        let last = self.0.len() - 1;
        self.0[((last as f64 * part).round() as usize).min(last)]
    }
}

impl Display for Stats {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (min, max) = (self.quantile(0.0), self.quantile(1.0));
        write!(f, "{} ({}..{})", short(self.median()), short(min), short(max))
    }
}

/// Three digits that count.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// What a number should be.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    /// Nothing is asked of it.
    None,
    /// At most this.
    AtMost(f64),
    /// At least the first; the second with the io_uring transport.
    AtLeast(f64, f64),
}

/// One line of the table.
pub struct Row {
    /// What was measured.
    pub name: String,
    /// The unit of `bare` and `litefs`.
    pub unit: &'static str,
    /// On the bare file system.
    pub bare: Option<Stats>,
    /// Through litefs.
    pub litefs: Stats,
    /// litefs / bare, round by round.
    pub ratio: Option<Stats>,
    /// For the ratio if there is one, else for `litefs`.
    pub target: Target,
}

impl Row {
    /// A value without a counterpart on the bare file system.
    pub fn alone(name: &str, unit: &'static str, values: Vec<f64>, target: Target) -> Row {
        let name = name.to_owned();
        Row { name, unit, bare: None, litefs: Stats::new(values), ratio: None, target }
    }

    /// A value beside that of the bare file system, round by round.
    pub fn beside(name: &str, unit: &'static str, rounds: &[[f64; 2]], target: Target) -> Row {
        let values = |index: usize| Stats::new(rounds.iter().map(|round| round[index]).collect());
        Row {
            name: name.to_owned(),
            unit,
            bare: Some(values(0)),
            litefs: values(1),
            ratio: Some(Stats::new(rounds.iter().map(|[bare, ours]| ours / bare).collect())),
            target,
        }
    }

    /// The row in words, for whoever watches.
    pub fn progress(&self) -> String {
        let ratio = self.ratio.as_ref().map(|ratio| format!(", ratio {ratio}")).unwrap_or_default();
        format!("{}: {} {}{ratio}", self.name, self.litefs, self.unit)
    }

    fn is_met(&self, transport: &str) -> Option<bool> {
        let value = self.ratio.as_ref().unwrap_or(&self.litefs).median();
        match self.target {
            Target::None => None,
            Target::AtMost(most) => Some(value <= most),
            Target::AtLeast(_, uring) if transport == "io_uring" => Some(value >= uring),
            Target::AtLeast(dev, _) => Some(value >= dev),
        }
    }
}

impl Display for Target {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Target::None => Ok(()),
            Target::AtMost(most) => write!(f, "<= {most}"),
            Target::AtLeast(dev, uring) => write!(f, ">= {dev} (io_uring {uring})"),
        }
    }
}

/// How requests and file contents travelled, as a node's log says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ways {
    transport: &'static str,
    passthrough: &'static str,
}

impl Ways {
    /// Of a node with this log and this setting of `fuse.passthrough`.
    pub fn of_log(log: &str, passthrough: &str) -> Ways {
        let uring = log.contains("requests come over io_uring");
        let without = passthrough == "off" || log.contains("passthrough not available");
        Ways {
            transport: if uring { "io_uring" } else { "/dev/fuse" },
            passthrough: if without { "off" } else { "on" },
        }
    }
}

/// Where and of what the numbers are.
pub struct Environment {
    kernel: String,
    cpus: String,
    memory: String,
    file_system: String,
    commit: String,
    load_before: String,
    ways: Option<Ways>,
}

impl Environment {
    /// This machine, with the work in `dir`.
    pub fn of_machine(dir: &Path) -> Environment {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let count = std::thread::available_parallelism().map_or(0, usize::from);
        let changes = output("git", &["status", "--porcelain", "--untracked-files=no"]);
        let changed = if changes.is_empty() { "" } else { ", changed" };
        Environment {
            kernel: kernel.trim().to_owned(),
            cpus: format!("{count} x {}", field("/proc/cpuinfo", "model name")),
            memory: field("/proc/meminfo", "MemTotal"),
            file_system: output("stat", &["-f", "-c", "%T", &dir.to_string_lossy()]),
            commit: output("git", &["rev-parse", "--short=12", "HEAD"]) + changed,
            load_before: load(),
            ways: None,
        }
    }

    /// A node ran this way.
    pub fn add(&mut self, ways: Option<Ways>) {
        self.ways = ways.or(self.ways.take());
    }

    fn ways(&self) -> Ways {
        self.ways.clone().unwrap_or(Ways { transport: "none", passthrough: "none" })
    }
}

/// The value of the first line `name : value` of a file.
fn field(path: &str, name: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    let found = lines.into_iter().find(|(key, _)| key.trim() == name);
    found.map_or_else(String::new, |(_, value)| value.trim().to_owned())
}

/// What a program prints; nothing if it cannot be run.
fn output(program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR"));
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).trim().to_owned()
}

/// The load average of the last minute.
fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

/// A whole report.
pub struct Report<'a> {
    /// How it was made.
    pub plan: &'a Plan,
    /// Where it was made.
    pub environment: &'a Environment,
    /// What was found.
    pub rows: &'a [Row],
}

impl Display for Report<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Report { plan, environment, rows } = self;
        let Environment { kernel, cpus, memory, file_system, commit, load_before, .. } =
            environment;
        let Ways { transport, passthrough } = environment.ways();
        writeln!(f, "* Linux {kernel}, {cpus}, {memory}, {file_system}")?;
        writeln!(f, "* commit {commit}, transport {transport}, passthrough {passthrough}")?;
        let session = match plan.session {
            Session::Same => "the session of the nodes",
            Session::Own => "another session than the nodes",
        };
        writeln!(f, "* {} rounds at scale {}, from {session}", plan.rounds, plan.scale)?;
        writeln!(f, "* load average {load_before} before, {} after\n", load())?;
        writeln!(f, "| case | unit | bare | litefs | litefs / bare | target | met |")?;
        writeln!(f, "|---|---|--:|--:|--:|---|---|")?;
        for row in *rows {
            let Row { name, unit, bare, litefs, ratio, target } = row;
            let optional = |stats: &Option<Stats>| stats.as_ref().map(Stats::to_string);
            let [bare, ratio] = [bare, ratio].map(|stats| optional(stats).unwrap_or_default());
            let met = match row.is_met(transport) {
                None => "",
                Some(true) => "yes",
                Some(false) => "no",
            };
            writeln!(f, "| {name} | {unit} | {bare} | {litefs} | {ratio} | {target} | {met} |")?;
        }
        Ok(())
    }
}
