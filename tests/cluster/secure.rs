//! Nodes that speak TLS to each other and want a token.

use std::path::Path;
use std::process::{Command, Output};

use test_case::test_case;

use super::sqlite;
use crate::support::certificates::{Certificates, TOKEN, leak};
use crate::support::node::{Member, Node, Settings};
use crate::support::program;

/// What every caller may ask for who has the token.
const PATHS: [&str; 6] = ["/", "/info", "/status", "/metrics", "/export?name=app.db", "/events"];

fn with_http(http: &'static str) -> Settings {
    Settings { http, ..Settings::default() }
}

/// A request by curl, with these arguments: the status, 0 without an answer, and the text.
fn curl(arguments: &[&str], url: &str) -> (u16, String) {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--max-time", "20", "--write-out", "\n%{http_code}"]);
    // Events go on for ever; the head is enough.
    command.args(["--range", "0-0", "--output", "-"]).args(arguments).arg(url);
    let output = program::output(&mut command).unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (text, status) = text.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), text.to_owned())
}

fn litefs(arguments: &[&str]) -> Output {
    let mut command = Command::new(program::litefs());
    program::output(command.args(arguments).current_dir("/").env("HOME", "/")).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn path_text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn nodes_with_certificates_and_a_token_replicate() {
    let certificates = Certificates::new();
    let settings = with_http(certificates.http(""));
    let primary = Node::primary(&settings);
    let mut replica = Node::new(&settings, Member::Replica(&primary.url()));
    replica.start();
    sqlite::run(&primary.file("app.db"), "create table t(x); insert into t values (7)");
    replica.wait_for_pos("app.db", primary.pos("app.db"));
    assert_eq!(sqlite::run(&replica.file("app.db"), "select x from t"), "7");

    // The command line finds both in the node's own file.
    let config = replica.scratch("litefs.yml");
    let url = replica.url();
    let status = litefs(&["status", "-url", &url, "-config", path_text(&config)]);
    assert!(status.status.success(), "{}", stderr(&status));
    assert!(String::from_utf8_lossy(&status.stdout).contains("replica"));
    let stranger = litefs(&["status", "-url", &url]);
    assert_eq!(stranger.status.code(), Some(1));
    assert!(stderr(&stranger).starts_with("ERROR: connect to 127.0.0.1:"), "{}", stderr(&stranger));
}

#[test]
fn without_a_certificate_nobody_gets_in_and_in_the_clear_nobody_is_answered() {
    let certificates = Certificates::new();
    let node = Node::primary(&with_http(certificates.http("")));
    let [ca, cert, key] = ["ca", "cert", "key"].map(|name| certificates.file(name));
    let bearer = format!("Authorization: Bearer {TOKEN}");
    let info = format!("{}/info", node.url());
    let known = ["--cacert", path_text(&ca), "--cert", path_text(&cert), "--key", path_text(&key)];
    assert_eq!(curl(&[&known[..], &["-H", &bearer]].concat(), &info).0, 200);
    assert_eq!(curl(&known, &info).0, 401);
    assert_eq!(curl(&["--cacert", path_text(&ca), "-H", &bearer], &info).0, 0);
    let (status, text) = curl(&["-H", &bearer], &info.replace("https", "http"));
    assert_eq!((status, text.trim()), (400, "this node answers https:// only"));
}

#[test]
fn a_token_is_asked_for_on_every_path() {
    let node = Node::primary(&with_http(leak(format!(", auth-token: {TOKEN}"))));
    sqlite::run(&node.file("app.db"), "create table t(x)");
    let bearer = format!("Authorization: Bearer {TOKEN}");
    let wrong = format!("Authorization: Bearer {TOKEN}x");
    for path in PATHS {
        let url = format!("{}{path}", node.url());
        for arguments in [&[][..], &["-H", &wrong], &["--user", "name:wrong"]] {
            assert_eq!(curl(arguments, &url).0, 401, "{path} {arguments:?}");
        }
        if path != "/events" {
            assert_eq!(curl(&["-H", &bearer], &url).0, 200, "{path}");
            assert_eq!(curl(&["--user", &format!("me:{TOKEN}")], &url).0, 200, "{path}");
        }
    }
    for (path, method) in [("/import?name=a", "POST"), ("/promote", "POST"), ("/nothing", "GET")] {
        assert_eq!(curl(&["-X", method], &format!("{}{path}", node.url())).0, 401, "{path}");
    }
    assert!(!node.log().contains(TOKEN), "the token is in the log");
}

#[test]
fn a_replica_without_the_token_gets_nothing_and_says_why() {
    let primary = Node::primary(&with_http(leak(format!(", auth-token: {TOKEN}"))));
    sqlite::run(&primary.file("app.db"), "create table t(x)");
    let mut replica = Node::new(&Settings::default(), Member::Replica(&primary.url()));
    replica.spawn();
    replica.wait_for_log("code=401: token missing or wrong");
    assert!(replica.databases().is_empty());
}

#[test_case(", auth-token: other"; "another token")]
#[test_case(""; "no token and no certificate")]
fn both_kinds_of_callers_are_let_in_during_a_change_over(http: &'static str) {
    let certificates = Certificates::new();
    let primary = Node::primary(&with_http(certificates.http(", allow-insecure: true")));
    let plain = primary.url().replace("https", "http");
    let mut replica = Node::new(&with_http(http), Member::Replica(&plain));
    replica.start();
    sqlite::run(&primary.file("app.db"), "create table t(x)");
    replica.wait_for_pos("app.db", primary.pos("app.db"));
}

#[test]
fn certificates_that_are_not_there_are_named() {
    let http = ", tls: {ca: /no/ca, cert: /no/cert, key: /no/key}";
    let mut node = Node::new(&with_http(http), Member::Primary);
    node.spawn();
    node.wait_for_log("read certificate /no/");
}
