//! SQLite, in this process and in others.
//!
//! Connections of one process share their locks: what has to look like another application is run
//! by the `sqlite3` program.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::time::Duration;

use rusqlite::Connection;

use super::program::{self, Limit};

/// How long a connection waits for a lock before it reports SQLITE_BUSY.
const BUSY: Duration = Duration::from_secs(10);

/// A connection of this process.
#[track_caller]
pub fn open(path: &Path) -> Connection {
    let connection = Connection::open(path).unwrap();
    connection.busy_timeout(BUSY).unwrap();
    connection
}

/// Runs `sql` in a process of its own; what it printed.
#[track_caller]
pub fn run(path: &Path, sql: &str) -> String {
    let output = attempt(path, sql);
    assert!(output.status.success(), "{}: {sql}\n{}", path.display(), complaint(&output));
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

/// Runs `sql`, which must fail, in a process of its own; what it complained of.
#[track_caller]
pub fn refused(path: &Path, sql: &str) -> String {
    let output = attempt(path, sql);
    assert!(!output.status.success(), "{}: not refused: {sql}", path.display());
    complaint(&output)
}

/// Runs `sql` in a process of its own: what it printed, or what it complained of.
pub fn try_run(path: &Path, sql: &str) -> Result<String, String> {
    let output = attempt(path, sql);
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned()),
        false => Err(complaint(&output)),
    }
}

fn complaint(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim_end().to_owned()
}

fn attempt(path: &Path, sql: &str) -> Output {
    let mut command = Command::new("sqlite3");
    command.args(["-batch", "-bail"]).arg(path);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // A process that has failed already does not read.
    let _ = write!(stdin, ".timeout {}\n{sql}\n", BUSY.as_millis());
    drop(stdin);
    program::finish(child)
}

/// One value of one row.
#[track_caller]
pub fn value<T: rusqlite::types::FromSql>(connection: &Connection, sql: &str) -> T {
    connection
        .query_row(sql, [], |row| row.get(0))
        .unwrap_or_else(|error| panic!("{sql}: {error} ({:?})", error.sqlite_error()))
}

/// A `sqlite3` process that stays.
pub struct Session {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    _limit: Limit,
}

impl Session {
    /// Opens a database; nothing is read yet.
    pub fn open(path: &Path) -> Session {
        // Complaints are part of what is answered.
        let mut command = Command::new("sh");
        command.args(["-c", "exec sqlite3 -batch \"$0\" 2>&1"]).arg(path);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Session { _limit: Limit::new(&child), child, stdin, stdout }
    }

    /// Runs `sql`; what it printed.
    #[track_caller]
    pub fn run(&mut self, sql: &str) -> String {
        const END: &str = "-- end of answer --";
        writeln!(self.stdin, "{sql}\n.print {END}").unwrap();
        let mut answer = String::new();
        loop {
            let start = answer.len();
            assert!(self.stdout.read_line(&mut answer).unwrap() > 0, "sqlite3 has ended: {answer}");
            if answer[start..].trim_end() == END {
                answer.truncate(start);
                return answer.trim_end().to_owned();
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
