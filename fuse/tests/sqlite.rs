//! SQLite's own program on a mounted directory.

use std::path::Path;
use std::process::Command;

use fuse::Transport;

use crate::volume::{EVERY, Mounted, Way, mounted};

/// Runs SQLite's own program; what it prints.
#[track_caller]
fn sqlite(database: &Path, sql: &str) -> String {
    let mut command = Command::new("sqlite3");
    command.args(["-bail", "-cmd", ".timeout 20000"]).arg(database).arg(sql);
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && error.is_empty(), "{sql}: {error}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn check(transport: Transport, way: Way, journal_mode: &str) {
    let mounted = mounted(transport, way);
    let database = mounted.path("app.db");
    let mode = sqlite(&database, &format!("PRAGMA journal_mode = {journal_mode};"));
    assert_eq!(mode, journal_mode, "{transport:?} {way:?}");
    sqlite(&database, "CREATE TABLE t (id INTEGER PRIMARY KEY, text);");
    writers(&mounted);
    assert_eq!(sqlite(&database, "SELECT count(*), count(DISTINCT text) FROM t;"), "100|100");
    sqlite(&database, "DELETE FROM t WHERE id % 2; VACUUM;");
    assert_eq!(sqlite(&database, "PRAGMA integrity_check; SELECT count(*) FROM t;"), "ok\n50");
    let backing = mounted.backing("app.db");
    assert_eq!(sqlite(&backing, "PRAGMA integrity_check; SELECT count(*) FROM t;"), "ok\n50");
}

/// Four processes at once, each inserting 25 rows, some of them large.
fn writers(mounted: &Mounted) {
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let database = mounted.path("app.db");
            scope.spawn(move || {
                let insert = |row: i32| {
                    format!(
                        "INSERT INTO t (text) VALUES \
                         ('{writer}-{row}' || hex(zeroblob({row} * 300)));"
                    )
                };
                let inserts: String = (0..25).map(insert).collect();
                sqlite(&database, &inserts);
            });
        }
    });
}

#[test]
fn a_rollback_journal_works_in_every_way() {
    for (transport, way) in EVERY {
        check(transport, way, "delete");
    }
}

#[test]
fn a_write_ahead_log_works_in_every_way_that_shares_memory() {
    for (transport, way) in EVERY.into_iter().filter(|(_, way)| *way != Way::Direct) {
        check(transport, way, "wal");
    }
}
