//! A process of its own for what needs one: this test binary, started again to run one test,
//! which reads commands from standard input and answers each with a line.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

const VARIABLE: &str = "FUSE_TEST_CHILD";
const ANSWER: &str = "answer: ";

/// A running child.
pub struct Process {
    pub child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    pub thread: i32,
}

impl Process {
    pub fn start() -> Process {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child::obeys_commands", "--nocapture", "--test-threads=1"])
            .env(VARIABLE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let commands = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut process = Process { child, commands, answers, thread: 0 };
        process.thread = process.answer().parse().unwrap();
        process
    }

    /// Sends a command without waiting for its answer.
    pub fn send(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
    }

    /// The next answer.
    pub fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "child ended");
            if let Some((_, answer)) = line.split_once(ANSWER) {
                return answer.trim().to_owned();
            }
        }
    }

    /// Sends a command; its answer.
    pub fn tell(&mut self, command: &str) -> String {
        self.send(command);
        self.answer()
    }

    /// Sends a signal to the thread that obeys.
    pub fn signal(&self, name: Signal) {
        signal(self.child.id(), self.thread, name);
    }
}

/// Sends a signal to one thread of a process.
pub fn signal(process: u32, thread: i32, name: Signal) {
    let (process, thread) = (libc::c_long::from(process), libc::c_long::from(thread));
    // SAFETY: tgkill takes three numbers and touches no memory.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, name as libc::c_long) };
    assert_eq!(result, 0);
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `kind start len` as the struct of fcntl(2).
fn flock(words: &[&str]) -> Option<libc::flock> {
    let [kind, start, len] = words else { return None };
    let kind = match *kind {
        "r" => libc::F_RDLCK,
        "w" => libc::F_WRLCK,
        "u" => libc::F_UNLCK,
        _ => return None,
    };
    Some(libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start.parse().ok()?,
        l_len: len.parse().ok()?,
        l_pid: 0,
    })
}

/// Does what a command says with the opened files; the answer.
fn obey(files: &mut Vec<File>, command: &str) -> String {
    let words: Vec<&str> = command.split(' ').collect();
    match words.as_slice() {
        ["open", path] => {
            files.push(OpenOptions::new().read(true).write(true).open(path).unwrap());
            "ok".to_owned()
        }
        ["dup"] => {
            files.push(files[0].try_clone().unwrap());
            "ok".to_owned()
        }
        ["close"] => {
            files.pop();
            "ok".to_owned()
        }
        [call @ ("setlk" | "setlkw" | "getlk" | "ofd"), rest @ ..] => match flock(rest) {
            Some(mut lock) => locked(&files[0], call, &mut lock),
            None => "what?".to_owned(),
        },
        _ => "what?".to_owned(),
    }
}

fn locked(file: &File, call: &str, lock: &mut libc::flock) -> String {
    let argument = match call {
        "setlk" => FcntlArg::F_SETLK(lock),
        "setlkw" => FcntlArg::F_SETLKW(lock),
        "ofd" => FcntlArg::F_OFD_SETLK(lock),
        _ => FcntlArg::F_GETLK(lock),
    };
    let is_query = matches!(argument, FcntlArg::F_GETLK(_));
    match fcntl(file, argument) {
        Ok(_) if !is_query => "ok".to_owned(),
        Ok(_) => match i32::from(lock.l_type) {
            libc::F_RDLCK => format!("r {} {}", lock.l_start, lock.l_len),
            libc::F_WRLCK => format!("w {} {}", lock.l_start, lock.l_len),
            _ => "free".to_owned(),
        },
        Err(errno) => format!("{errno:?}"),
    }
}

extern "C" fn ignore(_: libc::c_int) {}

/// Without a parent: a command that is none is refused.
#[test]
fn obeys_commands() {
    if std::env::var_os(VARIABLE).is_none() {
        let mut files = vec![tempfile::tempfile().unwrap()];
        assert_eq!(obey(&mut files, "setlk w 0 1"), "ok");
        assert_eq!(obey(&mut files, "setlk x 0 1"), "what?");
        assert_eq!(obey(&mut files, "dance"), "what?");
        return;
    }
    let action = SigAction::new(SigHandler::Handler(ignore), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
    say(&nix::unistd::gettid().to_string());
    let mut files = Vec::new();
    for command in std::io::stdin().lines() {
        say(&obey(&mut files, &command.unwrap()));
    }
}

fn say(answer: &str) {
    let mut out = std::io::stdout();
    // One write, so that the runner's own words do not fall in between.
    out.write_all(format!("\n{ANSWER}{answer}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}
