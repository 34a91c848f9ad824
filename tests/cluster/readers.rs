//! Readers on a replica: each sees one state, none waits for replication, and none holds up more
//! than the database it reads.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use test_case::test_case;

use super::Cluster;
use crate::support::consul::Link;
use crate::support::node::{Member, Node, Settings};
use crate::support::sqlite::{self, Session};
use crate::support::wait;

/// A table and a copy of it that changes in the same transactions.
const TWINS: &str = "create table a(x integer primary key, y blob);
                     create table b(x integer primary key, y blob);";

/// Both have as many rows, or a reader saw half a transaction.
const COMPARE: &str = "select (select count(*) from a) = (select count(*) from b) \
                       and (select max(x) from a) is (select max(x) from b)";

fn twins(cluster: &Cluster, mode: &str) {
    sqlite::run(&cluster.file("app.db"), &format!("pragma journal_mode = {mode}; {TWINS}"));
    cluster.sync("app.db");
}

fn insert(writer: &Connection, payload: usize) {
    writer
        .execute_batch(&format!(
            "begin immediate; insert into a(y) values (randomblob({payload}));
             insert into b(y) values (zeroblob({payload})); commit"
        ))
        .unwrap();
}

#[test_case("auto")]
#[test_case("off")]
fn an_open_reader_keeps_its_snapshot_while_transactions_are_applied(passthrough: &'static str) {
    const COUNT: &str = "select count(*) from a";
    let cluster = Cluster::with(2, &Settings { passthrough, ..Settings::default() });
    twins(&cluster, "wal");
    let writer = sqlite::open(&cluster.file("app.db"));
    insert(&writer, 100);
    cluster.sync("app.db");
    let replica = cluster.replica().file("app.db");
    let inside = sqlite::open(&replica);
    inside.execute_batch("begin").unwrap();
    assert_eq!(sqlite::value::<i64>(&inside, COUNT), 1);
    let mut outside = Session::open(&replica);
    assert_eq!(outside.run(&format!("begin; {COUNT};")), "1");

    (0..300).for_each(|_| insert(&writer, 3000));
    // Both readers are still inside.
    cluster.sync("app.db");

    assert_eq!(sqlite::run(&replica, COUNT), "301", "a new reader");
    assert_eq!(sqlite::value::<i64>(&inside, COUNT), 1);
    assert_eq!(outside.run(&format!("{COUNT}; pragma integrity_check;")), "1\nok");
    inside.execute_batch("commit").unwrap();
    assert_eq!(sqlite::value::<i64>(&inside, COUNT), 301);
    assert_eq!(outside.run(&format!("commit; {COUNT};")), "301");
    drop((writer, inside, outside));
    cluster.check();
}

/// Reads until told to stop, with a connection that stays or a new one each time; how often.
fn read(replica: &Node, stop: &AtomicBool, connections: Connections) -> u64 {
    let path = replica.file("app.db");
    let open = || {
        let connection = Connection::open(&path).unwrap();
        connection.busy_timeout(Duration::ZERO).unwrap();
        connection
    };
    let mut connection = open();
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        if connections == Connections::Fresh {
            connection = open();
        }
        let same: bool = sqlite::value(&connection, COMPARE);
        assert!(same, "half a transaction");
        count += 1;
    }
    count
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Connections {
    Lasting,
    Fresh,
}

/// Reads by new processes until told to stop.
fn read_outside(replica: &Node, stop: &AtomicBool) -> u64 {
    let path = replica.file("app.db");
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        assert_eq!(sqlite::run(&path, &format!(".timeout 0\n{COMPARE};")), "1");
        count += 1;
    }
    count
}

#[test_case("auto")]
#[test_case("off")]
fn short_reads_are_never_refused_while_transactions_are_applied(passthrough: &'static str) {
    const TIME: Duration = Duration::from_secs(4);
    let cluster = Cluster::with(2, &Settings { passthrough, ..Settings::default() });
    twins(&cluster, "wal");
    let (stop, reads) = (&AtomicBool::new(false), &AtomicU64::new(0));
    let replica = cluster.replica();
    // The position is there a moment before the locks under which a snapshot is applied are gone.
    assert_eq!(sqlite::run(&replica.file("app.db"), COMPARE), "1");
    thread::scope(|scope| {
        let kinds = [Connections::Lasting, Connections::Fresh];
        for connections in kinds.into_iter().cycle().take(4) {
            scope.spawn(move || {
                reads.fetch_add(read(replica, stop, connections), Ordering::Relaxed)
            });
        }
        scope.spawn(move || reads.fetch_add(read_outside(replica, stop), Ordering::Relaxed));
        let end = StopAtEnd(stop);
        let writer = sqlite::open(&cluster.file("app.db"));
        let begin = Instant::now();
        let mut written = 0;
        // Each makes some four frames, and a replica moves them into its database every 1,000.
        while begin.elapsed() < TIME || written < 600 {
            insert(&writer, 2000);
            written += 1;
            if written % 200 == 0 {
                writer.execute_batch("pragma wal_checkpoint(truncate)").unwrap_or_default();
            }
        }
        cluster.sync("app.db");
        drop(end);
    });
    assert!(reads.load(Ordering::Relaxed) > 200, "{reads:?} reads prove nothing");
    cluster.check();
}

/// Stops the readers also when the writer fails.
pub(super) struct StopAtEnd<'a>(pub(super) &'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test_case("delete", "auto")]
#[test_case("wal", "off")]
#[test_case("truncate", "off")]
fn readers_that_are_locked_out_for_moments_see_whole_transactions(
    mode: &str,
    passthrough: &'static str,
) {
    const TIME: Duration = Duration::from_secs(2);
    // Of a machine that does nothing else for a while, not of a reader's turn.
    const STARVED: Duration = Duration::from_secs(60);
    let cluster = Cluster::with(2, &Settings { passthrough, ..Settings::default() });
    twins(&cluster, mode);
    let stop = &AtomicBool::new(false);
    let replica = cluster.replica();
    let reads = &[const { AtomicU64::new(0) }; 3];
    thread::scope(|scope| {
        for count in reads {
            scope.spawn(move || {
                let connection = sqlite::open(&replica.file("app.db"));
                while !stop.load(Ordering::Relaxed) {
                    assert!(sqlite::value::<bool>(&connection, COMPARE), "half a transaction");
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let end = StopAtEnd(stop);
        let writer = sqlite::open(&cluster.file("app.db"));
        let begin = Instant::now();
        let has_starved = || reads.iter().any(|count| count.load(Ordering::Relaxed) <= 10);
        while begin.elapsed() < TIME || has_starved() {
            assert!(begin.elapsed() < STARVED, "a reader starved: {reads:?}");
            insert(&writer, 2000);
        }
        cluster.sync("app.db");
        drop(end);
    });
    cluster.check();
}

#[test_case("delete")]
#[test_case("wal")]
fn a_blocked_database_does_not_hold_up_the_others(others: &str) {
    let cluster = Cluster::of(2);
    let names = ["a.db", "b.db", "c.db", "z.db"];
    for name in names {
        let mode = if name == "b.db" { "delete" } else { others };
        let sql = format!("pragma journal_mode = {mode}; create table t(x)");
        sqlite::run(&cluster.file(name), &sql);
        cluster.sync(name);
    }
    let mut reader = Session::open(&cluster.replica().file("b.db"));
    assert_eq!(reader.run("begin; select count(*) from t;"), "0");
    let before = cluster.replica().pos("b.db");
    for round in 0..20 {
        for name in names {
            sqlite::run(&cluster.file(name), &format!("insert into t values ({round})"));
        }
    }
    for name in ["a.db", "c.db", "z.db"] {
        cluster.sync(name);
    }
    assert_eq!(cluster.replica().pos("b.db"), before, "the reader's lock was not respected");
    assert_eq!(reader.run("select count(*) from t;"), "0");
    reader.run("commit;");
    wait::until_true("b.db to follow", || {
        cluster.replica().pos("b.db") == cluster.primary().pos("b.db")
    });
    assert_eq!(reader.run("select count(*) from t;"), "20");
    drop(reader);
    cluster.check();
}

/// What is on its way locks nobody out, at either end: a snapshot to a new replica not the writers, and a
/// transaction not the readers.
#[test]
fn nobody_waits_for_a_slow_link() {
    const SLOW: u64 = 20_000;
    const COUNT: &str = "select count(*) from a";
    let mut cluster = Cluster::of(1);
    twins(&cluster, "delete");
    insert(&sqlite::open(&cluster.file("app.db")), 1_000_000);
    let link = Link::to(cluster.primary().address());
    link.limit(SLOW);
    let url = format!("http://{}", link.address());
    cluster.nodes.push(Node::new(&Settings::default(), Member::Replica(&url)));
    cluster.nodes[1].spawn();
    cluster.primary().wait_for_log("stream connected");
    let writer = sqlite::open(&cluster.file("app.db"));
    (0..5).for_each(|_| insert(&writer, 100));
    assert!(cluster.nodes[1].databases().is_empty(), "it is still on its way");
    link.limit(0);
    cluster.nodes[1].wait_ready();
    let before = cluster.sync("app.db");
    let reader = sqlite::open(&cluster.replica().file("app.db"));
    // The position is there a moment before the locks are gone.
    assert_eq!(sqlite::value::<i64>(&reader, COUNT), 6);
    reader.busy_timeout(Duration::ZERO).unwrap();

    link.limit(SLOW);
    insert(&writer, 200_000);
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(1) {
        assert_eq!(sqlite::value::<i64>(&reader, COUNT), 6);
    }
    assert_eq!(cluster.replica().pos("app.db"), before, "it is still on its way");
    drop((reader, writer));
    link.limit(0);
    cluster.sync("app.db");
    assert_eq!(sqlite::run(&cluster.replica().file("app.db"), COUNT), "7");
    cluster.check();
}
