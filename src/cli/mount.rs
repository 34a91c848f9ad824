//! `litefs mount`: flags and configuration; the node itself is in [`node`].

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;

use super::flags::{Flag, Flags, Kind, Spec};
use super::{Failure, call, say, usage, version};
use crate::config::{self, Command, Config, Environment, LeaseKind, machine_name};
use crate::supervisor::descriptors;
use crate::telemetry;
use crate::telemetry::log::Traces;
use crate::telemetry::trace::RollingFile;

mod fly;
mod node;
mod users;

pub const SPEC: Spec = Spec {
    name: "mount",
    arguments: "[-- CMD ARG...]",
    about: "Mounts the file system, joins the cluster and runs a command on it.",
    flags: &[
        Flag { name: "config", kind: Kind::Value("PATH"), about: "the configuration file" },
        call::NO_EXPAND_ENV,
        Flag {
            name: "standalone",
            kind: Kind::Switch,
            about: "be a primary of its own, without a configuration file",
        },
        Flag {
            name: "data-dir",
            kind: Kind::Value("DIR"),
            about: "with -standalone: the data directory (default ./.run/data)",
        },
        Flag {
            name: "fuse-dir",
            kind: Kind::Value("DIR"),
            about: "with -standalone: the mount (default ./.run/mnt)",
        },
        Flag {
            name: "skip-unmount",
            kind: Kind::Switch,
            about: "do not free the mount of a process that is gone",
        },
        Flag { name: "fuse.debug", kind: Kind::Switch, about: "log every request" },
        Flag { name: "debug", kind: Kind::Switch, about: "log debug lines" },
        Flag { name: "tracing", kind: Kind::Switch, about: "write the trace to stdout too" },
    ],
};

/// How long threads that still work may hold up the end of the process, once all is closed.
const THREADS_WAIT: Duration = Duration::from_secs(5);

/// What to do about the mount of a process that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StaleMount {
    /// Unmount it first.
    Free,
    /// Leave it, and fail.
    Keep,
}

/// Everything that the command line, the file and the environment say.
struct Settings {
    config: Config,
    environment: Environment,
    stale_mount: StaleMount,
    trace_on_stdout: bool,
    /// What to tell a person once the node is ready.
    hint: Option<String>,
}

pub fn run(flags: Flags) -> Result<u8, Failure> {
    let settings = settings(&flags).map_err(usage)?;
    say(version::text());
    let verbose: &[_] = if settings.config.fuse.debug { &["fuse"] } else { &[] };
    let traces =
        Traces { file: trace_file(&settings.config.tracing)?, on_stdout: settings.trace_on_stdout };
    let has_file = traces.file.is_some();
    telemetry::log::init(&settings.config.log, verbose, traces)?;
    if has_file {
        tracing::info!("trace log enabled: {}", settings.config.tracing.path.display());
    }
    let descriptors = descriptors::raise();
    let runtime = tokio::runtime::Runtime::new().context("start threads")?;
    let code = runtime.block_on(node::run(&settings, descriptors));
    runtime.shutdown_timeout(THREADS_WAIT);
    Ok(code?)
}

/// The trace file, if there is to be one.
fn trace_file(config: &config::Tracing) -> anyhow::Result<Option<RollingFile>> {
    if !config.enabled || config.path.as_os_str().is_empty() {
        return Ok(None);
    }
    let file = RollingFile::open(config);
    file.map(Some).with_context(|| format!("cannot open trace log {}", config.path.display()))
}

fn settings(flags: &Flags) -> anyhow::Result<Settings> {
    if !flags.arguments.is_empty() {
        anyhow::bail!("too many arguments, specify a '--' to specify an exec command");
    }
    let hostname = machine_name().context("read host name")?;
    let environment = Environment::of_process(&hostname);
    let (mut config, hint) = match flags.is_on("standalone") {
        true => standalone(flags, &hostname)?,
        false => (configured(flags, &environment)?, None),
    };
    config.fuse.debug |= flags.is_on("fuse.debug");
    config.log.debug |= flags.is_on("debug");
    if let Some(words) = &flags.command {
        config.exec = exec(words);
    }
    let stale_mount = match flags.is_on("skip-unmount") {
        true => StaleMount::Keep,
        false => StaleMount::Free,
    };
    let trace_on_stdout = flags.is_on("tracing");
    Ok(Settings { config, environment, stale_mount, trace_on_stdout, hint })
}

/// The words after `--`, taken as they are.
fn exec(words: &[String]) -> Vec<Command> {
    let command = Command { words: words.to_vec(), if_candidate: false };
    if words.is_empty() { Vec::new() } else { vec![command] }
}

fn configured(flags: &Flags, environment: &Environment) -> anyhow::Result<Config> {
    for flag in ["data-dir", "fuse-dir"] {
        if flags.value(flag).is_some() {
            anyhow::bail!("-{flag} needs -standalone; else the configuration file says it");
        }
    }
    let path = flags.given("config");
    let loaded = config::load(path.map(Path::new), call::expansion(flags), environment)?;
    if path.is_none() {
        say(format_args!("config file read from {}", loaded.path.display()));
    }
    Ok(loaded.config)
}

/// The configuration of a node that is alone: reachable from this machine only.
fn standalone(flags: &Flags, hostname: &str) -> anyhow::Result<(Config, Option<String>)> {
    if flags.given("config").is_some() {
        anyhow::bail!("cannot specify both -config & -standalone");
    }
    let mut config = Config::default();
    config.data.dir = flags.value("data-dir").unwrap_or(".run/data").into();
    config.fuse.dir = flags.value("fuse-dir").unwrap_or(".run/mnt").into();
    config.http.addr = "127.0.0.1:20202".to_owned();
    config.lease.kind = Some(LeaseKind::Static);
    config.lease.hostname = hostname.to_owned();
    config.lease.advertise_url = "http://localhost:20202".to_owned();
    config.check()?;
    let hint = hint(&config.fuse.dir);
    Ok((config, Some(hint)))
}

fn hint(dir: &Path) -> String {
    let program = std::env::current_exe().unwrap_or_else(|_| "litefs".into());
    format!(
        "\nReady. In another terminal:\n\n  sqlite3 {}/app.db \"create table notes(text); insert \
         into notes values ('hello'); select * from notes\"\n  {} status\n\nCtrl-C ends it; the \
         data stays.",
        dir.display(),
        program.display()
    )
}
