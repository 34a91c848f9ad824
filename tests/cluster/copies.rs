//! Databases copied in and out by the command line, while replicas follow.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, TryRecvError};
use std::time::{Duration, Instant};

use rusqlite::Connection;
use test_case::{test_case, test_matrix};

use super::Cluster;
use crate::support::image::Image;
use crate::support::node::{Node, Settings};
use crate::support::shell::Shell;
use crate::support::sqlite;
use crate::support::wait;

const DB: &str = "app.db";

fn create(path: &Path, page_size: u32, mode: &str, rows: u32) {
    let pragmas = format!("pragma page_size = {page_size}; pragma journal_mode = {mode}");
    sqlite::run(
        path,
        &format!(
            "{pragmas}; create table t(x); create index t_x on t(x);
             with recursive n(i) as (select 1 union all select i + 1 from n where i < {rows})
             insert into t select randomblob(700) from n"
        ),
    );
}

/// A file of a test's own.
fn source(node: &Node, page_size: u32, mode: &str, rows: u32) -> PathBuf {
    let path = node.scratch("source.db");
    let _ = fs::remove_file(&path);
    create(&path, page_size, mode, rows);
    path
}

#[track_caller]
fn import(node: &Node, file: &Path) {
    let output = node.litefs("import", &["-name", DB, file.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
}

/// What is complained of when an import is refused.
#[track_caller]
fn import_refused(node: &Node, file: &Path) -> String {
    let output = node.litefs("import", &["-name", DB, file.to_str().unwrap()]);
    assert!(!output.status.success(), "not refused: {output:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    let errors: Vec<_> = text.lines().filter(|line| line.starts_with("ERROR: ")).collect();
    assert_eq!(errors.len(), 1, "one line: {text}");
    errors[0].to_owned()
}

#[track_caller]
fn export(node: &Node) -> PathBuf {
    let path = node.scratch("export.db");
    let output = node.litefs("export", &["-name", DB, path.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    path
}

#[test_matrix(["delete", "wal"], ["auto", "off"])]
fn an_imported_database_reaches_the_replica_and_comes_out_again(
    mode: &str,
    passthrough: &'static str,
) {
    let mut cluster = Cluster::with(2, &Settings { passthrough, ..Settings::default() });
    let mut before = cluster.primary().pos(DB);
    // A new one, a larger, a smaller one, and others with other page sizes.
    for (page_size, rows) in [(4096, 50), (4096, 400), (4096, 5), (512, 30), (65536, 300)] {
        let file = source(cluster.primary(), page_size, mode, rows);
        import(cluster.primary(), &file);
        let pos = cluster.sync(DB);
        assert_eq!(pos.txid, before.txid.next(), "one transaction");
        before = pos;
        assert_eq!(sqlite::run(&cluster.file(DB), "pragma journal_mode"), mode);
        for node in &cluster.nodes {
            assert_eq!(sqlite::run(&export(node), ".dump"), sqlite::run(&file, ".dump"));
        }
    }
    sqlite::run(&cluster.file(DB), "insert into t values (1)");
    cluster.check();
    // LiteFS could not start again after that.
    cluster.nodes[0].kill();
    cluster.nodes[0].start();
    sqlite::run(&cluster.file(DB), "insert into t values (2)");
    cluster.check();
}

/// What a connection remembers of the tables of one import must not count for the next one, nor its
/// pages.
#[test_matrix(["delete", "wal"], ["auto", "off"])]
fn a_connection_notices_each_of_several_imports(mode: &str, passthrough: &'static str) {
    let cluster = Cluster::with(2, &Settings { passthrough, ..Settings::default() });
    let file = cluster.file(DB);
    sqlite::run(&file, &format!("pragma journal_mode = {mode}; pragma user_version = 1;"));
    let mut shell = Shell::open(&file);
    shell.run("select count(*) from sqlite_schema");
    let path = cluster.primary().scratch("source.db");
    for (table, value) in [("one", 1), ("two", 2), ("two", 3)] {
        let _ = fs::remove_file(&path);
        sqlite::run(
            &path,
            &format!("create table {table}(x); insert into {table} values ({value});"),
        );
        import(cluster.primary(), &path);
        assert_eq!(shell.run(&format!("select x from {table}")), value.to_string());
        shell.run(&format!("insert into {table} values ('more')"));
        assert_eq!(shell.run("pragma integrity_check"), "ok");
        cluster.check();
    }
    shell.close();
    cluster.check();
}

/// `docs/differences.md`, 26: "An export's checksum is compared with the position and a bad one breaks
/// off".
#[test]
fn an_export_of_a_damaged_file_is_no_success() {
    let cluster = Cluster::of(1);
    let primary = cluster.primary();
    create(&cluster.file(DB), 4096, "delete", 100);
    let file = fs::OpenOptions::new().write(true).open(primary.db_dir(DB).database()).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0x55; 20], 4 * 4096 + 2000).unwrap();
    let path = primary.scratch("export.db");
    fs::write(&path, "keep me").unwrap();
    let output = primary.litefs("export", &["-name", DB, path.to_str().unwrap()]);
    assert!(!output.status.success(), "{output:?}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "keep me");
    primary.wait_for_log("its pages have checksum");
}

#[test]
fn readers_of_the_replica_see_an_import() {
    let cluster = Cluster::of(2);
    create(&cluster.file(DB), 4096, "delete", 10);
    cluster.sync(DB);
    let reader = sqlite::open(&cluster.replica().file(DB));
    let mut rows = 10;
    for (page_size, mode) in [(4096, "delete"), (1024, "delete"), (1024, "wal"), (8192, "wal")] {
        assert_eq!(sqlite::value::<u32>(&reader, "select count(*) from t"), rows);
        rows += 17;
        import(cluster.primary(), &source(cluster.primary(), page_size, mode, rows));
        cluster.sync(DB);
    }
    assert_eq!(sqlite::value::<u32>(&reader, "select count(*) from t"), rows);
    drop(reader);
    cluster.check();
}

#[test]
fn what_is_no_healthy_database_is_not_imported() {
    let cluster = Cluster::of(2);
    create(&cluster.file(DB), 4096, "wal", 100);
    let pos = cluster.sync(DB);
    let primary = cluster.primary();
    let good = fs::read(source(primary, 4096, "delete", 100)).unwrap();
    let path = primary.scratch("bad.db");
    let refuse = |bytes: &[u8], what: &str| {
        fs::write(&path, bytes).unwrap();
        let text = import_refused(primary, &path);
        assert!(text.len() < 300 && !text.contains("panicked"), "{what}: {text}");
        assert_eq!(primary.pos(DB), pos, "{what}");
    };
    refuse(
        b"just some text, longer than the hundred bytes that a database header has. "
            .repeat(9)
            .as_slice(),
        "text",
    );
    refuse(b"", "an empty file");
    refuse(&good[..60], "half a header");
    refuse(&good[..good.len() - 4096], "a file that lacks a page");
    let mut bad = good.clone();
    bad[4096..8192].fill(0x55);
    refuse(&bad, "a damaged page");
    import_refused(primary, &primary.scratch("missing.db"));
    let replica = cluster.replica();
    fs::write(replica.scratch("good.db"), &good).unwrap();
    import_refused(replica, &replica.scratch("good.db"));
    assert_eq!(cluster.sync(DB), pos);
    cluster.check();
}

#[test_case("delete")]
#[test_case("wal")]
fn an_export_is_one_state_while_an_application_writes(mode: &str) {
    let cluster = Cluster::of(2);
    sqlite::run(
        &cluster.file(DB),
        &format!(
            "pragma journal_mode = {mode}; create table a(x, y); create table b(x, y);
             insert into a values (0, 0); insert into b values (0, 0)"
        ),
    );
    cluster.sync(DB);
    std::thread::scope(|scope| {
        let (stop, stopped) = mpsc::channel::<()>();
        let path = cluster.file(DB);
        let writer = scope.spawn(move || {
            let writer = sqlite::open(&path);
            let row =
                "begin immediate; insert into a select max(x) + 1, hex(randomblob(500)) from a;
                       insert into b select max(x) + 1, hex(randomblob(500)) from b; commit";
            while stopped.try_recv() == Err(TryRecvError::Empty) {
                writer.execute_batch(row).unwrap();
            }
        });
        for node in cluster.nodes.iter().cycle().take(10) {
            let copy = export(node);
            let check =
                "pragma integrity_check; select (select max(x) from a) - (select max(x) from b)";
            assert_eq!(sqlite::run(&copy, check), "ok\n0");
        }
        drop(stop);
        writer.join().unwrap();
    });
    let ours = export(cluster.primary());
    cluster.sync(DB);
    assert_eq!(fs::read(&ours).unwrap(), fs::read(export(cluster.replica())).unwrap());
    let image = Image::of_files(&cluster.primary().db_dir(DB)).unwrap();
    assert!(fs::read(&ours).unwrap() == image.bytes(), "the export is not the database");
    cluster.check();
}

#[test]
fn an_export_of_what_is_not_there_is_refused() {
    let cluster = Cluster::of(2);
    for node in &cluster.nodes {
        let path = node.scratch("none.db");
        fs::write(&path, "keep me").unwrap();
        let output = node.litefs("export", &["-name", "none.db", path.to_str().unwrap()]);
        assert!(!output.status.success());
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains("database not found"), "{text}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "keep me");
    }
    cluster.check();
}

/// Nothing that a node does for others makes an application fail that is alone with its database and
/// has no busy timeout, as is SQLite's default.
#[test_matrix(["delete", "wal"], ["auto", "off"])]
fn who_writes_alone_is_never_refused_for_a_copy(mode: &str, passthrough: &'static str) {
    let primary = Node::primary(&Settings { passthrough, ..Settings::default() });
    let file = primary.file(DB);
    create(&file, 4096, mode, 2000);
    let copies = &AtomicU64::new(0);
    std::thread::scope(|scope| {
        let (stop, stopped) = mpsc::channel::<()>();
        let node = &primary;
        scope.spawn(move || {
            while stopped.try_recv() == Err(TryRecvError::Empty) {
                export(node);
                copies.fetch_add(1, Ordering::Relaxed);
            }
        });
        let connection = Connection::open(&file).unwrap();
        connection.busy_timeout(Duration::ZERO).unwrap();
        let begin = Instant::now();
        let mut written = 0;
        let is_alone = || copies.load(Ordering::Relaxed) < 2;
        while begin.elapsed() < Duration::from_secs(1) || written < 50 || is_alone() {
            assert!(begin.elapsed() < wait::DEADLINE, "nothing was in the way");
            connection.execute("insert into t values (1)", []).expect("nobody else is there");
            written += 1;
        }
        drop(stop);
    });
}
