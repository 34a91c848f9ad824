//! `mount` with a real mount: the supervised process, signals and exit codes.

use std::fs;
use std::process::Command;

use nix::sys::signal::Signal;

use test_case::test_case;

use super::node::{Node, free_port, is_mounted, wait_for_file};
use super::{SIGNALS_IGNORED, STDERR_GONE};
use crate::support::wait;

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

/// It would keep the mount alive when litefs is gone, and its calls would wait for ever.
#[test]
fn the_application_inherits_nothing_of_the_mount() {
    code("ls -l /proc/self/fd >fds; ! grep -E 'io_uring|eventfd|/dev/fuse|socket' fds", 0);
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
        let script = "trap 'touch got; exit 0' TERM INT; touch up; while :; do :; done";
        let mut node = Node::start("", &["--", "sh", "-c", script]);
        wait_for_file(&node.path("up"));
        node.signal(signal);
        let got = node.path("got");
        wait_for_file(&got);
        assert_eq!(node.end().code(), Some(0));
    }
}

#[test]
fn other_signals_are_handed_on_and_end_nothing() {
    let names = ["HUP", "QUIT", "USR1", "USR2"];
    let traps = names.map(|name| format!("trap 'echo {name} >>got' {name}; ")).concat();
    let script = format!("{traps} trap 'exit 0' TERM; touch got up; while :; do :; done");
    let mut node = Node::start("", &["--", "bash", "-c", &script]);
    wait_for_file(&node.path("up"));
    let signals = [Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];
    for (signal, name) in signals.into_iter().zip(names) {
        node.signal(signal);
        wait::until_true(name, || fs::read_to_string(node.path("got")).unwrap().contains(name));
    }
    node.signal(Signal::SIGTERM);
    assert_eq!(node.end().code(), Some(0));
}

/// As under `nohup`: neither litefs nor its application dies of them.
#[test]
fn a_signal_that_is_ignored_at_the_start_ends_nothing() {
    let script = "trap 'exit 7' TERM; for name in HUP QUIT USR1; do kill -$name $$; done; \
                  touch up; while :; do :; done";
    let lease = "lease: {type: static}\n";
    let command = ["--", "sh", "-c", script];
    let mut node = Node::start_by(&SIGNALS_IGNORED, free_port(), lease, &command);
    wait_for_file(&node.path("up"));
    for signal in [Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1] {
        node.signal(signal);
    }
    node.signal(Signal::SIGTERM);
    assert_eq!(node.end().code(), Some(7));
}

/// There is no restart: who wants one has a service manager, which sees the exit code.
#[test]
fn a_process_that_ended_is_not_started_again() {
    let mut node = Node::start("", &["--", "sh", "-c", "echo run >>runs; exit 42"]);
    assert_eq!(node.end().code(), Some(42));
    assert_eq!(fs::read_to_string(node.path("runs")).unwrap(), "run\n");
}

#[test]
fn a_child_that_fails_on_the_signal_still_gets_a_clean_close() {
    let script = "trap 'exit 9' TERM; touch up; while :; do :; done";
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

#[test]
fn a_signal_has_its_effect_while_the_cluster_is_awaited() {
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let lease = format!("lease: {{type: static, candidate: false, advertise-url: '{nobody}'}}\n");
    let mut node = Node::start_by(&[], free_port(), &lease, &["--", "touch", "started"]);
    wait::until_true("the mount", || node.stderr().contains("LiteFS mounted to: "));
    node.signal(Signal::SIGTERM);
    assert_eq!(node.end().code(), Some(0));
    assert!(!node.path("started").exists());
}

#[test]
fn a_signal_has_its_effect_during_a_first_command() {
    let exec = "exec:\n  - cmd: sh -c 'touch up; while :; do :; done'\n  - cmd: touch started\n";
    let mut node = Node::start(exec, &[]);
    wait_for_file(&node.path("up"));
    node.signal(Signal::SIGTERM);
    assert_eq!(node.end().code(), Some(0));
    assert!(!node.path("started").exists());
}

#[test]
fn a_signal_has_its_effect_when_the_last_command_is_for_others() {
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let config = format!(
        "lease: {{type: static, candidate: false, advertise-url: '{nobody}'}}\nskip-sync: true\n\
         exec:\n  - cmd: touch first\n  - cmd: touch second\n    if-candidate: true\n"
    );
    let mut node = Node::start_by(&[], free_port(), &config, &[]);
    node.wait_for_line("waiting for signal");
    node.signal(Signal::SIGTERM);
    assert_eq!(node.end().code(), Some(0));
    assert!(node.path("first").exists() && !node.path("second").exists());
}

/// Scripts look for these lines.
#[test]
fn the_end_is_told_in_the_words_of_litefs() {
    let told = |node: &mut Node, lines: &[&str]| {
        lines.iter().for_each(|line| node.wait_for_line(line));
        node.end();
    };
    let ended = |how: &str| format!("subprocess exited {how}, litefs shutting down");
    for (script, line) in [
        ("exit 0", ended("successfully")),
        ("exit 42", ended("with error code 42")),
        ("kill -9 $$", ended("with error code -1")),
    ] {
        let mut node = Node::start("", &["--", "sh", "-c", script]);
        told(&mut node, &["LiteFS v", "waiting for signal or", &line]);
        let mount = node.path("mnt");
        for line in [
            &format!("LiteFS mounted to: {}", mount.display())[..],
            "no backup client configured, skipping",
            "no proxy target set, skipping proxy",
        ] {
            assert!(node.stderr().contains(&format!("level=INFO msg=\"{line}\"")), "{line}");
        }
    }
    let mut node = Node::start("", &["--", "sh", "-c", "touch up; while :; do :; done"]);
    wait_for_file(&node.path("up"));
    node.signal(Signal::SIGTERM);
    let lines = [
        "sending signal to exec process",
        "waiting for exec process to close",
        "signal received, litefs shutting down",
        "litefs shut down complete",
    ];
    told(&mut node, &lines);
}

#[test]
fn the_cluster_is_not_awaited_with_skip_sync() {
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let config = format!(
        "lease: {{type: static, candidate: false, advertise-url: '{nobody}'}}\nskip-sync: true\n"
    );
    let mut node = Node::start_by(&[], free_port(), &config, &["--", "sh", "-c", "exit 6"]);
    assert_eq!(node.end().code(), Some(6));
}

#[test]
fn a_node_can_stay_after_a_failed_start() {
    let mut node = Node::start("exit-on-error: false\n", &["--", "/nonexistent/app"]);
    node.wait_for_line("waiting for a signal");
    // The node works, so that one can look.
    let list = fs::read_dir(node.path("mnt")).unwrap();
    assert!(list.count() > 0);
    node.signal(Signal::SIGTERM);
    assert_eq!(node.end().code(), Some(1));
}

#[test]
fn a_failed_start_that_nobody_reads_of_is_closed_too() {
    let config = "lease: {type: static}\nexit-on-error: false\n";
    let command = ["--", "/nonexistent/app"];
    let mut node = Node::start_by(&STDERR_GONE, free_port(), config, &command);
    node.wait_for_line("waiting for a signal");
    node.signal(Signal::SIGTERM);
    assert_eq!(node.end().code(), Some(1));
}

/// Neither the log nor the trace can be written, nor can that be said.
#[test]
fn a_node_goes_on_without_any_log() {
    let config = "lease: {type: static}\ntracing: {path: /dev/full}\n";
    let command = ["--", "sh", "-c", "exit 6"];
    let mut node = Node::start_by(&STDERR_GONE, free_port(), config, &command);
    assert_eq!(node.end().code(), Some(6));
}

#[test]
fn a_busy_mount_is_an_error_and_stays_dead() {
    let mut node = Node::start("", &["--"]);
    node.wait_for_line("waiting for signal");
    let held = fs::File::create(node.path("mnt/app.db")).unwrap();
    node.signal(Signal::SIGTERM);
    assert_eq!(node.wait().code(), Some(1));
    assert!(is_mounted(&node.path("mnt")), "applications would find a plain directory");
    drop(held);
}

#[test]
fn a_port_in_use_is_named_before_anything_is_mounted() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut node = Node::start_by(&[], port, "lease: {type: static}\n", &["--"]);
    assert_eq!(node.end().code(), Some(1));
    assert!(!node.path("data").exists());
}

/// litefs where a process may have `soft` descriptors, and set itself a limit of up to `hard`.
fn start_limited(soft: u32, hard: u32, command: &[&str]) -> Node {
    let script = format!("ulimit -Sn {soft} && ulimit -Hn {hard} && exec \"$@\"");
    let by = ["sh", "-c", &script, "sh"];
    Node::start_by(&by, free_port(), "lease: {type: static}\n", command)
}

/// As with Go. An application that uses select(2) breaks with a high limit.
#[test]
fn litefs_has_more_descriptors_than_its_application() {
    let script = "grep 'open files' /proc/$PPID/limits >litefs; \
                  grep 'open files' /proc/self/limits >application; \
                  readlink /proc/self/fd/0 >stdin; ls -l /proc/self/fd >fds; \
                  ! grep -E 'io_uring|eventfd|/dev/fuse|socket' fds && exit 7";
    let mut node = start_limited(256, 4096, &["--", "sh", "-c", script]);
    assert_eq!(node.end().code(), Some(7));
    let read = |name: &str| fs::read_to_string(node.path(name)).unwrap();
    let limits = |name: &str| read(name).split_whitespace().skip(3).collect::<Vec<_>>().join(" ");
    assert_eq!(limits("litefs"), "4096 4096 files");
    assert_eq!(limits("application"), "256 4096 files");
    assert_eq!(read("stdin"), "/dev/null\n");
}

#[test]
fn a_program_that_cannot_start_is_named_under_any_limit() {
    for soft in [256, 4096] {
        let mut node = start_limited(soft, 4096, &["--", "/nonexistent/app"]);
        assert_eq!(node.end().code(), Some(1));
        let stderr = node.stderr();
        let error = "ERROR: cannot exec: background cmd: cannot start exec command \
                     \"/nonexistent/app\": No such file or directory (os error 2)";
        assert_eq!(stderr.matches("ERROR: ").count(), 1, "{stderr}");
        assert_eq!(stderr.lines().last(), Some(error), "{stderr}");
    }
}

/// Databases need some too.
#[test]
fn connections_to_the_api_leave_descriptors_for_databases() {
    let mut node = start_limited(400, 400, &["--"]);
    node.wait_for_line("waiting for signal");
    let address = node.url().replace("http://", "");
    let connections: Vec<_> =
        (0..100).map(|_| std::net::TcpStream::connect(&address).unwrap()).collect();
    wait::until_true("a refusal", || node.stderr().contains("msg=\"too many connections\""));
    let database = rusqlite::Connection::open(node.path("mnt/app.db")).unwrap();
    database.execute_batch("create table t (x); insert into t values (7)").unwrap();
    drop((database, connections));
    node.signal(Signal::SIGTERM);
    assert_eq!(node.end().code(), Some(0));
}

/// Where the resolver gives `::1` first, who asks at 127.0.0.1 finds the node too, as with LiteFS.
#[test]
fn a_name_with_addresses_of_both_kinds_is_one_of_ipv4() {
    let port = free_port();
    let script = "printf '::1 here\\n127.0.0.1 here\\n' >hosts && \
                  mount --bind hosts /etc/hosts && exec \"$@\"";
    let by = ["unshare", "--mount", "sh", "-c", script, "sh"];
    let config = format!(
        "lease: {{type: static}}\n\
         proxy: {{addr: 'here:{port}', target: '127.0.0.1:1', db: app.db}}\n"
    );
    let mut node = Node::start_by(&by, free_port(), &config, &["--"]);
    node.wait_for_line("waiting for signal");
    std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    node.signal(Signal::SIGTERM);
    assert_eq!(node.end().code(), Some(0));
}

#[test]
fn a_replica_without_the_primarys_url_does_not_start() {
    let lease = "lease: {type: static, candidate: false, advertise-url: 'a:20202'}\n";
    let mut node = Node::start_by(&[], free_port(), lease, &["--"]);
    assert_eq!(node.end().code(), Some(2));
    assert!(!node.path("data").exists());
    let stderr = node.stderr();
    assert!(stderr.contains(":4: lease.advertise-url must be the primary's URL, got"), "{stderr}");
}

#[test]
fn a_setting_without_effect_is_named() {
    let lease = "lease: {type: static, demote-delay: 1s}\n";
    let mut node = Node::start_by(&[], free_port(), lease, &["--", "true"]);
    assert_eq!(node.end().code(), Some(0));
    let stderr = node.stderr();
    assert!(stderr.contains("lease.demote-delay has no effect"), "{stderr}");
}

/// Through whatever links: litefs would wait for itself.
#[test]
fn a_mount_over_its_own_databases_is_refused() {
    for target in [".", "data", "data/dbs"] {
        let script = format!("mkdir -p data/dbs && ln -s {target} mnt && exec \"$@\"");
        let by = ["sh", "-c", &script, "sh"];
        let mut node = Node::start_by(&by, free_port(), "lease: {type: static}\n", &["--", "true"]);
        assert_eq!(node.end().code(), Some(1), "{target}");
        let stderr = node.stderr();
        assert!(stderr.contains("would hide the databases in data.dir"), "{target}: {stderr}");
    }
}

/// In a process namespace of its own, litefs is process 1 and inherits what others leave behind.
#[test]
fn process_1_collects_orphans() {
    let script = "sh -c 'true & echo $! >orphan'; \
                  while [ -e /proc/$(cat orphan) ]; do :; done; exit 5";
    let port = free_port();
    let by = ["unshare", "--pid", "--fork", "--mount-proc"];
    let config = "lease: {type: static}\n";
    let mut node = Node::start_by(&by, port, config, &["--", "sh", "-c", script]);
    assert_eq!(node.end().code(), Some(5));
}

/// So it does while it has no application. A child from before it began leaves an orphan behind once it is told
/// to, and ends litefs when that has been collected.
#[test_case("", &["--"], 0; "without an application")]
#[test_case("exit-on-error: false\n", &["--", "/nonexistent/app"], 1; "after a failed start")]
fn process_1_collects_orphans_without_an_application(more: &str, command: &[&str], code: i32) {
    let helper = "while [ ! -e go ]; do :; done; \
                  sh -c '(while [ ! -e end ]; do :; done) & echo $! >orphan'; touch end; \
                  while [ -e /proc/$(cat orphan) ]; do :; done; kill -TERM 1";
    let script = format!("({helper}) & exec \"$@\"");
    let namespace = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let by = [&namespace, &["sh", "-c", &script, "sh"][..]].concat();
    let config = format!("lease: {{type: static}}\n{more}");
    let mut node = Node::start_by(&by, free_port(), &config, command);
    node.wait_for_line("waiting for");
    fs::write(node.path("go"), "").unwrap();
    assert_eq!(node.end().code(), Some(code));
}

/// What an application has started itself is its own to end: a signal goes to the application alone. One
/// that stays and uses the mount is named; the mount stays with it, dead.
#[test]
fn what_the_application_left_behind_is_not_signalled() {
    // It ends by itself after some minutes, whatever becomes of this test.
    let script = "bash -c 'trap \"touch signalled\" TERM; exec 3<>mnt/app.db; echo $$ >left; \
                  for n in {1..200}; do [ -e end ] && break; read -t 1 x <>fifo || :; done' & \
                  trap 'exit 0' TERM; while [ ! -e left ]; do :; done; touch up; while :; do :; done";
    let mut node = Node::start("", &["--", "bash", "-c", &format!("mkfifo fifo; {script}")]);
    wait_for_file(&node.path("up"));
    node.signal(Signal::SIGTERM);
    assert_eq!(node.wait().code(), Some(1), "the mount was in use");
    assert!(!node.path("signalled").exists());
    let left = fs::read_to_string(node.path("left")).unwrap();
    let (stderr, pid) = (node.stderr(), left.trim());
    assert!(is_alive(pid), "it was not killed either");
    let user = format!(": bash (process {pid}) has app.db open\n");
    let complaint = stderr.lines().last().unwrap_or_default().to_owned() + "\n";
    assert!(complaint.starts_with("ERROR: unmount: ") && complaint.ends_with(&user), "{stderr}");
    fs::write(node.path("end"), "").unwrap();
    wait::until_true("its end", || !is_alive(pid));
}

/// Whether a process goes on. One that has ended stays as a zombie where process 1 collects no orphans.
fn is_alive(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with(['Z', 'X']))
}

#[test]
fn the_trace_has_what_the_log_leaves_out() {
    let mut node = Node::start("tracing: {path: traces/t.log}\n", &["-tracing", "--", "true"]);
    // The same line on stdout, with its time.
    node.wait_for_line("time=");
    assert_eq!(node.end().code(), Some(0));
    let trace = fs::read_to_string(node.path("traces/t.log")).unwrap();
    assert!(trace.contains("level=INFO msg=\"connected to cluster, ready\"\n"), "{trace}");
    assert!(trace.lines().all(|line| line.starts_with("time=20")), "{trace}");
}
