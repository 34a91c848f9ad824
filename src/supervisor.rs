//! The processes that litefs runs once the node is ready, and the signals it gets.
//!
//! Commands run in order; each but the last must succeed, the last one is supervised: litefs ends
//! when it ends. A child has litefs's environment and working directory, its stdout and stderr, no
//! stdin, and stays in litefs's process group, so that a terminal's Ctrl-C reaches it directly too. Its limit
//! of descriptors is the one that litefs was started with, see [`descriptors`].
//!
//! Every signal of [`FORWARDED`] goes on to the child that runs. One that was ignored when litefs was started stays
//! ignored, here and in the child, if it is neither SIGTERM nor SIGINT ([`heeded`]). The first SIGTERM or SIGINT begins
//! the end, and litefs waits for the child without limit; the second one sets a limit
//! ([`limits::CHILD_GRACE`]), the third kills at once.
//!
//! A child is not tied to litefs's life (PR_SET_PDEATHSIG): that signal comes when the *thread*
//! that started the child ends, and the threads here come and go. As process 1 of a container
//! litefs also collects the processes that others left behind: while a child runs and while it waits for a signal,
//! not while the node opens or closes, when it waits for a helper of its own.

use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{self, SignalKind};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use self::descriptors::Former;
use crate::config::{Command, Environment};
use crate::limits;
use crate::telemetry::say;

pub mod descriptors;

/// The signals that a child gets from us.
const FORWARDED: [Signal; 6] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// Those of `signals` to listen to, asked before the first of them is listened to.
///
/// What `nohup`, or the `&` of a shell, made litefs ignore is left so. With a handler it would end litefs after all,
/// and in a child a handler becomes the default, which is to die of it. SIGTERM and SIGINT are heeded in any case, as
/// LiteFS does: scripts end a node with either.
pub fn heeded(signals: &[Signal]) -> Vec<Signal> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = ignored(&status);
    let is_heeded = |signal: Signal| {
        matches!(signal, Signal::SIGTERM | Signal::SIGINT)
            || ignored & (1 << (signal as i32 - 1)) == 0
    };
    signals.iter().copied().filter(|signal| is_heeded(*signal)).collect()
}

/// The signals that a process ignores, by its `/proc/PID/status`: a bit for each, the lowest for signal 1. None
/// where that cannot be read.
fn ignored(status: &str) -> u64 {
    let set = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).unwrap_or(0)
}

/// litefs's exit code when the supervised process died by a signal.
const CODE_BY_SIGNAL: u8 = 255;

/// Why a command did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A command before the last one failed.
    #[error("cannot exec: sync cmd: cannot run command {program:?}: {how}")]
    Failed {
        /// Its program.
        program: String,
        /// `exit status N` or `signal: NAME`.
        how: String,
    },
    /// A command before the last one could not be started.
    #[error("cannot exec: sync cmd: cannot start exec command {program:?}")]
    StartSync {
        /// Its program.
        program: String,
        /// What the operating system says.
        source: io::Error,
    },
    /// The supervised process could not be started.
    #[error("cannot exec: background cmd: cannot start exec command {program:?}")]
    StartBackground {
        /// Its program.
        program: String,
        /// What the operating system says.
        source: io::Error,
    },
}

/// Why and how it ended; both mean that the node is to be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The supervised process ended by itself; litefs ends with its code.
    Process(u8),
    /// A signal asked for it; the code is that of a child that failed in the process, else 0.
    Signal(u8),
}

impl Ending {
    /// The exit code of litefs, if closing succeeds.
    pub fn code(self) -> u8 {
        match self {
            Ending::Process(code) | Ending::Signal(code) => code,
        }
    }
}

/// Whether this node may become primary, which `if-candidate` asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Candidate {
    /// It may.
    Yes,
    /// It may not.
    No,
}

/// The signals of the process. They have an effect from [`Signals::listen`] on, and only through
/// this value.
#[derive(Debug)]
pub struct Signals {
    forwarded: Vec<(Signal, unix::Signal)>,
    children: unix::Signal,
    requests: mpsc::Receiver<()>,
    stopper: Stopper,
}

/// Asks from within, as SIGTERM does from outside.
#[derive(Debug, Clone)]
pub struct Stopper(mpsc::Sender<()>);

impl Stopper {
    /// Asks the process to end.
    pub fn stop(&self) {
        // Full means that it has been asked already; closed, that it is ending.
        let _ = self.0.try_send(());
    }
}

enum Event {
    /// A signal to hand on.
    Signal(Signal),
    /// Some child changed its state.
    Children,
}

impl Signals {
    /// Takes the signals over.
    ///
    /// # Errors
    /// The operating system refuses a handler.
    pub fn listen() -> io::Result<Signals> {
        let listen = |signal| Ok((signal, unix::signal(SignalKind::from_raw(signal as i32))?));
        let (sender, requests) = mpsc::channel(1);
        Ok(Signals {
            forwarded: heeded(&FORWARDED).into_iter().map(listen).collect::<io::Result<_>>()?,
            children: unix::signal(SignalKind::child())?,
            requests,
            stopper: Stopper(sender),
        })
    }

    /// A way to ask for the end from within.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Waits, with no child, until the process is asked to end. SIGHUP and SIGQUIT ask that too.
    pub async fn stop(&mut self) -> Signal {
        loop {
            match self.next().await {
                Event::Signal(Signal::SIGUSR1 | Signal::SIGUSR2) | Event::Children => {}
                Event::Signal(signal) => return signal,
            }
        }
    }

    /// The same while no process of ours runs. As process 1 it collects those that others left behind.
    pub async fn stop_idle(&mut self) -> Signal {
        loop {
            // At first those that ended while nobody collected.
            collect_orphans();
            match self.next().await {
                Event::Signal(Signal::SIGUSR1 | Signal::SIGUSR2) | Event::Children => {}
                Event::Signal(signal) => return signal,
            }
        }
    }

    async fn next(&mut self) -> Event {
        poll_fn(|context| self.poll(context)).await
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Event> {
        for (signal, stream) in &mut self.forwarded {
            if stream.poll_recv(context).is_ready() {
                return Poll::Ready(Event::Signal(*signal));
            }
        }
        if self.requests.poll_recv(context).is_ready() {
            return Poll::Ready(Event::Signal(Signal::SIGTERM));
        }
        self.children.poll_recv(context).map(|_| Event::Children)
    }
}

/// Runs commands one after the other.
#[derive(Debug)]
pub struct Supervisor<'a> {
    /// The signals to hand on.
    pub signals: &'a mut Signals,
    /// What the children find in their environment beside what litefs has itself.
    pub environment: &'a Environment,
    /// Whether `if-candidate` commands run.
    pub candidate: Candidate,
    /// The limit of descriptors that the children get, if it is not litefs's own.
    pub descriptors: Option<Former>,
}

impl Supervisor<'_> {
    /// Runs `commands`, the last one supervised, until that one ends or a signal asks for the end.
    /// Without a last one it waits for the signal.
    ///
    /// # Errors
    /// A command cannot be started, or one before the last fails by itself.
    pub async fn run(&mut self, commands: &[Command]) -> Result<Ending, Error> {
        let Some((last, before)) = commands.split_last() else {
            return Ok(self.idle().await);
        };
        for command in before {
            if self.is_wanted(command)
                && let Some(ending) = self.run_sync(command).await?
            {
                return Ok(ending);
            }
        }
        match self.is_wanted(last) {
            true => self.supervise(last).await,
            false => Ok(self.idle().await),
        }
    }

    fn is_wanted(&self, command: &Command) -> bool {
        let wanted = self.candidate == Candidate::Yes || !command.if_candidate;
        if !wanted {
            tracing::info!("node is not a candidate, skipping command execution: {command}");
        }
        wanted
    }

    async fn idle(&mut self) -> Ending {
        say("waiting for signal or subprocess to exit");
        self.signals.stop_idle().await;
        say("signal received, litefs shutting down");
        Ending::Signal(0)
    }

    /// Runs a command to its end; an [`Ending`] if a signal came in between.
    async fn run_sync(&mut self, command: &Command) -> Result<Option<Ending>, Error> {
        let program = command.words[0].clone();
        tracing::info!("executing command: {command}");
        let child = match self.start(command) {
            Ok(child) => child,
            Err(source) => return Err(Error::StartSync { program, source }),
        };
        match self.watch(child).await {
            Exit { asked: true, status } => Ok(Some(after_signal(status))),
            Exit { status: WaitStatus::Exited(_, 0), .. } => Ok(None),
            Exit { status, .. } => Err(Error::Failed { program, how: describe(status) }),
        }
    }

    async fn supervise(&mut self, command: &Command) -> Result<Ending, Error> {
        tracing::info!("starting background subprocess: {command}");
        let program = command.words[0].clone();
        let child =
            self.start(command).map_err(|source| Error::StartBackground { program, source })?;
        say("waiting for signal or subprocess to exit");
        let exit = self.watch(child).await;
        if exit.asked {
            return Ok(after_signal(exit.status));
        }
        Ok(Ending::Process(report(exit.status)))
    }

    fn start(&self, command: &Command) -> io::Result<Pid> {
        let hostname = self.environment.hostname();
        let child = descriptors::start(&command.words, self.descriptors, |process| {
            process.env("HOSTNAME", hostname)
        })?;
        Ok(Pid::from_raw(child.id().cast_signed()))
    }

    /// Hands signals on to `child` until it has ended.
    async fn watch(&mut self, child: Pid) -> Exit {
        let mut asked = 0;
        let mut kill_at: Option<Instant> = None;
        loop {
            let event = tokio::select! {
                event = self.signals.next() => event,
                () = wait_until(kill_at) => {
                    kill_at = None;
                    send(child, Signal::SIGKILL);
                    continue;
                }
            };
            match event {
                Event::Children => {
                    if let Some(status) = reap(child) {
                        return Exit { status, asked: asked > 0 };
                    }
                }
                Event::Signal(signal @ (Signal::SIGTERM | Signal::SIGINT)) => {
                    asked += 1;
                    kill_at = kill_after(asked);
                    say("sending signal to exec process");
                    send(child, signal);
                    say("waiting for exec process to close");
                }
                Event::Signal(signal) => send(child, signal),
            }
        }
    }
}

/// When to kill a child that was asked to end `asked` times.
fn kill_after(asked: u32) -> Option<Instant> {
    let wait = match asked {
        0 | 1 => return None,
        2 => limits::CHILD_GRACE,
        _ => Duration::ZERO,
    };
    tracing::warn!(wait_ms = wait.as_millis(), "exec process will be killed");
    Some(Instant::now() + wait)
}

async fn wait_until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// How a child ended, and whether it had been asked to.
struct Exit {
    status: WaitStatus,
    asked: bool,
}

/// A child that is not collected yet keeps its number, so the signal cannot meet another process.
fn send(child: Pid, signal: Signal) {
    if let Err(error) = kill(child, signal) {
        tracing::warn!(%signal, %error, "signal exec process");
    }
}

/// Collects `child` if it has ended; as process 1 everything else that has ended, too.
fn reap(child: Pid) -> Option<WaitStatus> {
    let everything = is_process_1();
    let target = if everything { None } else { Some(child) };
    let mut found = None;
    loop {
        match waitpid(target, Some(WaitPidFlag::WNOHANG)) {
            Err(Errno::EINTR) => {}
            Ok(status) if status.pid() == Some(child) => {
                found = Some(status);
                if !everything {
                    return found;
                }
            }
            Ok(WaitStatus::StillAlive) | Err(_) => return found,
            Ok(_) => {}
        }
    }
}

/// Collects all that has ended, as process 1. Only while nobody waits for a process of ours.
fn collect_orphans() {
    let is_one = |ended| matches!(ended, Ok(status) if status != WaitStatus::StillAlive);
    if is_process_1() {
        while is_one(waitpid(None, Some(WaitPidFlag::WNOHANG))) {}
    }
}

/// Whether this process gets all processes of its container that lose their parent.
fn is_process_1() -> bool {
    std::process::id() == 1
}

/// The exit code of a child that ended by itself.
fn report(status: WaitStatus) -> u8 {
    match status {
        WaitStatus::Exited(_, 0) => {
            say("subprocess exited successfully, litefs shutting down");
            0
        }
        WaitStatus::Exited(_, code) => {
            say(format_args!("subprocess exited with error code {code}, litefs shutting down"));
            byte(code)
        }
        _ => {
            say("subprocess exited with error code -1, litefs shutting down");
            CODE_BY_SIGNAL
        }
    }
}

fn after_signal(status: WaitStatus) -> Ending {
    say("signal received, litefs shutting down");
    match status {
        WaitStatus::Exited(_, code) => Ending::Signal(byte(code)),
        _ => Ending::Signal(0),
    }
}

/// An exit code is a byte.
fn byte(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(CODE_BY_SIGNAL)
}

fn describe(status: WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, code) => format!("exit status {code}"),
        WaitStatus::Signaled(_, signal, _) => format!("signal: {signal}"),
        status => format!("{status:?}"),
    }
}

#[cfg(test)]
mod tests;
