//! A `sqlite3` program that is told step by step what to do: another application with a database
//! open, which can be killed in the middle of a transaction.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use super::wait;

/// How long it waits for a lock before it reports SQLITE_BUSY. It takes an error of a lock of the
/// wal-index for a lock that is held.
const BUSY_MS: u32 = 2000;

/// The program.
pub struct Shell {
    child: Child,
    stdin: Option<ChildStdin>,
    /// Its answers and complaints.
    dir: tempfile::TempDir,
    steps: u32,
}

impl Shell {
    /// Opens a database.
    pub fn open(path: &Path) -> Shell {
        let dir = tempfile::tempdir().unwrap();
        let complaints = fs::File::create(dir.path().join("complaints")).unwrap();
        let mut command = Command::new("sqlite3");
        command.args(["-batch"]).arg(path).stdin(Stdio::piped());
        let mut child = command.stdout(Stdio::null()).stderr(complaints).spawn().unwrap();
        let stdin = child.stdin.take();
        let mut shell = Shell { child, stdin, dir, steps: 0 };
        shell.tell(&format!(".timeout {BUSY_MS}"));
        shell
    }

    /// Closes the database and opens one, perhaps the same.
    pub fn reopen(&mut self, path: &Path) {
        self.tell(&format!(".open {}", path.display()));
        self.tell(&format!(".timeout {BUSY_MS}"));
    }

    /// Runs `sql`, which must succeed; what it printed.
    #[track_caller]
    pub fn run(&mut self, sql: &str) -> String {
        let before = self.complaints();
        let answer = self.attempt(sql);
        assert_eq!(self.complaints(), before, "{sql}");
        answer
    }

    /// Runs `sql`, which must fail; what it complained of.
    #[track_caller]
    pub fn refused(&mut self, sql: &str) -> String {
        let before = self.complaints().len();
        self.attempt(sql);
        let complaint = self.complaints().split_off(before);
        assert!(!complaint.is_empty(), "not refused: {sql}");
        complaint
    }

    /// Runs `sql`, whatever comes of it; what it printed.
    #[track_caller]
    pub fn attempt(&mut self, sql: &str) -> String {
        self.begin(sql);
        self.end()
    }

    /// Hands `sql` over without waiting for it.
    pub fn begin(&mut self, sql: &str) {
        self.steps += 1;
        let answer = self.path("answer").display().to_string();
        self.tell(&format!(".output {answer}\n{sql};\n.output stdout"));
        let done = self.path("done").display().to_string();
        self.tell(&format!(".shell touch {done}"));
    }

    /// Waits for what was begun; what it printed.
    #[track_caller]
    pub fn end(&mut self) -> String {
        let done = self.path("done");
        let look = || format!("an answer of sqlite3; it complained: {}", self.complaints());
        wait::until_or(look, || done.exists().then_some(()));
        fs::read_to_string(self.path("answer")).unwrap_or_default().trim_end().to_owned()
    }

    /// Whether what was begun has ended.
    pub fn has_ended(&self) -> bool {
        self.path("done").exists()
    }

    /// All complaints so far.
    pub fn complaints(&self) -> String {
        fs::read_to_string(self.dir.path().join("complaints")).unwrap()
    }

    /// The id of the process.
    pub fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.child.id().cast_signed())
    }

    /// Kills it.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Closes the database and ends; it must end by itself.
    #[track_caller]
    pub fn close(mut self) {
        drop(self.stdin.take());
        let status = wait::until("end of sqlite3", || self.child.try_wait().unwrap());
        assert!(status.code().is_some(), "sqlite3 died: {status}");
    }

    fn path(&self, what: &str) -> PathBuf {
        self.dir.path().join(format!("{what}-{}", self.steps))
    }

    fn tell(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().unwrap();
        // A program that has died is noticed when its answer does not come.
        let _ = writeln!(stdin, "{text}");
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
