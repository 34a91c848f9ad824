//! The command line: the real program, its output and its exit codes.

use std::process::{Command, Output};

use crate::support::program;

mod client;
mod config;
mod mount;
mod node;
mod packaging;
mod run;
mod usage;

/// Runs the program and waits for it. Its working directory and home are `/`, where no
/// configuration file is found.
fn litefs(arguments: &[&str]) -> Output {
    let mut command = Command::new(program::litefs());
    program::output(command.args(arguments).current_dir("/").env("HOME", "/")).unwrap()
}

/// Before the program and its arguments: begins them with a stderr whose reader has gone. A pipe with a name
/// is opened for both, so that nothing waits, then for writing, and nobody is left who reads.
const STDERR_GONE: [&str; 4] =
    ["sh", "-c", "mkfifo gone; exec 3<>gone 2>gone 3<&-; exec \"$@\"", "sh"];

/// Before the program and its arguments: begins them with signals ignored, as `nohup` and a shell's `&` do.
const SIGNALS_IGNORED: [&str; 4] = ["sh", "-c", "trap '' HUP INT QUIT USR1; exec \"$@\"", "sh"];

/// Before the program and its arguments: begins them with no signal ignored, however the tests were begun.
const SIGNALS_HEEDED: [&str; 2] = ["env", "--default-signal=HUP,INT,QUIT,USR1,USR2"];

/// What a run must give.
struct Expected<'a> {
    code: i32,
    stdout: &'a str,
    stderr: &'a str,
}

#[track_caller]
fn check(arguments: &[&str], expected: Expected<'_>) {
    let output = litefs(arguments);
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    assert_eq!(text(&output.stderr), expected.stderr, "{arguments:?}");
    assert_eq!(text(&output.stdout), expected.stdout, "{arguments:?}");
    assert_eq!(output.status.code(), Some(expected.code), "{arguments:?}");
}
