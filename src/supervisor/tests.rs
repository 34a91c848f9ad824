//! Real children, asked to end from within. Signals from outside: `tests/cli`.

use std::path::Path;

use super::*;
use crate::config::split_words;

fn command(line: &str) -> Command {
    Command { words: split_words(line).unwrap(), if_candidate: false }
}

/// Runs commands; `asked` gets the stopper.
fn run(
    commands: &[Command],
    candidate: Candidate,
    asked: impl FnOnce(Stopper),
) -> Result<Ending, Error> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().unwrap().block_on(async {
        let mut signals = Signals::listen().unwrap();
        asked(signals.stopper());
        let environment = Environment::from([("HOSTNAME", "node-7")]);
        let mut supervisor = Supervisor {
            signals: &mut signals,
            environment: &environment,
            candidate,
            descriptors: None,
        };
        supervisor.run(commands).await
    })
}

#[track_caller]
fn check(lines: &[&str], expected: Result<Ending, &str>) {
    let commands: Vec<_> = lines.iter().map(|line| command(line)).collect();
    let result = run(&commands, Candidate::Yes, |_| ());
    assert_eq!(result.map_err(|error| error.to_string()), expected.map_err(str::to_owned));
}

#[test]
fn ignored_signals_are_found_in_the_status() {
    let status =
        "Name:\tlitefs\nSigBlk:\tffffffffffffffff\nSigIgn:\t0000000000001005\nSigCgt:\t0\n";
    assert_eq!(ignored(status), 1 << 12 | 1 << 2 | 1);
    assert_eq!(ignored("SigIgn:\tx\n"), 0);
    assert_eq!(ignored(""), 0);
}

#[test]
fn the_code_of_the_process_is_passed_on() {
    check(&["true"], Ok(Ending::Process(0)));
    check(&["sh -c 'exit 7'"], Ok(Ending::Process(7)));
    check(&["sh -c 'kill -9 $$'"], Ok(Ending::Process(255)));
}

#[test]
fn commands_run_in_order_until_one_fails() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let say = |word: &str| format!("sh -c 'echo {word}-$HOSTNAME >>{}'", log.display());
    check(&[&say("a"), &say("b")], Ok(Ending::Process(0)));
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "a-node-7\nb-node-7\n");
    let failed = "cannot exec: sync cmd: cannot run command \"sh\": exit status 3";
    check(&["sh -c 'exit 3'", &say("c")], Err(failed));
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "a-node-7\nb-node-7\n");
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let program = "\"/nonexistent/app\"";
    let sync = format!("cannot exec: sync cmd: cannot start exec command {program}");
    check(&["/nonexistent/app", "true"], Err(&sync));
    let background = format!("cannot exec: background cmd: cannot start exec command {program}");
    check(&["/nonexistent/app"], Err(&background));
}

#[test]
fn candidate_commands_are_skipped_elsewhere() {
    let migrate = Command { if_candidate: true, ..command("false") };
    let commands = [migrate, command("sh -c 'exit 4'")];
    assert_eq!(run(&commands, Candidate::No, |_| ()).unwrap(), Ending::Process(4));
    assert!(run(&commands, Candidate::Yes, |_| ()).is_err());
}

#[test]
fn without_a_last_command_the_signal_is_awaited() {
    assert_eq!(run(&[], Candidate::Yes, |stopper| stopper.stop()).unwrap(), Ending::Signal(0));
    let skipped = Command { if_candidate: true, ..command("true") };
    let ending = run(&[skipped], Candidate::No, |stopper| stopper.stop()).unwrap();
    assert_eq!(ending, Ending::Signal(0));
}

/// Runs a child that says in a file that it is ready, then asks it to end `times` times.
fn ask(script: &str, times: usize) -> Ending {
    let dir = tempfile::tempdir().unwrap();
    let ready = dir.path().join("ready");
    let line = format!(
        "sh -c '{script}; touch {}; while :; do read x <{}; done'",
        ready.display(),
        fifo(dir.path())
    );
    let asker = |stopper: Stopper| {
        let ready = ready.clone();
        std::thread::spawn(move || {
            let deadline = std::time::Instant::now() + Duration::from_secs(20);
            while !ready.exists() {
                assert!(std::time::Instant::now() < deadline, "the child did not start");
                std::thread::yield_now();
            }
            for _ in 0..times {
                // A channel of one: the next request is taken once this one was.
                stopper.0.blocking_send(()).unwrap();
            }
        });
    };
    run(&[command(&line)], Candidate::Yes, asker).unwrap()
}

/// A pipe that nobody writes to, for a shell to wait on.
fn fifo(dir: &Path) -> String {
    let path = dir.join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_child_that_dies_of_the_signal_is_a_success() {
    assert_eq!(ask("true", 1), Ending::Signal(0));
}

#[test]
fn a_failure_after_the_signal_is_passed_on() {
    assert_eq!(ask("trap \"exit 5\" TERM", 1), Ending::Signal(5));
}

#[test]
fn a_child_that_does_not_listen_is_killed_in_the_end() {
    assert_eq!(ask("trap \"\" TERM", 3), Ending::Signal(0));
}
