//! An application: a `sqlite3` process with one database open, or with two.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::reference::Change;
use super::script::{NAMES, View};
use crate::support::node::Node;
use crate::support::program::Limit;

/// How long it waits for a lock. Steps are made one after the other, so what holds a lock for longer
/// holds it for good.
const BUSY_MS: u32 = 100;
const END: &str = "-- end of answer --";

/// A transaction that it has begun.
pub struct Transaction {
    /// Whether it locked its databases at once.
    pub is_immediate: bool,
    /// Whether nobody else has done anything since it began.
    pub is_alone: bool,
    /// What ends it, and keeps what it has done.
    pub commit: &'static str,
    /// What it has changed so far.
    pub changes: Vec<Change>,
    /// What it must find in the tables of a database from which it has read.
    pub seen: [Option<Vec<Option<String>>>; 2],
}

impl Transaction {
    /// One that a statement has begun: `begin` in one of its ways, or the savepoint `s0`.
    pub fn of(opener: &str) -> Transaction {
        let is_immediate = matches!(opener, "begin immediate" | "begin exclusive");
        let commit = if opener == "savepoint s0" { "release s0" } else { "commit" };
        let (changes, seen) = (Vec::new(), [None, None]);
        Transaction { is_immediate, is_alone: true, commit, changes, seen }
    }

    /// Whether what it reads of a database may be older than what others have committed.
    pub fn may_be_old(&self, database: usize) -> bool {
        !self.is_immediate && !self.is_alone && !self.holds(database)
    }

    /// Whether it changes this database, or keeps others from doing it.
    pub fn holds(&self, database: usize) -> bool {
        let changes = |change: &Change| match change {
            Change::Sql(sql) => sql.database == database,
            Change::Savepoint(_) => false,
        };
        self.is_immediate || self.changes.iter().any(changes)
    }
}

/// What comes of a statement.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was done; what it printed.
    Done(String),
    /// A lock was in the way.
    Busy,
    /// SQLite does not take it; nothing has changed.
    Refused(String),
    /// The process has ended, and had not said what came of it.
    Gone,
}

/// The process.
pub struct Client {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    /// What it has open.
    pub view: View,
    /// What it has begun.
    pub transaction: Option<Transaction>,
    _limit: Limit,
}

impl Client {
    /// A new process.
    pub fn open(node: &Node, view: View) -> Client {
        let first = if view == View::One(1) { 1 } else { 0 };
        // Complaints are part of what is answered.
        let mut command = Command::new("sh");
        command.args(["-c", "exec sqlite3 -batch \"$0\" 2>&1"]).arg(node.file(NAMES[first]));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let _limit = Limit::new(&child);
        let mut client = Client { child, stdin, stdout, view, transaction: None, _limit };
        let attach = format!("attach '{}' as b;", node.file(NAMES[1]).display());
        let attach = if view == View::Both { attach } else { String::new() };
        match client.ask(&format!(".timeout {BUSY_MS}\n{attach}")) {
            Answer::Done(_) => {}
            // Who attaches a database reads it.
            Answer::Busy => client.view = View::One(0),
            answer => panic!("open {view:?}: {answer:?}"),
        }
        client
    }

    /// What the databases are called here.
    pub fn schemas(&self) -> [&'static str; 2] {
        if self.view == View::Both { ["main", "b"] } else { ["main", "main"] }
    }

    /// Runs a statement.
    pub fn ask(&mut self, sql: &str) -> Answer {
        self.tell(sql);
        self.answer()
    }

    /// Kills the process, which may have complained of a node that is gone: whether its statement was
    /// done, or nobody knows.
    pub fn kill_without_node(mut self) -> Answer {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let mut text = String::new();
        let _ = self.stdout.read_to_string(&mut text);
        let is_done = text.contains(END) && !text.contains("rror");
        if is_done { Answer::Done(text) } else { Answer::Gone }
    }

    /// Hands a statement over.
    pub fn tell(&mut self, sql: &str) {
        // That it has died is noticed when its answer does not come.
        let _ = writeln!(self.stdin.as_mut().unwrap(), "{sql};\n.print {END}");
    }

    /// What came of what was handed over.
    pub fn answer(&mut self) -> Answer {
        let mut text = String::new();
        loop {
            let start = text.len();
            if self.stdout.read_line(&mut text).unwrap() == 0 {
                return Answer::Gone;
            }
            if text[start..].trim_end() == END {
                text.truncate(start);
                return judge(text.trim_end());
            }
        }
    }

    /// Kills the process; what came of what was handed over before.
    pub fn kill(mut self) -> Answer {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.answer()
    }

    /// Closes the databases and ends.
    pub fn close(mut self) {
        drop(self.stdin.take());
        let mut rest = String::new();
        let _ = self.stdout.read_to_string(&mut rest);
        self.child.wait().unwrap();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn judge(text: &str) -> Answer {
    let complaint =
        text.lines().find(|line| line.contains("rror near line ") || line.starts_with("Error"));
    let Some(complaint) = complaint else { return Answer::Done(text.to_owned()) };
    let broken = ["I/O", "malformed", "readonly", "full", "unable to open", "not a database"];
    assert!(!broken.iter().any(|word| complaint.contains(word)), "{text}");
    let is_busy = complaint.contains("locked") || complaint.contains("SQL statements in progress");
    if is_busy { Answer::Busy } else { Answer::Refused(complaint.to_owned()) }
}
