//! `mount` with a real mount: the supervised process, signals and exit codes.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Far above what any of these takes on a slow machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// A running `litefs mount` in directories of its own.
struct Node {
    dir: tempfile::TempDir,
    child: Child,
    stdout: BufReader<std::process::ChildStdout>,
}

impl Node {
    /// A standalone primary by configuration file, with `extra` lines in it.
    fn start(extra: &str, command: &[&str]) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let root = dir.path().display();
        let config = format!(
            "fuse: {{dir: {root}/mnt}}\ndata: {{dir: {root}/data}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n\
             lease: {{type: static, hostname: a, advertise-url: 'http://127.0.0.1:{port}'}}\n{extra}"
        );
        fs::write(dir.path().join("litefs.yml"), config).unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_litefs"));
        process.arg("mount").args(command).current_dir(dir.path());
        let mut child = process.stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Node { dir, child, stdout }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Reads stdout up to a line that begins so.
    fn wait_for_line(&mut self, begin: &str) {
        let mut seen = String::new();
        while !seen.lines().last().is_some_and(|line| line.starts_with(begin)) {
            assert!(self.stdout.read_line(&mut seen).unwrap() > 0, "{begin} not in:\n{seen}");
        }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Waits for the end; the mount must be gone.
    fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "litefs does not end");
            std::thread::yield_now();
        };
        assert!(!is_mounted(&self.path("mnt")), "the mount is still there");
        status
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // After a failed test; after a good one there is nothing left.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if is_mounted(&self.path("mnt")) {
            let _ = Command::new("umount").arg("-l").arg(self.path("mnt")).status();
        }
    }
}

fn is_mounted(dir: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let dir = dir.to_str().unwrap();
    mounts.lines().any(|line| line.split(' ').nth(1) == Some(dir))
}

fn wait_for_file(path: &Path) {
    let deadline = Instant::now() + DEADLINE;
    while !path.exists() {
        assert!(Instant::now() < deadline, "{} does not appear", path.display());
        std::thread::yield_now();
    }
}

#[track_caller]
fn code(script: &str, expected: i32) {
    let mut node = Node::start("", &["--", "sh", "-c", script]);
    assert_eq!(node.end().code(), Some(expected), "{script}");
}

#[test]
fn the_exit_code_of_the_application_is_ours() {
    code("exit 0", 0);
    code("exit 42", 42);
    code("kill -9 $$", 255);
}

#[test]
fn the_application_finds_its_database() {
    let sql = "create table t(x); insert into t values (7)";
    code(
        &format!("sqlite3 mnt/app.db '{sql}' && test $(sqlite3 mnt/app.db 'select x from t') = 7"),
        0,
    );
}

#[test]
fn commands_of_the_file_run_in_order_in_the_working_directory() {
    let exec =
        "exec:\n  - cmd: sh -c 'echo $HOSTNAME >first'\n  - cmd: sh -c 'cp first second; exit 3'\n";
    let mut node = Node::start(exec, &[]);
    wait_for_file(&node.path("second"));
    let hostname = fs::read_to_string(node.path("first")).unwrap();
    assert!(hostname.trim() != "", "HOSTNAME is not set");
    assert_eq!(node.end().code(), Some(3));
}

#[test]
fn a_failing_first_command_ends_the_node() {
    let exec = "exec:\n  - cmd: 'false'\n  - cmd: touch started\n";
    let mut node = Node::start(exec, &[]);
    let started = node.path("started");
    assert_eq!(node.end().code(), Some(1));
    assert!(!started.exists());
}

#[test]
fn a_signal_is_handed_on_and_ends_with_code_0() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let script = "trap 'touch got; exit 0' TERM INT; mkfifo pipe; touch up; while :; do read x <pipe; done";
        let mut node = Node::start("", &["--", "sh", "-c", script]);
        wait_for_file(&node.path("up"));
        node.signal(signal);
        let got = node.path("got");
        wait_for_file(&got);
        assert_eq!(node.end().code(), Some(0));
    }
}

#[test]
fn a_child_that_fails_on_the_signal_still_gets_a_clean_close() {
    let script = "trap 'exit 9' TERM; mkfifo pipe; touch up; while :; do read x <pipe; done";
    let mut node = Node::start("", &["--", "sh", "-c", script]);
    wait_for_file(&node.path("up"));
    node.signal(Signal::SIGTERM);
    assert_eq!(node.end().code(), Some(9));
}

#[test]
fn without_a_command_a_signal_ends_it() {
    for signal in [Signal::SIGTERM, Signal::SIGHUP] {
        let mut node = Node::start("", &["--"]);
        node.wait_for_line("waiting for signal");
        node.signal(signal);
        assert_eq!(node.end().code(), Some(0));
    }
}

#[test]
fn a_mount_that_somebody_takes_away_ends_the_node() {
    let mut node = Node::start("", &["--"]);
    node.wait_for_line("waiting for signal");
    assert!(Command::new("umount").arg(node.path("mnt")).status().unwrap().success());
    assert_eq!(node.end().code(), Some(1));
}
