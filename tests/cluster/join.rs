//! Nodes that come late, come back, or do not belong: a replica ends with what its primary has, and
//! what only it had is kept.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use test_case::test_case;

use super::Cluster;
use super::readers::StopAtEnd;
use crate::support::consul::Link;
use crate::support::image;
use crate::support::node::{Member, Node, Settings};
use crate::support::{sqlite, wait};

const ROWS: &str = "with recursive n(i) as (select 1 union all select i + 1 from n where i < 200)
                    insert into t select randomblob(300) from n";

pub fn create(node: &Node, name: &str, mode: &str) {
    let setup = format!("pragma journal_mode = {mode}; create table t(x); {ROWS}");
    sqlite::run(&node.file(name), &setup);
}

/// One transaction for each of `rows`.
fn write(node: &Node, name: &str, rows: std::ops::Range<u32>) {
    let rows = rows.map(|row| format!("insert into t values ('row {row}');")).collect::<String>();
    sqlite::run(&node.file(name), &rows);
}

fn snapshots(primary: &Node) -> usize {
    primary.log_count("snapshot sent")
}

/// LTX files that were set aside.
fn lost_and_found(node: &Node, name: &str) -> Vec<String> {
    let entries = fs::read_dir(node.db_dir(name).lost_found()).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test_case("auto")]
#[test_case("off")]
fn a_late_replica_gets_everything(passthrough: &'static str) {
    let settings = Settings { passthrough, ..Settings::default() };
    let mut cluster = Cluster::with(1, &settings);
    for (name, mode) in [("a.db", "delete"), ("b.db", "wal"), ("c.db", "persist")] {
        create(cluster.primary(), name, mode);
        write(cluster.primary(), name, 0..20);
    }
    sqlite::run(&cluster.file("empty.db"), "create table t(x); drop table t; vacuum");
    let writer = sqlite::open(&cluster.file("b.db"));
    writer.execute_batch("insert into t values ('in the log')").unwrap();
    cluster.add(&settings).start();
    writer.execute_batch("insert into t values ('after it came')").unwrap();
    assert!(snapshots(cluster.primary()) >= 4);
    drop(writer);
    cluster.check();
}

#[test_case("delete")]
#[test_case("wal")]
fn a_replica_that_was_away_gets_what_it_missed(mode: &str) {
    let mut cluster = Cluster::of(2);
    create(cluster.primary(), "app.db", mode);
    cluster.sync("app.db");
    let before = snapshots(cluster.primary());
    for round in 0..3 {
        assert!(cluster.nodes[1].stop().success());
        write(cluster.primary(), "app.db", round * 10..round * 10 + 10);
        cluster.nodes[1].start();
        cluster.sync("app.db");
    }
    assert_eq!(snapshots(cluster.primary()), before, "it needed no snapshot");
    cluster.check();
}

#[test_case("delete")]
#[test_case("wal")]
fn a_replica_away_for_longer_than_the_retention_gets_a_snapshot(mode: &str) {
    let data = ", retention: 100ms, retention-monitor-interval: 50ms";
    let mut cluster = Cluster::with(2, &Settings { data, ..Settings::default() });
    create(cluster.primary(), "app.db", mode);
    let pos = cluster.sync("app.db");
    // Stopped, not killed: what a node writes again from its WAL counts as its own.
    assert!(cluster.nodes[1].stop().success());
    write(cluster.primary(), "app.db", 0..10);
    let mut row = 10;
    wait::until_true("old files to go", || {
        write(cluster.primary(), "app.db", row..row + 1);
        row += 1;
        let files = image::chain_files(&cluster.primary().db_dir("app.db"));
        files[0].0.0 > pos.txid.0 + 1
    });
    // It would serve what is still in its memory.
    cluster.nodes[0].stop();
    cluster.nodes[0].start();
    cluster.nodes[1].start();
    cluster.sync("app.db");
    assert_eq!(snapshots(cluster.primary()), 1);
    assert!(lost_and_found(cluster.replica(), "app.db").is_empty(), "nothing was lost");
    cluster.check();
}

#[test]
fn an_old_file_that_cannot_be_removed_is_named_in_the_log() {
    let data = ", retention: 300ms, retention-monitor-interval: 50ms";
    let cluster = Cluster::with(1, &Settings { data, ..Settings::default() });
    create(cluster.primary(), "app.db", "wal");
    let ltx = cluster.primary().db_dir("app.db").ltx();
    // A directory in its place cannot be removed as a file is, by nobody.
    let file = wait::until("an ltx file", || fs::read_dir(&ltx).unwrap().next()).unwrap().path();
    let _ = fs::remove_file(&file);
    fs::create_dir(&file).unwrap();
    let mut row = 0;
    wait::until_true("a line in the log", || {
        write(cluster.primary(), "app.db", row..row + 1);
        row += 1;
        cluster.primary().log_count("remove old ltx files") > 0
    });
    fs::remove_dir(&file).unwrap();
}

pub fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    assert!(Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
}

/// The primary goes back to an old copy of its data, and makes `rows` of its own.
fn set_back(mode: &str, rows: u32) -> Cluster {
    let mut cluster = Cluster::of(2);
    create(cluster.primary(), "app.db", mode);
    cluster.sync("app.db");
    cluster.nodes[0].stop();
    let (data, old) = (cluster.primary().data(), cluster.primary().scratch("old"));
    copy(&data, &old);
    cluster.nodes[0].start();
    write(cluster.primary(), "app.db", 0..5);
    let ahead = cluster.sync("app.db");
    cluster.nodes[0].stop();
    copy(&old, &data);
    cluster.nodes[0].start();
    write(cluster.primary(), "app.db", 100..100 + rows);
    assert_ne!(cluster.primary().pos("app.db"), ahead);
    cluster
}

#[test_case("delete", 0)]
#[test_case("wal", 0)]
#[test_case("delete", 2)]
#[test_case("wal", 2)]
#[test_case("delete", 5; "delete, same txid")]
#[test_case("wal", 5; "wal, same txid")]
fn a_replica_ahead_of_its_primary_keeps_what_it_had_and_follows(mode: &str, rows: u32) {
    let cluster = set_back(mode, rows);
    cluster.sync("app.db");
    let kept = lost_and_found(cluster.replica(), "app.db");
    assert!(!kept.is_empty(), "nothing is kept");
    cluster.replica().wait_for_log("kept in lost+found");
    write(cluster.primary(), "app.db", 200..205);
    cluster.check();
}

/// What the new primary remembers of positions inside an LTX file of several transactions.
#[derive(PartialEq, Eq)]
enum Memory {
    Warm,
    /// It was restarted.
    Cold,
}

#[test_case("delete", 0, Memory::Warm)]
#[test_case("delete", 3, Memory::Warm)]
#[test_case("delete", 30, Memory::Warm)]
#[test_case("wal", 0, Memory::Warm)]
#[test_case("wal", 3, Memory::Warm)]
#[test_case("wal", 30, Memory::Warm)]
#[test_case("wal", 30, Memory::Cold)]
fn a_former_primary_keeps_what_nobody_else_has(mode: &str, rows: u32, memory: Memory) {
    let mut cluster = Cluster::of(2);
    create(cluster.primary(), "app.db", mode);
    let common = cluster.sync("app.db");
    cluster.nodes[1].kill();
    write(cluster.primary(), "app.db", 0..4);
    let alone = cluster.primary().pos("app.db");
    cluster.nodes[0].kill();
    cluster.nodes.swap(0, 1);
    let settings = Settings::default();
    cluster.nodes[0].configure(&settings, Member::Primary);
    cluster.nodes[0].start();
    assert_eq!(cluster.primary().pos("app.db"), common);
    write(cluster.primary(), "app.db", 100..100 + rows);
    if memory == Memory::Cold {
        cluster.nodes[0].stop();
        cluster.nodes[0].start();
    }
    let url = cluster.primary().url();
    cluster.nodes[1].configure(&settings, Member::Replica(&url));
    cluster.nodes[1].start();
    cluster.sync("app.db");

    let former = cluster.replica();
    let kept = lost_and_found(former, "app.db");
    let last = |name: &String| ltx::parse_file_name(name).map(|(_, max)| max);
    assert_eq!(kept.iter().filter_map(last).max(), Some(alone.txid), "{kept:?}");
    former.wait_for_log("kept in lost+found");
    let status = String::from_utf8(former.litefs("status", &["-json"]).stdout).unwrap();
    assert!(status.contains(&format!("\"lostFound\": {}", kept.len())), "{status}");
    let metric = former.metric("litefs_db_lost_found_count{db=\"app.db\"}");
    assert_eq!(metric as usize, kept.len());
    write(cluster.primary(), "app.db", 200..203);
    cluster.check();
}

#[test]
fn a_node_of_another_cluster_keeps_its_data_and_does_not_follow() {
    let mut ours = Cluster::of(2);
    create(ours.primary(), "app.db", "wal");
    let pos = ours.sync("app.db");
    ours.nodes[1].stop();
    let theirs = Cluster::of(1);
    create(theirs.primary(), "app.db", "wal");
    write(theirs.primary(), "app.db", 0..10);

    let (settings, link) = (Settings::default(), Link::to(theirs.primary().address()));
    ours.nodes[1].configure(&settings, Member::Replica(&format!("http://{}", link.address())));
    ours.nodes[1].spawn();
    ours.replica().wait_for_log("cluster id mismatch");
    let log = ours.replica().log();
    let line = log.lines().find(|line| line.contains("cluster id mismatch")).unwrap();
    for node in [ours.primary(), theirs.primary()] {
        let id = fs::read_to_string(node.data().join("clusterid")).unwrap();
        assert!(line.contains(id.trim_end()), "{id} in {line}");
    }
    let before = link.connections();
    wait::until_true("more than one attempt", || link.connections() > before);
    ours.replica().wait_for_pos("app.db", pos);
    assert!(!ours.replica().log().contains("ready"), "it must not become ready");
    ours.nodes[1].stop();
    ours.nodes[1].configure(&settings, Member::Replica(&ours.nodes[0].url()));
    ours.nodes[1].start();
    write(ours.primary(), "app.db", 0..1);
    ours.check();
    theirs.check();
}

#[test_case("delete", "delete")]
#[test_case("wal", "wal")]
#[test_case("wal", "delete")]
#[test_case("delete", "wal")]
fn a_database_is_dropped_and_made_again(first: &str, second: &str) {
    let mut cluster = Cluster::of(2);
    create(cluster.primary(), "app.db", first);
    let before = cluster.sync("app.db");
    fs::remove_file(cluster.file("app.db")).unwrap();
    let dropped = cluster.sync("app.db");
    assert_eq!(dropped.txid, before.txid.next());
    assert!(!cluster.replica().file("app.db").exists());
    cluster.check();
    let start = format!("pragma page_size = 1024; pragma journal_mode = {second}");
    sqlite::run(&cluster.file("app.db"), &format!("{start}; create table t(y); {ROWS}"));
    assert!(cluster.sync("app.db").txid > dropped.txid, "numbers go on");
    cluster.check();

    // And again while the replica is away.
    cluster.nodes[1].stop();
    fs::remove_file(cluster.file("app.db")).unwrap();
    create(cluster.primary(), "app.db", first);
    cluster.nodes[1].start();
    cluster.check();
    cluster.nodes[1].stop();
    fs::remove_file(cluster.file("app.db")).unwrap();
    cluster.nodes[1].start();
    cluster.check();
    assert!(!cluster.replica().file("app.db").exists());
}

/// Readers on the replica that stay open through everything.
#[test_case("auto")]
#[test_case("off")]
fn open_readers_of_a_replica_see_the_journal_mode_change(passthrough: &'static str) {
    const COUNT: &str = "select count(*) from t";
    let cluster = Cluster::with(2, &Settings { passthrough, ..Settings::default() });
    create(cluster.primary(), "app.db", "delete");
    cluster.sync("app.db");
    let path = cluster.replica().file("app.db");
    let inside = sqlite::open(&path);
    let mut outside = sqlite::Session::open(&path);
    outside.run(".timeout 10000");
    let mut rows = 200;
    let modes = ["wal", "delete", "wal", "truncate", "wal", "persist", "delete"];
    for (turn, mode) in modes.into_iter().enumerate() {
        assert_eq!(sqlite::value::<i64>(&inside, COUNT), rows, "before {mode}");
        assert_eq!(outside.run(&format!("{COUNT};")), rows.to_string(), "before {mode}");
        let switch = format!("pragma journal_mode = {mode}");
        assert_eq!(sqlite::run(&cluster.file("app.db"), &format!("{switch};")), mode);
        write(cluster.primary(), "app.db", 0..turn as u32 + 1);
        rows += turn as i64 + 1;
        cluster.sync("app.db");
        assert_eq!(sqlite::value::<i64>(&inside, COUNT), rows, "after {mode}");
        assert_eq!(outside.run(&format!("{COUNT};")), rows.to_string(), "after {mode}");
    }
    drop((inside, outside));
    // Nobody has the log open any more.
    write(cluster.primary(), "app.db", 0..1);
    cluster.sync("app.db");
    assert_eq!(sqlite::run(&path, "pragma journal_mode"), "delete");
    cluster.check();
}

/// Whoever opens the database just when the replica leaves WAL mode finds no trace of a log: nobody could
/// fill one that he made there.
#[test_case("auto")]
#[test_case("off")]
fn who_opens_a_replica_when_it_leaves_wal_mode_can_read(passthrough: &'static str) {
    let cluster = Cluster::with(2, &Settings { passthrough, ..Settings::default() });
    create(cluster.primary(), "app.db", "delete");
    cluster.sync("app.db");
    let path = cluster.replica().file("app.db");
    let ended = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let opens = scope.spawn(|| {
            let mut count = 0;
            while !ended.load(Ordering::SeqCst) {
                assert!(sqlite::value::<i64>(&sqlite::open(&path), "select count(*) from t") > 0);
                count += 1;
            }
            count
        });
        let end = StopAtEnd(ended);
        for _ in 0..4 {
            for mode in ["wal", "delete"] {
                let switch = format!("pragma journal_mode = {mode}");
                assert_eq!(sqlite::run(&cluster.file("app.db"), &switch), mode);
                write(cluster.primary(), "app.db", 0..3);
                cluster.sync("app.db");
            }
        }
        drop(end);
        assert!(opens.join().unwrap() > 0);
    });
    cluster.check();
}

#[test_case("auto")]
#[test_case("off")]
fn a_page_size_change_reaches_the_replica_and_its_readers(passthrough: &'static str) {
    let cluster = Cluster::with(2, &Settings { passthrough, ..Settings::default() });
    create(cluster.primary(), "app.db", "delete");
    cluster.sync("app.db");
    let path = cluster.replica().file("app.db");
    let mut reader = sqlite::Session::open(&path);
    for page_size in [512, 65536, 1024, 4096] {
        assert_eq!(reader.run("select count(*) from t;"), "200");
        let sql = format!("pragma page_size = {page_size}; vacuum; pragma page_size;");
        assert_eq!(sqlite::run(&cluster.file("app.db"), &sql), page_size.to_string());
        cluster.sync("app.db");
        assert_eq!(sqlite::run(&path, "pragma page_size"), page_size.to_string());
        assert_eq!(reader.run("select count(*) from t;"), "200");
    }
    drop(reader);
    cluster.check();
}

/// Connections in WAL mode hold locks also while they read nothing.
#[test_case("auto")]
#[test_case("off")]
fn idle_connections_do_not_hold_up_a_snapshot(passthrough: &'static str) {
    const COUNT: &str = "select count(*) from t";
    let cluster = Cluster::with(2, &Settings { passthrough, ..Settings::default() });
    create(cluster.primary(), "app.db", "wal");
    cluster.sync("app.db");
    let connections = cluster.nodes.iter().map(|node| {
        let path = node.file("app.db");
        (sqlite::open(&path), sqlite::Session::open(&path))
    });
    let mut connections: Vec<_> = connections.collect();
    let mut check = |rows: i64| {
        for (inside, outside) in &mut connections {
            assert_eq!(sqlite::value::<i64>(inside, COUNT), rows);
            assert_eq!(
                outside.run(&format!("{COUNT}; pragma integrity_check;")),
                format!("{rows}\nok")
            );
        }
    };
    check(200);
    let file = cluster.primary().scratch("other.db");
    for (page_size, mode, rows) in
        [(4096, "delete", 3), (1024, "delete", 4), (8192, "wal", 7), (8192, "wal", 900)]
    {
        let _ = fs::remove_file(&file);
        let pragmas = format!("pragma page_size = {page_size}; pragma journal_mode = {mode}");
        sqlite::run(&file, &format!("{pragmas}; create table t(x)"));
        let one = "insert into t values (randomblob(500));".repeat(rows);
        sqlite::run(&file, &format!("begin; {one} commit"));
        let output =
            cluster.primary().litefs("import", &["-name", "app.db", file.to_str().unwrap()]);
        assert!(output.status.success(), "{output:?}");
        cluster.sync("app.db");
        check(rows as i64);
        write(cluster.primary(), "app.db", 0..2);
        cluster.sync("app.db");
        check(rows as i64 + 2);
    }
    // What a connection of the primary that was open all the time writes counts too.
    connections[0].0.execute_batch("insert into t values ('from within')").unwrap();
    connections[0].1.run("insert into t values ('from outside');");
    cluster.sync("app.db");
    assert_eq!(sqlite::value::<i64>(&connections[1].0, COUNT), 904);
    drop(connections);
    cluster.check();
}

#[test_case("auto")]
#[test_case("off")]
fn idle_connections_do_not_hold_up_a_drop(passthrough: &'static str) {
    let cluster = Cluster::with(2, &Settings { passthrough, ..Settings::default() });
    create(cluster.primary(), "app.db", "wal");
    cluster.sync("app.db");
    let path = cluster.replica().file("app.db");
    let inside = sqlite::open(&path);
    let mut outside = sqlite::Session::open(&path);
    let count =
        |inside: &rusqlite::Connection| sqlite::value::<i64>(inside, "select count(*) from t");
    assert_eq!(count(&inside), 200);
    assert_eq!(outside.run("select count(*) from t;"), "200");
    for mode in ["delete", "wal"] {
        fs::remove_file(cluster.file("app.db")).unwrap();
        cluster.sync("app.db");
        // As with any file that was removed: who has it open goes on with it.
        assert_eq!(count(&inside), 200);
        sqlite::run(
            &cluster.file("app.db"),
            &format!("pragma journal_mode = {mode}; create table t(x)"),
        );
        write(cluster.primary(), "app.db", 0..5);
        cluster.sync("app.db");
        assert_eq!(count(&inside), 200);
        assert_eq!(outside.run("select count(*) from t;"), "200");
        assert_eq!(sqlite::run(&path, "select count(*) from t"), "5");
    }
    drop((inside, outside));
    write(cluster.primary(), "app.db", 0..5);
    cluster.check();
}

/// `docs/differences.md`, cluster 25: "As there: kept".
#[test]
fn a_database_that_the_primary_does_not_know_stays_on_a_replica() {
    let mut cluster = Cluster::of(2);
    for name in ["app.db", "other.db"] {
        create(cluster.primary(), name, "wal");
        write(cluster.primary(), name, 0..3);
        cluster.sync(name);
    }
    let pos = cluster.replica().pos("other.db");
    cluster.nodes.iter_mut().for_each(|node| _ = node.stop());
    fs::remove_dir_all(cluster.primary().db_dir("other.db").path()).unwrap();
    cluster.nodes.iter_mut().for_each(Node::start);
    write(cluster.primary(), "app.db", 3..5);
    cluster.sync("app.db");
    assert_eq!(cluster.replica().pos("other.db"), pos);
    assert_eq!(sqlite::run(&cluster.replica().file("other.db"), "pragma integrity_check"), "ok");
}
