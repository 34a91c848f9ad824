//! Programs that a test starts: each ends by itself, or is ended. One that hangs would otherwise
//! take the whole run of the tests with it, and nobody would know which it was.

use std::io;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The longest that a program may run; a slow machine takes seconds.
const RUN_MAX: Duration = Duration::from_secs(300);

/// [`RUN_MAX`], or the seconds that `LITEFS_TEST_RUN_MAX` says for runs that are long on purpose.
fn run_max() -> Duration {
    let given = std::env::var("LITEFS_TEST_RUN_MAX").ok().and_then(|text| text.parse().ok());
    given.map_or(RUN_MAX, Duration::from_secs)
}

/// The program that is tested: the one that was built with the tests, or the one that
/// `LITEFS_TEST_PROGRAM` names, which may have been built in another way (`make tsan`).
pub fn litefs() -> &'static str {
    static CHOSEN: OnceLock<String> = OnceLock::new();
    let built = || env!("CARGO_BIN_EXE_litefs").to_owned();
    CHOSEN.get_or_init(|| std::env::var("LITEFS_TEST_PROGRAM").unwrap_or_else(|_| built()))
}

/// Kills a process after [`RUN_MAX`], unless it is dropped before. It must be dropped before the
/// process is waited for: until then the process id is still its own.
pub struct Limit {
    _end: mpsc::Sender<()>,
}

impl Limit {
    /// Begins now.
    pub fn new(child: &Child) -> Limit {
        let (end, ended) = mpsc::channel();
        let pid = Pid::from_raw(child.id().cast_signed());
        std::thread::spawn(move || {
            if ended.recv_timeout(run_max()) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("process {pid} runs for too long: killed");
                let _ = kill(pid, Signal::SIGKILL);
            }
        });
        Limit { _end: end }
    }
}

/// Runs a program to its end, with nothing on stdin: what it said.
pub fn output(command: &mut Command) -> io::Result<Output> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(finish(command.spawn()?))
}

/// Waits until a program has ended: what it said on those of its streams that are pipes.
pub fn finish(child: Child) -> Output {
    let limit = Limit::new(&child);
    let output = child.wait_with_output().unwrap();
    drop(limit);
    output
}
