//! Writes on a replica: refused, with an error that an application understands, and nothing changed.

use std::fs;
use std::io;

use rusqlite::ErrorCode;
use test_case::test_case;

use super::Cluster;
use crate::support::image::Image;
use crate::support::node::Settings;
use crate::support::{sqlite, wait};

/// Each would change a database.
const WRITES: &[&str] = &[
    "insert into t values (7)",
    "update t set x = 8",
    "delete from t",
    "create table v(x)",
    "drop table t",
    "vacuum",
    "create index i on t(x)",
    "pragma user_version = 5",
    "begin; insert into t values (7); commit",
    "begin immediate; insert into t values (7); commit",
    "begin exclusive; insert into t values (7); commit",
];

/// Rollback modes: the journal cannot be made. WAL: the WRITE lock is not granted.
#[test_case("delete", "auto", ErrorCode::ReadOnly)]
#[test_case("delete", "off", ErrorCode::ReadOnly)]
#[test_case("truncate", "auto", ErrorCode::ReadOnly)]
#[test_case("truncate", "off", ErrorCode::ReadOnly)]
#[test_case("persist", "auto", ErrorCode::ReadOnly)]
#[test_case("persist", "off", ErrorCode::ReadOnly)]
#[test_case("wal", "auto", ErrorCode::DatabaseBusy)]
#[test_case("wal", "off", ErrorCode::DatabaseBusy)]
fn a_write_on_a_replica_is_refused_and_changes_nothing(
    mode: &str,
    passthrough: &'static str,
    expected: ErrorCode,
) {
    let cluster = Cluster::with(2, &Settings { passthrough, ..Settings::default() });
    let setup = "create table t(x); insert into t values (1), (2)";
    sqlite::run(&cluster.file("app.db"), &format!("pragma journal_mode = {mode}; {setup}"));
    let pos = cluster.sync("app.db");
    let replica = cluster.replica();
    let before = Image::of_files(&replica.db_dir("app.db")).unwrap();

    let reader = sqlite::open(&replica.file("app.db"));
    // The position is there a moment before the locks under which a snapshot is applied are gone.
    assert_eq!(sqlite::value::<i64>(&reader, "select sum(x) from t"), 3);
    reader.busy_timeout(std::time::Duration::ZERO).unwrap();
    reader.pragma_update(None, "journal_mode", mode).unwrap();
    for sql in WRITES {
        let error = reader.execute_batch(sql).expect_err(sql);
        assert_eq!(error.sqlite_error_code(), Some(expected), "{sql}: {error}");
        let _ = reader.execute_batch("rollback");
        assert_eq!(sqlite::value::<i64>(&reader, "select sum(x) from t"), 3, "after {sql}");
    }
    sqlite::refused(&replica.file("app.db"), ".timeout 0\ninsert into t values (7);");
    drop(reader);
    assert!(replica.pos("app.db") == pos && cluster.primary().pos("app.db") == pos);
    let after = Image::of_files(&replica.db_dir("app.db")).unwrap();
    assert!(before.differences(&after).is_empty() && before.pages() == after.pages());
    assert_eq!(replica.log_count("refused a write"), 1, "one line a minute");

    sqlite::run(&cluster.file("app.db"), "insert into t values (4)");
    cluster.sync("app.db");
    assert_eq!(sqlite::run(&replica.file("app.db"), "select sum(x) from t"), "7");
    cluster.check();
}

#[test_case("pragma journal_mode = delete", "wal")]
#[test_case("pragma journal_mode = wal", "delete")]
fn a_replica_does_not_switch_the_journal_mode(sql: &str, mode: &str) {
    let cluster = Cluster::of(2);
    let setup = format!("pragma journal_mode = {mode}; create table t(x)");
    sqlite::run(&cluster.file("app.db"), &setup);
    let pos = cluster.sync("app.db");
    let replica = cluster.replica();
    sqlite::refused(
        &replica.file("app.db"),
        &format!(".timeout 0\n{sql}; insert into t values (1);"),
    );
    assert_eq!(sqlite::run(&replica.file("app.db"), "pragma journal_mode"), mode);
    assert_eq!(replica.pos("app.db"), pos);
    sqlite::run(&cluster.file("app.db"), "insert into t values (4)");
    cluster.check();
}

#[test]
fn files_cannot_be_made_or_removed_on_a_replica() {
    let cluster = Cluster::of(2);
    sqlite::run(&cluster.file("app.db"), "create table t(x)");
    sqlite::run(&cluster.file("log.db"), "pragma journal_mode = wal; create table t(x)");
    cluster.sync("app.db");
    cluster.sync("log.db");
    let replica = cluster.replica();
    let denied = |result: io::Result<()>| {
        let kind = result.expect_err("must be refused").kind();
        assert!(
            matches!(
                kind,
                io::ErrorKind::PermissionDenied
                    | io::ErrorKind::ReadOnlyFilesystem
                    | io::ErrorKind::ResourceBusy
            ),
            "{kind:?}"
        );
    };
    for name in ["app.db", "log.db"] {
        denied(fs::remove_file(replica.file(name)));
        denied(fs::write(replica.file(name), "text"));
        denied(fs::File::options().write(true).open(replica.file(name)).and_then(|f| f.set_len(0)));
    }
    denied(fs::write(replica.file("new.db"), "text"));
    denied(fs::write(replica.file("app.db-journal"), "text"));
    sqlite::refused(&replica.file("new.db"), "create table t(x);");
    sqlite::run(&cluster.file("app.db"), "insert into t values (1)");
    cluster.check();
}

#[test]
fn both_sides_say_who_is_primary_and_how_far_they_are() {
    let cluster = Cluster::of(2);
    sqlite::run(&cluster.file("app.db"), "create table t(x)");
    sqlite::run(&cluster.file("log.db"), "pragma journal_mode = wal; create table t(x)");
    let pos = cluster.sync("app.db");
    cluster.sync("log.db");
    let (primary, replica) = (cluster.primary(), cluster.replica());
    assert!(!primary.file(".primary").exists());
    assert_eq!(fs::read_to_string(replica.file(".primary")).unwrap(), "primary\n");
    assert_eq!(fs::read_to_string(replica.file("app.db-pos")).unwrap(), format!("{pos}\n"));
    assert_eq!(primary.databases(), ["app.db", "log.db"]);
    assert_eq!(replica.databases(), ["app.db", "log.db"]);
    let lag = |node: &crate::support::node::Node| -> i64 {
        fs::read_to_string(node.file(".lag")).unwrap().trim().parse().unwrap()
    };
    assert_eq!(lag(primary), 0);
    wait::until_true("a small lag", || (-100..3000).contains(&lag(replica)));
    assert!(!replica.file("app.db-journal").exists());
    cluster.check();
}
