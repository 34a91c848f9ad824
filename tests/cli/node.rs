//! A `litefs mount` process in directories of its own.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::SIGNALS_HEEDED;
use crate::support::node::free_address;
use crate::support::program::{self, Limit};
use crate::support::wait;

/// A running `litefs mount` in directories of its own.
pub struct Node {
    dir: tempfile::TempDir,
    port: u16,
    pub child: Child,
    stdout: BufReader<std::process::ChildStdout>,
    _limit: Limit,
}

impl Node {
    /// A static primary whose configuration has the lines `extra` too.
    pub fn start(extra: &str, command: &[&str]) -> Node {
        let port = free_port();
        let lease = format!("type: static, hostname: a, advertise-url: 'http://127.0.0.1:{port}'");
        Node::start_by(&[], port, &format!("lease: {{{lease}}}\n{extra}"), command)
    }

    /// A node whose API is at `port`, started by the program and arguments `by`, if any. Where `config` has
    /// a section `http` itself, that has to say the port.
    pub fn start_by(by: &[&str], port: u16, config: &str, command: &[&str]) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().display();
        let http = match config.lines().any(|line| line.starts_with("http:")) {
            true => String::new(),
            false => format!("http: {{addr: '127.0.0.1:{port}'}}\n"),
        };
        let config =
            format!("fuse: {{dir: {root}/mnt}}\ndata: {{dir: {root}/data}}\n{http}{config}");
        fs::write(dir.path().join("litefs.yml"), config).unwrap();
        let words = [&SIGNALS_HEEDED, by, &[program::litefs(), "mount"], command].concat();
        let mut process = Command::new(words[0]);
        process.args(&words[1..]).current_dir(dir.path());
        let log = fs::File::create(dir.path().join("stderr")).unwrap();
        let mut child = process.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Node { dir, port, _limit: Limit::new(&child), child, stdout }
    }

    /// Where its API answers.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What it said on stderr so far.
    pub fn stderr(&self) -> String {
        fs::read_to_string(self.path("stderr")).unwrap()
    }

    /// Reads stdout up to a line that begins so.
    pub fn wait_for_line(&mut self, begin: &str) {
        let mut seen = String::new();
        while !seen.lines().last().is_some_and(|line| line.starts_with(begin)) {
            assert!(self.stdout.read_line(&mut seen).unwrap() > 0, "{begin} not in:\n{seen}");
        }
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Waits for the end.
    pub fn wait(&mut self) -> ExitStatus {
        wait::until("the end of litefs", || self.child.try_wait().unwrap())
    }

    /// Waits for the end; the mount must be gone.
    pub fn end(&mut self) -> ExitStatus {
        let status = self.wait();
        assert!(!is_mounted(&self.path("mnt")), "the mount is still there");
        status
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // After a failed test; after a good one there is nothing left.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- stderr of {}\n{}", self.url(), self.stderr());
        }
        if is_mounted(&self.path("mnt")) {
            let _ = Command::new("umount").arg("-l").arg(self.path("mnt")).status();
        }
    }
}

/// A port of [`free_address`].
pub fn free_port() -> u16 {
    free_address().parse::<SocketAddr>().unwrap().port()
}

pub fn is_mounted(dir: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let dir = dir.to_str().unwrap();
    mounts.lines().any(|line| line.split(' ').nth(1) == Some(dir))
}

pub fn wait_for_file(path: &Path) {
    wait::until_true(&path.display().to_string(), || path.exists());
}
