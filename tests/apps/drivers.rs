//! Drivers of SQLite and frameworks above them. Each has a script that works with a database on the
//! primary and prints what it then holds. On the replica it must print the same, and that a write
//! was refused.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rusqlite::params;
use test_case::test_matrix;

use super::{Pair, run, script};
use crate::support::node::Settings;
use crate::support::sqlite;

/// How a driver is called: program, script, and the settings that the script knows.
pub struct Driver {
    /// The interpreter.
    pub program: &'static str,
    /// Its file in `tests/apps/drivers`.
    pub script: &'static str,
    /// What stands last on its command line, each in a database of its own.
    pub settings: &'static [&'static str],
    /// What in `.ci` brings the driver and prints where it is, for the variable `DRIVER`.
    pub bring: Option<&'static str>,
}

const PYTHON: Driver = Driver {
    program: "python3",
    script: "python.py",
    settings: &["default", "wal", "rails", "truncate"],
    bring: None,
};
/// Debian's, which is where Debian's Django is.
const DJANGO: Driver = Driver {
    program: "/usr/bin/python3",
    script: "django_site.py",
    settings: &["delete", "wal"],
    bring: None,
};
const PHP: Driver =
    Driver { program: "php", script: "pdo.php", settings: &["delete", "wal"], bring: None };
const NODE: Driver = Driver {
    program: "node",
    script: "better.js",
    settings: &["delete", "wal"],
    bring: Some(".ci/better-sqlite3"),
};

#[test_matrix([PYTHON, DJANGO, PHP, NODE], ["auto", "off"])]
fn a_driver_works_on_the_primary_and_reads_on_the_replica(
    driver: Driver,
    passthrough: &'static str,
) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let place = driver.bring.map(|bring| run(&mut Command::new(root.join(bring))));
    check(driver.settings, passthrough, |mode, file, setting| {
        let mut command = Command::new(driver.program);
        command.envs(place.as_ref().map(|place| ("DRIVER", place)));
        command.arg(script("drivers").join(driver.script));
        run(command.arg(mode).arg(file).arg(setting))
    });
}

/// Plays a driver on a pair of nodes, with one database for each of its settings: `call` is given `write`
/// or `read`, the file and the setting.
#[track_caller]
fn check(settings: &[&str], passthrough: &'static str, call: impl Fn(&str, &Path, &str) -> String) {
    let pair = Pair::new(&Settings { passthrough, ..Settings::default() });
    for setting in settings {
        let name = format!("{setting}.db");
        let written = call("write", &pair.primary.file(&name), setting);
        pair.sync(&name);
        let read = call("read", &pair.replica.file(&name), setting);
        let (refusal, found) = read.split_once('\n').expect("a refusal, then what it holds");
        assert!(refusal.starts_with("refused: "), "{setting}: {refusal}");
        assert_eq!(found, written, "{setting}");
        pair.check(&name);
    }
    for node in [&pair.primary, &pair.replica] {
        assert_eq!(node.log_count("level=ERROR"), 0, "the log of {}", node.url());
    }
}

#[test_matrix(["auto", "off"])]
fn rusqlite_works_on_the_primary_and_reads_on_the_replica(passthrough: &'static str) {
    check(&["delete", "wal", "persist"], passthrough, |mode, file, setting| {
        let found = match mode {
            "write" => rusqlite_writes(file, setting),
            _ => rusqlite_reads(file),
        };
        found.unwrap()
    });
}

fn rusqlite_writes(file: &Path, journal: &str) -> rusqlite::Result<String> {
    let mut db = sqlite::open(file);
    db.pragma_update(None, "journal_mode", journal)?;
    db.execute_batch("create table t(id integer primary key, word text unique, data blob)")?;
    let transaction = db.transaction()?;
    {
        let mut insert = transaction.prepare("insert into t(word, data) values (?1, ?2)")?;
        for n in 0..100 {
            insert.execute(params![format!("word {n}"), vec![n as u8; n * 40]])?;
        }
    }
    transaction.commit()?;
    // Dropped, it is rolled back; an inner one is a savepoint.
    db.transaction()?.execute("delete from t", [])?;
    let mut outer = db.transaction()?;
    outer.savepoint()?.execute("delete from t", [])?;
    outer.execute("update t set data = ?1 where id = 7", [vec![0_u8; 200_000]])?;
    outer.commit()?;
    let again = db.execute("insert into t(word) values ('word 1')", []);
    let code = again.unwrap_err().sqlite_error_code();
    assert_eq!(code, Some(rusqlite::ErrorCode::ConstraintViolation));
    // A second connection works in turn.
    let other = sqlite::open(file);
    for n in 0..10 {
        let turn = if n % 2 == 0 { &other } else { &db };
        turn.execute("insert into t(word) values (?1)", [format!("turn {n}")])?;
    }
    db.execute_batch("delete from t where id % 10 = 3; vacuum")?;
    rusqlite_summary(&other)
}

fn rusqlite_reads(file: &Path) -> rusqlite::Result<String> {
    let db = sqlite::open(file);
    // A write on a replica in WAL mode is refused as "database is locked", which is waited for.
    db.busy_timeout(Duration::from_millis(200))?;
    let found = rusqlite_summary(&db)?;
    let refused = db.execute("insert into t(word) values ('refused')", []).unwrap_err();
    Ok(format!("refused: {refused}\n{found}"))
}

fn rusqlite_summary(db: &rusqlite::Connection) -> rusqlite::Result<String> {
    let sql = "select count(*) || ' ' || sum(length(data)) || ' ' || max(word) from t";
    db.query_row(sql, [], |row| row.get(0))
}

#[test_matrix(["auto", "off"])]
fn the_sqlite3_shell_works_on_the_primary_and_reads_on_the_replica(passthrough: &'static str) {
    check(&["delete", "wal", "truncate"], passthrough, |mode, file, setting| {
        if mode == "read" {
            let refused = sqlite::refused(file, "insert into t(word) values ('refused')");
            let refused = refused.lines().next().unwrap_or_default().to_owned();
            return format!("refused: {refused}\n{}", sqlite::run(file, ".dump"));
        }
        let work = format!(
            "pragma journal_mode={setting}; create table t(id integer primary key, word text, data blob);\n\
             create view long as select * from t where length(data) > 100;\n\
             with recursive n(i) as (select 1 union all select i + 1 from n where i < 200)\n\
             insert into t(word, data) select 'word ' || i, zeroblob(i) from n;\n\
             begin; delete from t; rollback;\n\
             begin; savepoint a; delete from t; rollback to a; update t set word = upper(word) where id < 9; end;\n\
             attach ':memory:' as other; create table other.c as select * from t; detach other;\n\
             vacuum; reindex; analyze;"
        );
        sqlite::run(file, &work);
        sqlite::run(file, ".dump")
    });
}
