//! `export`, `import` and `status`, with a node and without one.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::Signal;

use super::litefs;
use super::node::{Node, free_port};
use crate::support::{program, wait};

/// A URL where nobody answers.
fn nobody() -> String {
    format!("http://127.0.0.1:{}", free_port())
}

fn database(path: &Path, row: i64) {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection.execute_batch(&format!("create table t(x); insert into t values ({row})")).unwrap();
}

fn row(path: &Path) -> i64 {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection.query_row("select x from t", [], |row| row.get(0)).unwrap()
}

#[track_caller]
fn works(arguments: &[&str]) -> String {
    let output = litefs(arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert_eq!(stderr, "", "{arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_database_goes_in_and_comes_out_again() {
    let mut node = Node::start("", &["--"]);
    node.wait_for_line("waiting for signal");
    let (url, new, out) = (node.url(), node.path("new.db"), node.path("out.db"));
    database(&new, 7);
    let said = works(&["import", "-url", &url, "-name", "app.db", new.to_str().unwrap()]);
    assert!(said.starts_with("Import of database \"app.db\" in "), "{said}");
    assert_eq!(row(&node.path("mnt/app.db")), 7);

    // The old file's WAL would be applied to the new one.
    database(&out, 8);
    fs::write(node.path("out.db-wal"), "old").unwrap();
    let said = works(&["export", "-url", &url, "-name", "app.db", out.to_str().unwrap()]);
    assert!(said.starts_with("Export of database \"app.db\" in "), "{said}");
    assert!(!node.path("out.db-wal").exists() && !node.path("out.db.tmp").exists());
    assert_eq!(row(&out), 7);
    node.signal(Signal::SIGTERM);
    assert_eq!(node.end().code(), Some(0));
}

#[test]
fn an_unknown_database_is_not_exported() {
    let mut node = Node::start("", &["--"]);
    node.wait_for_line("waiting for signal");
    let out = node.path("out.db");
    database(&out, 8);
    fails(
        &["export", "-url", &node.url(), "-name", "x", out.to_str().unwrap()],
        "database not found",
    );
    assert_eq!(row(&out), 8);
}

#[test]
fn status_shows_the_node_and_its_databases() {
    let mut node = Node::start("", &["--"]);
    node.wait_for_line("waiting for signal");
    database(&node.path("mnt/app.db"), 1);
    let table = works(&["status", "-url", &node.url()]);
    assert!(table.contains("\nrole:       primary\n"), "{table}");
    assert!(table.contains("\napp.db    0000000000000002/"), "{table}");
    let json = works(&["status", "-json", "-url", &node.url()]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["databases"][0]["name"], "app.db");
}

#[track_caller]
fn fails(arguments: &[&str], part: &str) {
    let output = litefs(arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("ERROR: ") && stderr.contains(part), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

#[test]
fn a_bad_url_is_named() {
    fails(&["status", "-url", "localhost:20202"], "invalid URL scheme");
    fails(&["status", "-url", "http://"], "URL host required");
}

#[test]
fn a_node_that_is_not_there_is_named() {
    let url = nobody();
    let address = url.strip_prefix("http://").unwrap();
    fails(&["status", "-url", &url], &format!("connect to {address}: Connection refused"));
}

#[test]
fn a_failed_export_leaves_the_old_file_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.db");
    for name in ["app.db", "app.db-wal", "app.db-journal"] {
        fs::write(dir.path().join(name), "old").unwrap();
    }
    let url = nobody();
    fails(&["export", "-url", &url, "-name", "app.db", path.to_str().unwrap()], "connect to");
    for name in ["app.db", "app.db-wal", "app.db-journal"] {
        assert_eq!(fs::read(dir.path().join(name)).unwrap(), b"old");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
}

#[test]
fn what_is_no_database_is_not_sent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notes.txt");
    fs::write(&path, "dear diary").unwrap();
    let path = path.to_str().unwrap();
    fails(&["import", "-url", &nobody(), "-name", "x", path], "is not a SQLite database");
}

/// An import that reads stdin, which is a pipe.
fn begin_import(node: &Node, name: &str) -> Child {
    let mut command = Command::new(program::litefs());
    command.args(["import", "-url", &node.url(), "-name", name, "/dev/stdin"]);
    command.current_dir("/").env("HOME", "/").stdin(Stdio::piped());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Imports what comes through a pipe.
fn import_piped(node: &Node, name: &str, content: &[u8]) -> Output {
    let mut import = begin_import(node, name);
    // One that is refused is not read to its end.
    let _ = import.stdin.take().unwrap().write_all(content);
    program::finish(import)
}

#[test]
fn a_database_comes_in_through_a_pipe_whole_or_not_at_all() {
    let mut node = Node::start("", &["--"]);
    node.wait_for_line("waiting for signal");
    let new = node.path("new.db");
    database(&new, 7);
    // As long as one piece of an upload. Pages that the header does not count do no harm.
    let mut content = fs::read(&new).unwrap();
    content.resize(256 << 10, 0);
    let output = import_piped(&node, "app.db", &content);
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
    assert_eq!(row(&node.path("mnt/app.db")), 7);

    let refused = |content: &[u8], part: &str| {
        let output = import_piped(&node, "app.db", content);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.starts_with("ERROR: ") && stderr.contains(part), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    };
    refused(b"", "/dev/stdin is not a SQLite database");
    refused(&content[..4096], "is cut off: its header counts 2 pages");
    refused(&content[..8191], "is cut off: its header counts 2 pages");

    // All of a database has come, and not the end of it.
    database(&node.path("other.db"), 8);
    content[..8192].copy_from_slice(&fs::read(node.path("other.db")).unwrap());
    let mut import = begin_import(&node, "app.db");
    import.stdin.as_mut().unwrap().write_all(&content).unwrap();
    let arrived = |file: fs::DirEntry| file.metadata().is_ok_and(|file| file.len() == 256 << 10);
    wait::until_true("the upload", || {
        fs::read_dir(node.path("data/spool")).unwrap().any(|file| arrived(file.unwrap()))
    });
    import.kill().unwrap();
    import.wait().unwrap();
    wait::until_true("the refusal", || node.stderr().contains("error=\"read upload: "));
    assert_eq!(row(&node.path("mnt/app.db")), 7);
    node.signal(Signal::SIGTERM);
    assert_eq!(node.end().code(), Some(0));
}

/// Whoever writes to the pipe may have nothing more for long.
#[test]
fn a_refusal_does_not_wait_for_the_end_of_a_pipe() {
    let mut node = Node::start("", &["--"]);
    node.wait_for_line("waiting for signal");
    let new = node.path("new.db");
    database(&new, 7);
    let mut import = begin_import(&node, "../app.db");
    let mut pipe = import.stdin.take().unwrap();
    pipe.write_all(&fs::read(&new).unwrap()).unwrap();
    let output = program::finish(import);
    drop(pipe);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("invalid database name"), "{stderr}");
}

/// A node at another port than the usual one is found by its configuration file.
#[test]
fn a_node_is_found_by_its_own_file() {
    let mut node = Node::start("", &["--"]);
    node.wait_for_line("waiting for signal");
    let (file, new, out) = (node.path("litefs.yml"), node.path("new.db"), node.path("out.db"));
    let file = file.to_str().unwrap();
    database(&new, 7);
    works(&["import", "-config", file, "-name", "app.db", new.to_str().unwrap()]);
    works(&["export", "-config", file, "-name", "app.db", out.to_str().unwrap()]);
    assert_eq!(row(&out), 7);
    let table = works(&["status", "-config", file]);
    assert!(table.contains("\napp.db "), "{table}");
    let output = litefs(&["run", "-config", file, "-promote", "--", "echo", "ran"]);
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"ran\n"[..]));
    // An empty name is none.
    works(&["status", "-config=", "-url", &node.url()]);
    // What is said to be elsewhere is looked for there.
    fails(&["status", "-config", file, "-url", &nobody()], "Connection refused");
}

/// `$` in a token is a `$` where `mount` took it for one.
#[test]
fn every_command_can_take_the_file_literally() {
    let port = free_port();
    let config = format!(
        "lease: {{type: static, hostname: a, advertise-url: 'http://127.0.0.1:{port}'}}\n\
         http: {{addr: '127.0.0.1:{port}', auth-token: 'pa$word'}}\n"
    );
    let mut node = Node::start_by(&[], port, &config, &["-no-expand-env", "--"]);
    node.wait_for_line("waiting for signal");
    let (file, new, out) = (node.path("litefs.yml"), node.path("new.db"), node.path("out.db"));
    let literally = ["-config", file.to_str().unwrap(), "-no-expand-env"];
    let works = |command: &str, rest: &[&str]| works(&[&[command], &literally[..], rest].concat());
    database(&new, 7);
    works("import", &["-name", "app.db", new.to_str().unwrap()]);
    works("export", &["-name", "app.db", out.to_str().unwrap()]);
    works("status", &[]);
    works("promote", &[]);
    assert_eq!(works("run", &["-promote", "--", "echo", "ran"]), "ran\n");
    fails(&["status", "-config", file.to_str().unwrap()], "401");
}
