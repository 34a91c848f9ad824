//! `litefs run`, but for the HALT lock, which needs a cluster.

use std::fs;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use test_case::test_case;

use super::node::{Node, free_port, wait_for_file};
use super::{Expected, SIGNALS_HEEDED, SIGNALS_IGNORED, STDERR_GONE, check, litefs};
use crate::support::{program, wait};

/// Runs the words in a shell under `litefs run`.
fn shell(script: &str) -> Vec<&str> {
    vec!["run", "--", "sh", "-c", script]
}

#[test_case("exit 0", 0, "")]
#[test_case("exit 7", 7, "ERROR: exit status 7\n")]
#[test_case("exit 255", 255, "ERROR: exit status 255\n")]
#[test_case("kill -TERM $$", 143, "ERROR: signal: SIGTERM\n")]
#[test_case("kill -KILL $$", 137, "ERROR: signal: SIGKILL\n")]
fn the_exit_code_is_the_commands(script: &str, code: i32, stderr: &str) {
    check(&shell(script), Expected { code, stdout: "", stderr });
}

#[test]
fn a_command_gets_its_words_and_its_streams() {
    let script = "printf '%s|' \"$0\" \"$@\"; cat; echo problem >&2; echo $WORD";
    let mut command = Command::new(program::litefs());
    command.args(["run", "--", "sh", "-c", script, "a b", "--", "$c"]).env("WORD", "inherited");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"from stdin\n").unwrap();
    let output = program::finish(child);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "a b|--|$c|from stdin\ninherited\n");
    assert_eq!(output.stderr, b"problem\n");
    assert!(output.status.success());
}

#[test]
fn mistakes_of_a_run_are_named() {
    assert_eq!(litefs(&["run"]).status.code(), Some(2));
    assert_eq!(litefs(&["run", "-promote"]).status.code(), Some(2));
    assert_eq!(litefs(&["run", "-promote", "--"]).status.code(), Some(2));
    let fails =
        |words: &[&str], stderr: &str| check(words, Expected { code: 1, stdout: "", stderr });
    let many = "ERROR: too many arguments, specify a '--' to specify an exec command\n";
    fails(&["run", "true"], many);
    fails(&["run", "x", "--", "true"], many);
    let both = "ERROR: cannot specify both -promote & -with-halt-lock-on\n";
    fails(&["run", "-promote", "-with-halt-lock-on", "/x", "--", "true"], both);
    let none = "ERROR: database does not exist: /no/such.db\n";
    fails(&["run", "-with-halt-lock-on", "/no/such.db", "--", "true"], none);
    let missing = "ERROR: cannot start exec command \"/no/program\": No such file or directory \
                   (os error 2)\n";
    fails(&["run", "--", "/no/program"], missing);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.db");
    fs::write(&path, "").unwrap();
    let no_mount = format!(
        "ERROR: lock file not available, are you sure \"{}\" is a LiteFS mount?\n",
        dir.path().display()
    );
    fails(&["run", "-with-halt-lock-on", path.to_str().unwrap(), "--", "true"], &no_mount);
}

/// Starts `litefs run` on a script that reports in files of `dir`.
fn start(dir: &std::path::Path, script: &str) -> Child {
    let words = [&SIGNALS_HEEDED, &[program::litefs()][..], &shell(script)].concat();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).current_dir(dir).stdin(Stdio::null());
    command.stderr(Stdio::null()).spawn().unwrap()
}

#[test_case(Signal::SIGTERM, "TERM")]
#[test_case(Signal::SIGINT, "INT")]
#[test_case(Signal::SIGHUP, "HUP")]
#[test_case(Signal::SIGQUIT, "QUIT")]
#[test_case(Signal::SIGUSR1, "USR1")]
#[test_case(Signal::SIGUSR2, "USR2")]
fn a_signal_goes_on_to_the_command(signal: Signal, name: &str) {
    let dir = tempfile::tempdir().unwrap();
    // A shell looks for signals between commands; one that comes in the moment before it waits for
    // something is forgotten until that has come.
    let script = format!("trap 'exit 9' {name}; touch ready; while :; do :; done");
    let mut child = start(dir.path(), &script);
    wait_for_file(&dir.path().join("ready"));
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
    let ended = wait::until("the end of the command", || child.try_wait().unwrap());
    assert_eq!(ended.code(), Some(9));
}

/// A handler would be the default in the command, and that is to die of them.
#[test]
fn a_signal_that_is_ignored_stays_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let signals = "for name in HUP QUIT USR1; do kill -$name $$; kill -$name $PPID; done";
    let words = [&SIGNALS_IGNORED, &[program::litefs()][..], &shell(signals)].concat();
    let mut command = Command::new(words[0]);
    let output = program::output(command.args(&words[1..]).current_dir(dir.path())).unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
}

/// As in `litefs run -- CMD 2>&1 | head -1`.
#[test_case(&["run", "--", "sh", "-c", "exit 7"], 7)]
#[test_case(&["run", "--", "sh", "-c", "kill -TERM $$"], 143)]
#[test_case(&["run", "--", "/no/program"], 1)]
#[test_case(&["mount", "-frob"], 2)]
fn the_exit_code_needs_no_reader_of_stderr(arguments: &[&str], code: i32) {
    let dir = tempfile::tempdir().unwrap();
    let words = [&STDERR_GONE, &[program::litefs()][..], arguments].concat();
    let mut command = Command::new(words[0]);
    let output = program::output(command.args(&words[1..]).current_dir(dir.path())).unwrap();
    assert_eq!(output.status.code(), Some(code));
}

/// Only the flags that ask the node something need what leads to it.
#[test]
fn a_command_alone_needs_no_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("litefs.yml");
    let tls = "http: {tls: {ca: /no/ca, cert: /no/cert, key: /no/key}}\n";
    let lease = "lease: {type: static, advertise-url: 'https://a:20202'}\n";
    fs::write(&path, format!("{tls}{lease}")).unwrap();
    let run = |flags: &[&str]| {
        let config = ["run", "-config", path.to_str().unwrap()];
        let output = litefs(&[&config, flags, &["--", "echo", "ran"]].concat());
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    assert_eq!(run(&[]), (Some(0), "ran\n".to_owned()));
    for flag in ["-promote", "-if-candidate"] {
        assert_eq!(run(&[flag]), (Some(1), String::new()));
    }
}

#[test]
fn a_command_runs_on_a_candidate_only() {
    let port = free_port();
    let replica = "lease: {type: static, hostname: a, candidate: false, \
                   advertise-url: 'http://127.0.0.1:1'}\nskip-sync: true";
    let mut node = Node::start_by(&[], port, replica, &["--"]);
    node.wait_for_line("waiting for signal");
    let url = node.url();
    let words = |flag| ["run", "-url", &url, flag, "--", "echo", "ran"].map(str::to_owned);
    let run = |flag| litefs(&words(flag).each_ref().map(String::as_str));
    let output = run("-if-candidate");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(output.stderr, b"node is not a candidate, skipping execution\n");
    assert_eq!(output.stdout, b"");
    let output = run("-if-candidate=false");
    assert_eq!(output.stdout, b"ran\n");
    node.signal(Signal::SIGTERM);
    assert_eq!(node.end().code(), Some(0));
}

#[test]
fn a_primary_is_not_promoted() {
    let mut node = Node::start("", &["--"]);
    node.wait_for_line("waiting for signal");
    let output = litefs(&[
        "run",
        "-url",
        &node.url(),
        "-if-candidate",
        "-promote",
        "-v",
        "--",
        "echo",
        "ran",
    ]);
    assert_eq!(output.stdout, b"ran\n");
    let stderr = String::from_utf8(output.stderr).unwrap();
    let expected = ["fetching node metadata", "node is already primary, skipping promotion"];
    let expected = expected.map(|text| format!("level=INFO msg=\"{text}\"\n")).concat();
    assert_eq!(stderr, expected);
    node.signal(Signal::SIGTERM);
    assert_eq!(node.end().code(), Some(0));
}

#[test]
fn a_node_that_does_not_answer_runs_nothing() {
    let url = format!("http://127.0.0.1:{}", free_port());
    for flag in ["-promote", "-if-candidate"] {
        let output = litefs(&["run", "-url", &url, flag, "--", "echo", "ran"]);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.starts_with("ERROR: fetch node metadata: connect to "), "{stderr}");
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
    }
}
