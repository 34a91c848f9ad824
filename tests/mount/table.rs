//! The life of a database in every journal mode, with every kind of page size, over each transport,
//! with the kernel serving the bytes and with us doing it. After each step the number of transactions
//! and the pages are as expected.

use test_case::test_matrix;

use super::{
    DB, Node, Watched, check_integrity, check_silent, check_stopped, sqlite, strict, strict_over,
};

#[test_matrix(["delete", "truncate", "persist", "wal"], [4096], ["auto", "off"], ["uring", "dev"])]
#[test_matrix(["delete", "truncate", "persist", "wal"], [512, 65536], ["auto", "off"], ["auto"])]
fn a_database_lives_through_everything(
    mode: &str,
    page_size: u32,
    passthrough: &'static str,
    transport: &'static str,
) {
    let mut node = strict_over(transport, passthrough);
    let rows = live(&node, mode, page_size);
    let pos = node.pos(DB);
    check_silent(&node);
    node.stop();
    assert_eq!(check_stopped(&node.db_dir(DB)), pos);
    node.start();
    assert_eq!(node.pos(DB), pos, "after a restart");
    let found = sqlite::run(&node.file(DB), "pragma integrity_check; select count(*) from t;");
    assert_eq!(found, format!("ok\n{rows}"));
    let mut watched = Watched::new(&node, DB);
    let again = sqlite::open(&node.file(DB));
    watched.run(&again, "insert into t(a, b) values (1, 'after')", 1);
    watched.check_chain();
}

/// Every step with its transactions; how many rows are left at the end.
fn live(node: &Node, mode: &str, page_size: u32) -> i64 {
    let wal = mode == "wal";
    let mut watched = Watched::new(node, DB);
    let db = &sqlite::open(&node.file(DB));
    // SQLite begins to write, which makes page 1, before it sees that there is nothing to change.
    watched.run(db, &format!("pragma page_size={page_size}; pragma auto_vacuum=incremental"), 1);
    let switched: String = sqlite::value(db, &format!("pragma journal_mode={mode}"));
    assert_eq!(switched, mode);
    // The switch to WAL is a transaction of its own.
    watched.expect("journal_mode", u64::from(wal));

    watched.run(db, "create table t(id integer primary key, a int, b text)", 1);
    let fill = "insert into t(a, b) select value, hex(randomblob(value % 300)) \
                from generate_series(1, 400)";
    let fill = fill.replace("generate_series(1, 400)", SERIES);
    watched.run(db, &fill, 1);
    watched.run(db, "update t set b = b || 'x' where a % 3 = 0", 1);
    // As long as no page is free, SQLite puts every page back.
    spill(db, &mut watched, "rollback", 0);
    watched.run(db, "delete from t where a % 5 = 0", 1);
    watched.run(db, "begin immediate; commit", 0);
    watched.run(db, "begin exclusive; rollback", 0);
    watched.run(db, "begin; select count(*) from t; commit", 0);
    watched.run(db, "begin; update t set b = 'gone'; rollback", 0);
    watched.run(db, "insert into t(a, b) values (7, 'after a rollback')", 1);
    spill(db, &mut watched, "commit", 1);
    savepoints(db, &mut watched);
    watched.run(db, "create index i on t(b)", 1);
    watched.run(db, "create index j on t(a, b); drop index j", 2);
    watched.run(db, "drop index i", 1);
    check_integrity(db);
    watched.run(db, "delete from t where id % 2 = 0", 1);
    watched.run(db, "pragma incremental_vacuum(3)", 1);
    watched.run(db, "pragma incremental_vacuum", 1);
    watched.run(db, "pragma auto_vacuum = full", 1);
    watched.run(db, "delete from t where a % 7 = 0", 1);
    watched.run(db, "vacuum", 1);
    watched.run(db, "create table u(x); insert into u values (zeroblob(200000)); drop table u", 3);
    if wal {
        checkpoints(db, &mut watched);
    }
    check_integrity(db);
    watched.check_chain();
    sqlite::value(db, "select count(*) from t")
}

/// A table of the numbers 1 to 400, with the column `value`.
const SERIES: &str = "(with recursive n(value) as (select 1 union all select value + 1 from n \
                      where value < 400) select value from n)";

/// A transaction that is larger than the page cache, so that pages go to the file before its end.
fn spill(db: &super::Connection, watched: &mut Watched<'_>, end: &str, transactions: u64) {
    let cache: i64 = sqlite::value(db, "pragma cache_size");
    watched.run(db, &spill_sql(end, cache), transactions);
}

fn spill_sql(end: &str, cache: i64) -> String {
    format!(
        "pragma cache_size = 4; begin; update t set b = b || hex(randomblob(40)); \
         insert into t(a, b) select a, b from t limit 100; update t set a = a + 1; {end}; \
         pragma cache_size = {cache}"
    )
}

fn savepoints(db: &super::Connection, watched: &mut Watched<'_>) {
    watched.run(db, "savepoint s; insert into t(a, b) values (1, 's'); release s", 1);
    // A dirty page 1 with another change counter is left of it.
    watched.run(
        db,
        "savepoint s; insert into t(a, b) values (2, 's'); rollback to s; release s",
        1,
    );
    watched.run(db, "savepoint s; insert into t(a, b) values (2, 's'); rollback to s; rollback", 0);
    let nested = "begin; insert into t(a, b) values (3, 'outer'); savepoint s; \
                  update t set b = 'inner'; rollback to s; release s; commit";
    watched.run(db, nested, 1);
    let kept: i64 = sqlite::value(db, "select count(*) from t where b = 'inner'");
    assert_eq!(kept, 0);
}

fn checkpoints(db: &super::Connection, watched: &mut Watched<'_>) {
    for kind in ["passive", "full", "restart", "truncate"] {
        watched.run(db, "insert into t(a, b) values (9, 'before a checkpoint')", 1);
        let busy: i64 = sqlite::value(db, &format!("pragma wal_checkpoint({kind})"));
        assert_eq!(busy, 0, "{kind}");
        watched.expect(kind, 0);
        watched.check_chain();
    }
}

/// SQLite does not put the old content of free pages into its journal: after a rollback they are
/// other pages than before, in a way that only a checksum of the whole database can tell.
#[test_matrix(["delete", "truncate", "persist"], ["auto", "off"])]
fn a_rollback_over_free_pages_leaves_a_true_position(mode: &str, passthrough: &'static str) {
    let node = strict(passthrough);
    let mut watched = Watched::new(&node, DB);
    let db = &sqlite::open(&node.file(DB));
    let sql = format!("pragma journal_mode={mode}; create table t(id integer primary key, a, b)");
    watched.run(db, &sql, 1);
    watched.run(db, &format!("insert into t(a, b) select value, zeroblob(4000) from {SERIES}"), 1);
    watched.run(db, "delete from t where id < 300", 1);
    let before: i64 = sqlite::value(db, "select sum(id) from t");
    // In a process of its own: SQLite's page caches lend each other memory within one, so that
    // tests beside this one would decide which pages spill.
    let spilled = format!("pragma journal_mode={mode}; {}", spill_sql("rollback", -2000));
    sqlite::run(&node.file(DB), &spilled);
    watched.expect("a rollback", 1);
    assert_eq!(before, sqlite::value::<i64>(db, "select sum(id) from t"));
    check_integrity(db);
    watched.check_chain();
    check_silent(&node);
}
