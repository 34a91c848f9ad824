//! `litefs run`: a command beside a running node, perhaps only on a candidate, on the primary, or
//! while it holds the HALT lock of a database.
//!
//! The command gets the words as they are, stdin, stdout and stderr, and the environment. The exit
//! code is the command's; 128 and the number of the signal if one ended it, as a shell says it.
//! Signals go on to the command, those that are ignored stay ignored, and the lock is released when it has ended.

use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::task::Poll;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use super::flags::{Flag, Flags, Kind, Spec};
use super::{Failure, block_on, call, complain};
use crate::cluster::election::Force;
use crate::config::Log;
use crate::http::client::{Client, Error as ClientError};
use crate::limits;
use crate::telemetry::log::Traces;
use crate::{os, supervisor, telemetry};

pub const SPEC: Spec = Spec {
    name: "run",
    arguments: "-- CMD ARG...",
    about: "Runs a command as primary, or under the HALT lock of a database.",
    flags: &[
        call::URL,
        call::CONFIG,
        call::NO_EXPAND_ENV,
        Flag { name: "promote", kind: Kind::Switch, about: "make this node primary first" },
        Flag {
            name: "if-candidate",
            kind: Kind::Switch,
            about: "run nothing on a node that may not become primary",
        },
        Flag {
            name: "with-halt-lock-on",
            kind: Kind::Value("PATH"),
            about: "hold the HALT lock on this database, named by its full path in the mount",
        },
        Flag { name: "v", kind: Kind::Switch, about: "log what is done on stderr" },
    ],
};

/// The byte of `NAME-lock` that is locked.
const HALT_BYTE: i64 = 72;

/// The descriptor by which the command can see the lock file, as LiteFS has it.
const LOCK_FD: i32 = 3;

/// Handed on to the command. The last two also come from a terminal, which sends them itself.
const FORWARDED: [Signal; 6] = [
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGINT,
    Signal::SIGQUIT,
];

pub fn run(flags: Flags) -> Result<u8, Failure> {
    let words = words(&flags)?;
    if flags.is_on("v") {
        telemetry::log::init(&Log::default(), &[], Traces::default())?;
    }
    let halt_on = flags.given("with-halt-lock-on");
    if flags.is_on("promote") && halt_on.is_some() {
        return Err(failed("cannot specify both -promote & -with-halt-lock-on"));
    }
    // Nothing else asks the node, so nothing else needs its configuration and certificates.
    if (flags.is_on("promote") || flags.is_on("if-candidate"))
        && block_on(prepare(&call::client(&flags)?, &flags))?? == Node::Unwanted
    {
        complain("node is not a candidate, skipping execution");
        return Ok(0);
    }
    let lock = halt_on.map(|path| HaltLock::acquire(Path::new(path))).transpose()?;
    let status = block_on(supervise(words))??;
    let code = code(status);
    match lock.map(HaltLock::release).transpose() {
        Err(error) if code == 0 => Err(error.into()),
        _ => Ok(code),
    }
}

/// The command; usage if there is none.
fn words(flags: &Flags) -> Result<&[String], Failure> {
    if !flags.arguments.is_empty() {
        return Err(failed("too many arguments, specify a '--' to specify an exec command"));
    }
    match flags.command.as_deref() {
        None | Some([]) => Err(Failure::Help),
        Some(words) => Ok(words),
    }
}

fn failed(text: &'static str) -> Failure {
    Failure::Run(anyhow::anyhow!(text))
}

/// Whether the command is to run on this node.
#[derive(PartialEq, Eq)]
enum Node {
    Wanted,
    Unwanted,
}

/// Asks the node what it is, and makes it primary if that is wanted.
async fn prepare(client: &Client, flags: &Flags) -> anyhow::Result<Node> {
    tracing::info!("fetching node metadata");
    let info = client.info().await.context("fetch node metadata")?;
    if flags.is_on("if-candidate") && !info.candidate {
        return Ok(Node::Unwanted);
    }
    if flags.is_on("promote") && info.is_primary {
        tracing::info!("node is already primary, skipping promotion");
    } else if flags.is_on("promote") {
        tracing::info!("promoting node to primary");
        match timeout(limits::PROMOTE_WAIT, promote(client)).await {
            Ok(promoted) => promoted?,
            Err(_) => anyhow::bail!("timed out waiting for promotion"),
        }
        tracing::info!("promotion successful");
    }
    Ok(Node::Wanted)
}

/// Asks for the lease and returns when the node has it.
async fn promote(client: &Client) -> anyhow::Result<()> {
    // From before the request, so that nothing is missed.
    let mut roles = client.roles().await.context("watch node events")?;
    match client.promote(Force::No).await {
        Err(ClientError::Response { code: 409, .. }) => {
            anyhow::bail!("not eligible to become primary")
        }
        promoted => promoted.context("promote node")?,
    }
    while !roles.next_is_primary().await.context("watch node events")? {}
    Ok(())
}

/// The HALT lock of one database.
struct HaltLock(File);

impl HaltLock {
    /// Waits for the lock. On the primary that is nothing.
    fn acquire(database: &Path) -> anyhow::Result<HaltLock> {
        let shown = database.display();
        if !database.try_exists().with_context(|| format!("look for database {shown}"))? {
            anyhow::bail!("database does not exist: {shown}");
        }
        let file = os::open("run:lock", &beside(database, "-lock")).map_err(|_| {
            let dir = database.parent().unwrap_or(Path::new("")).display();
            anyhow::anyhow!("lock file not available, are you sure \"{dir}\" is a LiteFS mount?")
        })?;
        tracing::info!("acquiring halt lock");
        let started = Instant::now();
        lock(&file, libc::F_WRLCK)
            .with_context(|| format!("cannot acquire halt lock on {shown}"))?;
        tracing::info!("halt lock acquired in {}", shown_duration(started.elapsed()));
        show_to_command(&file).context("keep lock file open for the command")?;
        Ok(HaltLock(file))
    }

    fn release(self) -> anyhow::Result<()> {
        tracing::info!("releasing halt lock");
        let started = Instant::now();
        lock(&self.0, libc::F_UNLCK).context("cannot release halt lock")?;
        tracing::info!("halt lock released in {}", shown_duration(started.elapsed()));
        Ok(())
    }
}

/// Lets the command have the open file as [`LOCK_FD`], if that is free.
fn show_to_command(file: &File) -> nix::Result<()> {
    if file.as_raw_fd() == LOCK_FD {
        fcntl(file.as_fd(), FcntlArg::F_SETFD(FdFlag::empty()))?;
    } else {
        // The lowest free one from there on. It stays open until this process ends.
        fcntl(file.as_fd(), FcntlArg::F_DUPFD(LOCK_FD))?;
    }
    Ok(())
}

/// Takes or gives back the lock of the open file, waiting for it.
fn lock(file: &File, kind: i32) -> nix::Result<()> {
    let range = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: HALT_BYTE,
        l_len: 1,
        l_pid: 0,
    };
    loop {
        // No signal has a handler yet: one that interrupts and does not end the process stopped it.
        match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLKW(&range)) {
            Err(Errno::EINTR) => {}
            done => return done.map(drop),
        }
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn shown_duration(duration: Duration) -> String {
    format!("{duration:.3?}")
}

/// Runs the command until it has ended, and hands signals on to it.
async fn supervise(words: &[String]) -> anyhow::Result<ExitStatus> {
    let mut signals = Vec::new();
    for forwarded in supervisor::heeded(&FORWARDED) {
        let listener = signal(SignalKind::from_raw(forwarded as i32));
        signals.push((forwarded, listener.context("listen to signals")?));
    }
    let (program, arguments) = words.split_first().context("no command")?;
    let mut child = tokio::process::Command::new(program)
        .args(arguments)
        .spawn()
        .with_context(|| format!("cannot start exec command {program:?}"))?;
    loop {
        tokio::select! {
            status = child.wait() => return status.context("wait for exec command"),
            signal = next(&mut signals) => hand_on(&child, signal),
        }
    }
}

async fn next(signals: &mut [(Signal, tokio::signal::unix::Signal)]) -> Signal {
    std::future::poll_fn(|context| {
        for (signal, listener) in signals.iter_mut() {
            if listener.poll_recv(context).is_ready() {
                return Poll::Ready(*signal);
            }
        }
        Poll::Pending
    })
    .await
}

fn hand_on(child: &tokio::process::Child, signal: Signal) {
    let from_terminal = matches!(signal, Signal::SIGINT | Signal::SIGQUIT) && is_in_foreground();
    // Until it is waited for, its number stays its own.
    if let (false, Some(pid)) = (from_terminal, child.id()) {
        tracing::info!("sending signal to exec process: {signal}");
        // It may have ended in this moment.
        let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
    }
}

/// Whether a terminal sends its keys' signals to us, and so to the command too.
fn is_in_foreground() -> bool {
    nix::unistd::tcgetpgrp(std::io::stdin()).is_ok_and(|group| group == nix::unistd::getpgrp())
}

/// The exit code, said on stderr unless it is 0.
fn code(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(0), _) => 0,
        (Some(code), _) => {
            complain(format_args!("ERROR: exit status {code}"));
            u8::try_from(code).unwrap_or(u8::MAX)
        }
        (None, signal) => {
            let number = signal.unwrap_or_default();
            let name = Signal::try_from(number).map_or("unknown", Signal::as_str);
            complain(format_args!("ERROR: signal: {name}"));
            u8::try_from(128 + number).unwrap_or(u8::MAX)
        }
    }
}
