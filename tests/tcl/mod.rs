//! SQLite's own test suite on the mount: what passes on a bare file system passes here, but for what stands
//! in `exceptions.txt`, with its reason.
//!
//! `build` makes the test program, once, below `target/`; `prelude.tcl` says what is different here. Each
//! file of the suite is run by a process of its own, in the mount's directory, which is empty before and
//! after; in between the chain of each database that is left must lead to its pages. By default the files
//! of `quick.txt` are run, those that try locks, journals, logs and crashes hardest; LITEFS_TEST_TCL=all
//! runs those of SQLite's "veryquick", and a list of names runs these. What came of each file is written to
//! `target/tcl/results`, with what stands in `exceptions.txt` and passed all the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use test_case::test_matrix;

use crate::support::image::{self, Image};
use crate::support::node::{Node, Settings};
use crate::support::{program, sqlite};

/// The longest that one file may take, in seconds; on a slow machine most take one.
const FILE_MAX: &str = "120";

/// How long a node is used: with one such file more it is still within the limit of a node.
const NODE_MAX: Duration = Duration::from_secs(120);

/// A longer chain is not applied to nothing each time: a database that each file of the suite removes and
/// makes again has one chain.
const CHAIN_MAX: usize = 300;

/// The reasons that hold on a bare file system too.
const ON_BARE: [&str; 4] = ["bare", "root", "shm", "slow"];

/// Where the suite is built.
fn home() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tcl")
}

/// The suite, built.
fn suite() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tcl/build");
        let output = program::output(Command::new(script).arg(home())).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "build SQLite's test program: {said}");
        home()
    })
}

/// What may fail.
#[derive(Default)]
struct Exceptions {
    /// File to patterns of names of tests.
    tests: BTreeMap<&'static str, BTreeSet<&'static str>>,
    /// Files that write into the files of a database past SQLite, so that these are what nobody knows.
    past_sqlite: BTreeSet<&'static str>,
    /// Files whose commits are seen when the next client comes.
    unseen: BTreeSet<&'static str>,
}

impl Exceptions {
    /// Lines of `REASON FILE TEST...`. With `errors:N` up to N of its commands may also end with an
    /// error, and the tests in these may not be run; with `killed` it may also come to no end.
    fn read(reasons: impl Fn(&str) -> bool) -> Exceptions {
        let mut found = Exceptions::default();
        let lines = include_str!("exceptions.txt").lines().filter(|line| !line.starts_with('#'));
        for line in lines {
            let mut words = line.split_whitespace();
            let (Some(reason), Some(file)) = (words.next(), words.next()) else { continue };
            match reason {
                "bytes" => _ = found.past_sqlite.insert(file),
                "index" => _ = found.unseen.insert(file),
                _ => {}
            }
            if reasons(reason) {
                found.tests.entry(file).or_default().extend(words);
            }
        }
        found
    }

    fn allows(&self, file: &str, test: &str) -> bool {
        self.of(file).any(|pattern| matches(pattern, test))
    }

    /// The patterns of `file` that nothing needed this time; a pattern may be needed in another kind of mount.
    fn unneeded(&self, file: &str, outcome: &Outcome) -> Vec<&'static str> {
        let needs = |pattern: &str| match pattern {
            "killed" => outcome.tests.is_none(),
            _ if errors(pattern).is_some() => outcome.errors > 0,
            _ => outcome.failed.iter().any(|test| matches(pattern, test)),
        };
        self.of(file).filter(|pattern| !needs(pattern)).collect()
    }

    fn of(&self, file: &str) -> impl Iterator<Item = &'static str> {
        self.tests.get(file).into_iter().flatten().copied()
    }

    /// How many commands of `file` may end with an error.
    fn errors_of(&self, file: &str) -> usize {
        self.of(file).filter_map(errors).max().unwrap_or_default()
    }

    fn may_be_killed(&self, file: &str) -> bool {
        self.of(file).any(|pattern| pattern == "killed")
    }
}

/// N of the pattern `errors:N`.
fn errors(pattern: &str) -> Option<usize> {
    Some(pattern.strip_prefix("errors:")?.parse().expect("a number of commands"))
}

/// Whether `test` is one of `pattern`, which may end with `*`.
fn matches(pattern: &str, test: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => test.starts_with(start),
        None => test == pattern,
    }
}

/// The files to run, as paths.
fn files() -> Vec<PathBuf> {
    let wanted = std::env::var("LITEFS_TEST_TCL").unwrap_or_default();
    let all: Vec<&str> = include_str!("veryquick.txt").lines().collect();
    let names: Vec<&str> = match wanted.as_str() {
        "" => include_str!("quick.txt").lines().collect(),
        "all" => all.clone(),
        list => list.split(' ').collect(),
    };
    let path = |name: &&str| {
        let known = all.iter().find(|path| path.rsplit('/').next() == Some(name));
        suite().join("src").join(known.unwrap_or(name))
    };
    names.iter().filter(|name| !name.starts_with('#')).map(path).collect()
}

/// What came of one file.
struct Outcome {
    /// Tests that were run; none if the program did not come to its end.
    tests: Option<u64>,
    /// How many commands of the file ended with an error.
    errors: usize,
    failed: Vec<String>,
    said: String,
}

/// Runs one file in `dir`.
fn run(file: &Path, dir: &Path, node: Option<&Node>) -> Outcome {
    let elsewhere = tempfile::tempdir().unwrap();
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", FILE_MAX, "nice", "-n", "10"]);
    command.arg(suite().join("build/testfixture"));
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tcl/prelude.tcl"));
    command.arg(file).args(["--testdir=", "--verbose=0"]).current_dir(dir);
    command.env("TCL_ELSEWHERE", elsewhere.path()).env("HOME", elsewhere.path());
    if let Some(node) = node {
        let import = format!("{} import -url {}", program::litefs(), node.url());
        command.env("TCL_MOUNT", dir).env("TCL_IMPORT", import);
    }
    let output = program::output(&mut command).unwrap();
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said.push_str(&String::from_utf8_lossy(&output.stderr));
    let counts = said.lines().find_map(|line| line.split_once(" errors out of "));
    let tests = counts.and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
    let errors = said.lines().filter(|line| line.starts_with("Command failed: ")).count();
    let failed = said.lines().find_map(|line| line.strip_prefix("!Failures on these tests: "));
    let failed = match failed {
        Some(names) => names.split(' ').map(str::to_owned).collect(),
        None => failed_before_the_end(&said),
    };
    Outcome { tests, errors, failed, said }
}

/// The tests that failed, of a program that ended before it listed them.
fn failed_before_the_end(said: &str) -> Vec<String> {
    let lines = said.lines().zip(said.lines().skip(1));
    let names = lines.filter_map(|(line, next)| {
        let of_result = line.strip_prefix("! ").and_then(|rest| rest.split_once(" expected: "));
        let of_error = line.strip_suffix("...").filter(|_| next.starts_with("Error: "));
        of_result.map(|(name, _)| name).or(of_error).map(str::to_owned)
    });
    names.collect()
}

/// A directory for the suite.
struct Place {
    /// Of a mount; else the directory is on a bare file system.
    node: Option<Node>,
    bare: tempfile::TempDir,
    since: Instant,
}

impl Place {
    fn new(mode: Option<(&'static str, &'static str)>) -> Place {
        let node = mode.map(|(passthrough, transport)| {
            Node::primary(&Settings { passthrough, transport, ..Settings::default() })
        });
        Place { node, bare: tempfile::tempdir().unwrap(), since: Instant::now() }
    }

    fn dir(&self) -> PathBuf {
        self.node.as_ref().map_or_else(|| self.bare.path().to_owned(), Node::mount)
    }

    /// The pages of each database are those of its position, and its chain leads to them.
    fn check(&self) -> Result<(), String> {
        let Some(node) = &self.node else { return Ok(()) };
        for name in node.databases() {
            let (dir, pos) = (node.db_dir(&name), node.pos(&name));
            let journal = fs::read(dir.journal()).unwrap_or_default();
            if journal.first().is_some_and(|byte| *byte != 0) {
                // Left in the middle of a transaction, which the next client rolls back.
                continue;
            }
            let Some(found) = Image::of_files(&dir) else { continue };
            // SQLite does not always cut its file to the pages that it uses; a WAL counts them for itself.
            let found = if found.checksum() == pos.checksum { found } else { found.cut() };
            if found.checksum() != pos.checksum {
                return Err(format!("the pages of {name} are not those of {pos}"));
            }
            if image::chain_files(&dir).len() <= CHAIN_MAX {
                let replayed = image::replay_chain(&dir, pos);
                if replayed.is_none_or(|replayed| replayed.bytes() != found.bytes()) {
                    return Err(format!("the chain of {name} leads to other pages"));
                }
            }
        }
        match node.log().contains("panicked") {
            true => Err("litefs panicked".to_owned()),
            false => Ok(()),
        }
    }

    /// Has another client look at each database.
    fn look(&self) {
        for name in self.node.iter().flat_map(Node::databases) {
            // What it says of a database that a test left as it likes is of no interest.
            let _ = sqlite::try_run(&self.dir().join(name), "select count(*) from sqlite_master");
        }
    }

    /// Removes every file; what is left.
    fn clear(&self) -> Vec<String> {
        let names = || {
            let entries = fs::read_dir(self.dir()).unwrap();
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let ours = |name: &String| self.node.is_none() || name != ".lag";
            names.filter(ours).collect::<Vec<_>>()
        };
        for name in names() {
            let path = self.dir().join(name);
            let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
        }
        names()
    }
}

/// Counts and complaints of one run.
#[derive(Default)]
struct Report {
    lines: String,
    files: u64,
    files_whole: u64,
    tests: u64,
    failed: u64,
    complaints: Vec<String>,
}

fn run_all(mode: Option<(&'static str, &'static str)>) {
    let exceptions = Exceptions::read(|reason| mode.is_some() || ON_BARE.contains(&reason));
    let files = files();
    let next = Mutex::new(files.iter());
    let report = Mutex::new(Report::default());
    // With one mount for each of two files at a time: some wait for most of their time.
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut place = Place::new(mode);
                loop {
                    let Some(file) = next.lock().unwrap().next() else { break };
                    let fresh = run_one(file, &place, &exceptions, &report);
                    if !fresh {
                        place = Place::new(mode);
                    }
                }
            });
        }
    });
    let report = report.into_inner().unwrap();
    let name = mode.map_or("bare".to_owned(), |(way, transport)| format!("{way}-{transport}"));
    let counts = format!(
        "{name}: {} of {} files without a failure, {} of {} tests",
        report.files_whole,
        report.files,
        report.tests - report.failed,
        report.tests
    );
    println!("{counts}");
    let results = home().join("results");
    fs::create_dir_all(&results).unwrap();
    fs::write(results.join(name), format!("{}{counts}\n", report.lines)).unwrap();
    assert!(report.complaints.is_empty(), "{counts}\n{}", report.complaints.join("\n"));
}

/// Runs one file; whether the place is as good as new afterwards.
fn run_one(file: &Path, place: &Place, exceptions: &Exceptions, report: &Mutex<Report>) -> bool {
    let name = file.file_name().unwrap().to_str().unwrap();
    let outcome = run(file, &place.dir(), place.node.as_ref());
    let unneeded = exceptions.unneeded(name, &outcome);
    let Outcome { tests, errors, failed, said } = outcome;
    let mut complaints = Vec::new();
    let unexpected: Vec<_> =
        failed.iter().filter(|test| !exceptions.allows(name, test)).map(String::as_str).collect();
    if !unexpected.is_empty() {
        complaints.push(format!("{name}: failed: {}", unexpected.join(" ")));
    }
    if tests.is_none() && !exceptions.may_be_killed(name) {
        complaints.push(format!("{name}: did not come to its end"));
    }
    if errors > exceptions.errors_of(name) {
        complaints.push(format!("{name}: {errors} commands ended with an error"));
    }
    let known = !exceptions.past_sqlite.contains(name);
    if exceptions.unseen.contains(name) {
        place.look();
    }
    if known {
        let check = panic::catch_unwind(AssertUnwindSafe(|| place.check()));
        let found = check.unwrap_or_else(|_| Err("its files cannot be read".to_owned()));
        complaints.extend(found.err().map(|complaint| format!("{name}: {complaint}")));
    }
    let left = place.clear();
    if known && !left.is_empty() && errors == 0 {
        complaints.push(format!("{name}: cannot be removed: {left:?}"));
    }
    let mut report = report.lock().unwrap();
    report.files += 1;
    report.files_whole += u64::from(tests.is_some() && errors == 0 && failed.is_empty());
    report.tests += tests.unwrap_or_default();
    report.failed += failed.len() as u64;
    let tests = tests.map_or("?".to_owned(), |tests| tests.to_string());
    let _ = write!(report.lines, "{name} {tests} ");
    if errors > 0 {
        let _ = write!(report.lines, "errors:{errors} ");
    }
    let _ = writeln!(report.lines, "{}", failed.join(" "));
    if !unneeded.is_empty() {
        let _ = writeln!(report.lines, "  passed: {}", unneeded.join(" "));
    }
    if !complaints.is_empty() {
        let last: Vec<&str> = said.lines().take(30).collect();
        complaints.push(last.join("\n"));
        let log = place.node.as_ref().map(Node::log).unwrap_or_default();
        let loud = log.lines().filter(|line| line.contains("ERROR") || line.contains("WARN"));
        complaints.extend(loud.take(10).map(str::to_owned));
    }
    report.complaints.extend(complaints);
    left.is_empty() && place.since.elapsed() < NODE_MAX
}

#[test_matrix(["auto", "off"], ["uring", "dev"])]
fn the_suite_passes_on_the_mount(passthrough: &'static str, transport: &'static str) {
    run_all(Some((passthrough, transport)));
}

/// What the exceptions say of a bare file system is true.
#[test]
fn the_suite_passes_on_a_bare_file_system() {
    run_all(None);
}
