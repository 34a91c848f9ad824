//! Nodes that are killed while an application writes: what SQLite acknowledged is there, on every
//! node, and nobody needs the whole database again.

use std::fs::File;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use test_case::{test_case, test_matrix};

use super::Cluster;
use crate::support::node::{Node, Settings};
use crate::support::{program, sqlite, wait};

const DB: &str = "app.db";

/// Rows that one program writes at most; it is stopped long before.
const ROWS: u64 = 50_000;

/// A program that commits one row after the other and prints the number of each that was
/// acknowledged.
struct Writer(Child);

impl Writer {
    fn start(node: &Node, first: u64) -> Writer {
        let script = node.scratch(&format!("script-{first}"));
        let row = |n: u64| {
            let size = n * 37 % 900;
            format!(
                "begin immediate; insert into t values ({n}, randomblob({size})); \
                 update t set b = 'shorter' where n = {n} - 5; commit; select {n};\n"
            )
        };
        let rows: String = (first..first + ROWS).map(row).collect();
        std::fs::write(&script, format!(".timeout 5000\n{rows}")).unwrap();
        // Without a buffer: each line that it got to is wanted, also when it is killed.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "sqlite3", "-batch", "-bail"]).arg(node.file(DB));
        command.stdin(File::open(script).unwrap()).stdout(Stdio::piped()).stderr(Stdio::null());
        Writer(command.spawn().unwrap())
    }

    /// The last number that was acknowledged, once the node is gone and the program with it.
    fn acknowledged(self) -> u64 {
        let output = program::finish(self.0);
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().next_back().map_or(0, |number| number.parse().unwrap())
    }

    /// Kills it in the middle; the last number that it was told to be committed.
    fn kill(mut self) -> u64 {
        self.0.kill().unwrap();
        self.acknowledged()
    }

    /// Ends it; its last transaction may or may not be there.
    fn stop(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn cluster(mode: &str, passthrough: &'static str) -> Cluster {
    cluster_over("auto", mode, passthrough)
}

fn cluster_over(transport: &'static str, mode: &str, passthrough: &'static str) -> Cluster {
    let cluster = Cluster::with(2, &Settings { transport, passthrough, ..Settings::default() });
    let setup = format!("pragma journal_mode = {mode}; create table t(n integer primary key, b)");
    sqlite::run(&cluster.file(DB), &setup);
    cluster.sync(DB);
    cluster
}

/// The number of the last row; all before it are there.
#[track_caller]
fn last_row(node: &Node) -> u64 {
    let sql = "select count(*) = coalesce(max(n), 0), coalesce(max(n), 0) from t";
    let answer = sqlite::run(&node.file(DB), sql);
    let last = answer.strip_prefix("1|").unwrap_or_else(|| panic!("a row is missing: {answer}"));
    last.parse().unwrap()
}

/// Waits until `node` has got so many transactions further.
#[track_caller]
fn wait_for_progress(node: &Node, count: u64) {
    let enough = node.pos(DB).txid.0 + count;
    wait::until_or(
        || format!("transaction {enough}; stands at {}", node.pos(DB)),
        || (node.pos(DB).txid.0 >= enough).then_some(()),
    );
}

fn snapshots(primary: &Node) -> usize {
    primary.log_count("snapshot sent")
}

#[test_matrix(["delete", "persist", "wal"], ["auto", "off"], ["auto"])]
#[test_case("wal", "auto", "dev")]
#[test_case("delete", "off", "dev")]
fn a_killed_primary_loses_nothing_and_its_replica_goes_on(
    mode: &str,
    passthrough: &'static str,
    transport: &'static str,
) {
    let mut cluster = cluster_over(transport, mode, passthrough);
    for round in 0..3 {
        let writer = Writer::start(cluster.primary(), last_row(cluster.primary()) + 1);
        wait_for_progress(cluster.replica(), 20 + round * 15);
        cluster.nodes[0].kill();
        let acknowledged = writer.acknowledged();
        cluster.nodes[0].start();
        cluster.sync(DB);
        assert!(last_row(cluster.primary()) >= acknowledged, "{acknowledged} is lost");
        assert!(last_row(cluster.replica()) >= acknowledged, "{acknowledged} is not replicated");
        assert_eq!(snapshots(cluster.primary()), 0, "round {round}");
    }
    cluster.check();
}

#[test_matrix(["delete", "persist", "wal"], ["auto", "off"])]
fn a_killed_replica_goes_on_where_it_was(mode: &str, passthrough: &'static str) {
    let mut cluster = cluster(mode, passthrough);
    let before = snapshots(cluster.primary());
    let writer = Writer::start(cluster.primary(), 1);
    for round in 0..3 {
        wait_for_progress(cluster.replica(), 20 + round * 15);
        cluster.nodes[1].kill();
        wait_for_progress(cluster.primary(), 10 + round * 10);
        cluster.nodes[1].start();
    }
    wait_for_progress(cluster.replica(), 20);
    writer.stop();
    // The next reader rolls back what the program had begun.
    last_row(cluster.primary());
    assert_eq!(snapshots(cluster.primary()), before);
    cluster.check();
}

#[test_case("delete")]
#[test_case("wal")]
fn nodes_that_are_killed_together_agree_again(mode: &str) {
    let mut cluster = cluster(mode, "auto");
    for round in 0..3 {
        let writer = Writer::start(cluster.primary(), last_row(cluster.primary()) + 1);
        wait_for_progress(cluster.replica(), 20 + round * 15);
        for node in &mut cluster.nodes {
            node.kill();
        }
        let acknowledged = writer.acknowledged();
        // In either order.
        for node in [round % 2, (round + 1) % 2] {
            cluster.nodes[node as usize].spawn();
        }
        for node in &cluster.nodes {
            node.wait_ready();
        }
        cluster.sync(DB);
        assert!(last_row(cluster.primary()) >= acknowledged, "{acknowledged} is lost");
        assert_eq!(snapshots(cluster.primary()), 0, "round {round}");
    }
    cluster.check();
}

/// The journal of the transaction is still there, and half of it in the database file.
#[test_case("delete")]
#[test_case("persist")]
fn a_late_replica_gets_a_database_whose_application_died_in_a_transaction(mode: &str) {
    let settings = Settings::default();
    let mut cluster = Cluster::with(1, &settings);
    let setup = format!("pragma journal_mode = {mode}; create table t(n integer primary key, b)");
    sqlite::run(&cluster.file(DB), &setup);
    sqlite::run(&cluster.file("other.db"), "create table t(x)");
    let mut application = sqlite::Session::open(&cluster.file(DB));
    application.run(&format!(
        "pragma journal_mode = {mode}; pragma cache_size = 5; begin;
         insert into t values (1, randomblob(100000)); insert into t values (2, zeroblob(90000));"
    ));
    let committed = cluster.primary().pos(DB);
    drop(application);
    cluster.add(&settings).start();
    cluster.replica().wait_for_pos(DB, committed);
    assert_eq!(last_row(cluster.replica()), 0);
    sqlite::run(&cluster.file(DB), "insert into t values (1, 'new')");
    cluster.check();
}

/// What was committed is with the replica when the primary has ended cleanly.
#[test_case("delete")]
#[test_case("wal")]
fn a_stopped_primary_has_sent_everything(mode: &str) {
    let mut cluster = cluster(mode, "auto");
    for n in 1..=5 {
        let sql = format!("insert into t values ({n}, zeroblob(50000))");
        sqlite::run(&cluster.file(DB), &sql);
        assert!(cluster.nodes[0].stop().success());
        let path = cluster.replica().file(DB);
        wait::until_true("what was sent to be applied", || {
            sqlite::run(&path, "select count(*) from t") == n.to_string()
        });
        cluster.nodes[0].start();
        wait::until_true("the replica to be connected", || {
            cluster.primary().log().contains("stream connected")
        });
    }
    cluster.check();
}

/// `docs/SEMANTICS.md`, C1: every commit that SQLite reported is there when the application has died;
/// "the next client rolls back the rest".
#[test_matrix(["delete", "persist", "wal"], ["auto", "off"])]
fn what_a_killed_application_committed_is_on_every_node(mode: &str, passthrough: &'static str) {
    let cluster = cluster(mode, passthrough);
    for round in 0..4 {
        let writer = Writer::start(cluster.primary(), last_row(cluster.primary()) + 1);
        wait_for_progress(cluster.primary(), 20 + round * 15);
        let acknowledged = writer.kill();
        let last = last_row(cluster.primary());
        assert!(last >= acknowledged, "{acknowledged} is lost");
        assert!(last <= acknowledged + 1, "{last} is there, {acknowledged} was acknowledged");
        cluster.sync(DB);
        assert_eq!(last_row(cluster.replica()), last);
    }
    cluster.check();
}

/// `docs/SEMANTICS.md`, P10: "a commit waits for no replica".
#[test_case("delete")]
#[test_case("wal")]
fn a_commit_waits_for_no_replica(mode: &str) {
    let cluster = cluster(mode, "auto");
    let before = cluster.primary().pos(DB).txid.0;
    cluster.replica().signal(Signal::SIGSTOP);
    for n in 1..=20 {
        sqlite::run(&cluster.file(DB), &format!("insert into t values ({n}, zeroblob(9000))"));
    }
    assert_eq!(cluster.primary().pos(DB).txid.0, before + 20);
    cluster.replica().signal(Signal::SIGCONT);
    cluster.check();
}
