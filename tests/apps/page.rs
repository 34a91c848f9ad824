//! The status page in a real browser.

use std::fs;
use std::process::Command;

use super::{Pair, run};
use crate::support::node::{Member, Node, Settings};
use crate::support::sqlite;

/// How long the page runs, by its own clock: some looks at the status.
const PAGE_MS: u32 = 3000;

#[test]
fn a_browser_shows_the_status_of_both_nodes() {
    let primary = Node::new(&Settings::default(), Member::Primary);
    let broken = primary.data().join("dbs/broken.db");
    fs::create_dir_all(&broken).unwrap();
    fs::write(broken.join("ltx"), "no directory").unwrap();
    let replica = Node::new(&Settings::default(), Member::Replica(&primary.url()));
    let pair = Pair::start(primary, replica);
    sqlite::run(&pair.primary.file("a<b>.db"), "pragma journal_mode=wal; create table t(x);");
    pair.sync("a<b>.db");
    let position = pair.primary.pos("a<b>.db").to_string();

    let primary = visit(&pair.primary);
    for text in [
        ">primary</span>",
        "transactions a second",
        "<td class=\"\">a&lt;b&gt;.db</td>",
        &format!("<td class=\"code\">{position}</td>"),
        "<td class=\"\">8.0 KiB</td><td class=\"\">ok</td>",
        "<td class=\"\">broken.db</td>",
        "<td class=\"bad\">FAILED: ",
        ">1 failed<",
        "<polyline id=\"chart\" points=\"",
        "<h2>Replicas</h2>",
        "<td class=\"code\">127.0.0.1:",
    ] {
        assert!(primary.contains(text), "{text} is not on the page:\n{primary}");
    }
    let replica = visit(&pair.replica);
    for text in [
        ">replica</span>",
        "ms behind the primary",
        "<polyline id=\"chart\" points=\"",
        &format!("<td class=\"code\">{position}</td>"),
        &format!("<a href=\"{0}\">primary at {0}</a>", pair.primary.url()),
        "<section id=\"peers-section\" hidden=\"\">",
    ] {
        assert!(replica.contains(text), "{text} is not on the page:\n{replica}");
    }
}

/// The page of a node as its script left it.
#[track_caller]
fn visit(node: &Node) -> String {
    let profile = tempfile::tempdir().unwrap();
    let mut chromium = Command::new("chromium");
    chromium.args(["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]);
    chromium.args(["--disable-background-networking", "--disable-component-update"]);
    chromium.args(["--disable-sync", "--disable-dev-shm-usage", "--disable-extensions"]);
    chromium.arg(format!("--user-data-dir={}", profile.path().display()));
    chromium.arg(format!("--virtual-time-budget={PAGE_MS}")).arg("--dump-dom");
    run(chromium.arg(node.url()))
}
