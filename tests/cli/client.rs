//! `export`, `import` and `status` where there is nothing to talk to, or nothing to send.

use std::fs;
use std::net::TcpListener;

use super::litefs;

/// A URL where nobody answers: the port was free a moment ago.
fn nobody() -> String {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    format!("http://127.0.0.1:{port}")
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
