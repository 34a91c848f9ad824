//! A process that makes the file calls it is told: locks, mappings and all that SQLite's own program
//! does not do. It is Python, which has them all, and `fork`, without a line of unsafe code here.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::program::Limit;
use super::wait;

/// What it runs: each line is an expression; its value, or the errno of its failure, is the answer.
const SCRIPT: &str = include_str!("process.py");

/// The process.
pub struct Process {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    _limit: Limit,
}

impl Process {
    /// Starts it; `path` is the file that its first descriptor, `f`, has open.
    #[track_caller]
    pub fn open(path: &Path) -> Process {
        let mut command = Command::new("python3");
        command.args(["-c", SCRIPT]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let limit = Limit::new(&child);
        let mut process = Process { child, stdin, stdout: BufReader::new(stdout), _limit: limit };
        process.expect(&format!("(f := os.open({path:?}, os.O_RDWR)) and None"), "None");
        process
    }

    /// Evaluates `expression`; its value as Python writes it, or the name of an errno.
    #[track_caller]
    pub fn tell(&mut self, expression: &str) -> String {
        self.begin(expression);
        self.end()
    }

    /// Evaluates `expression`, which must come to `value`.
    #[track_caller]
    pub fn expect(&mut self, expression: &str, value: &str) {
        assert_eq!(self.tell(expression), value, "{expression}");
    }

    /// Hands an expression over without waiting for it.
    pub fn begin(&mut self, expression: &str) {
        writeln!(self.stdin, "{expression}").unwrap();
    }

    /// Waits for what was begun.
    #[track_caller]
    pub fn end(&mut self) -> String {
        let mut answer = String::new();
        assert!(self.stdout.read_line(&mut answer).unwrap() > 0, "the process has ended");
        answer.trim_end().to_owned()
    }

    /// Sends a signal that its handler hears; it ends a call that waits.
    pub fn interrupt(&self) {
        kill(self.pid(), Signal::SIGUSR1).unwrap();
    }

    /// Kills it, and waits until the kernel has let it go.
    #[track_caller]
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        wait::until("end of a process that was killed", || self.child.try_wait().unwrap());
    }

    /// Its number.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Whether it sleeps in a system call that a signal can end.
    pub fn is_waiting_in(&self, call: i64) -> bool {
        let path = format!("/proc/{}/syscall", self.child.id());
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.split(' ').next().and_then(|number| number.parse().ok()) == Some(call)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
