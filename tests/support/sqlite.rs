//! SQLite, in this process and in others.
//!
//! Connections of one process share their locks: what has to look like another application is run
//! by the `sqlite3` program.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rusqlite::Connection;

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
    child.wait_with_output().unwrap()
}

/// One value of one row.
#[track_caller]
pub fn value<T: rusqlite::types::FromSql>(connection: &Connection, sql: &str) -> T {
    connection.query_row(sql, [], |row| row.get(0)).unwrap_or_else(|error| panic!("{sql}: {error}"))
}
