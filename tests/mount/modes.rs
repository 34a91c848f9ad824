//! Pragmas that change how SQLite writes: journal modes, page sizes, locking modes, attached
//! databases.

use std::os::unix::fs::FileExt;
use std::path::Path;

use litefs::engine::layout::DbDir;
use test_case::{test_case, test_matrix};

use super::{
    DB, Node, Watched, check_chain, check_integrity, check_silent, sqlite, strict, strict_over,
};
use crate::support::node::Member;
use crate::support::shell::Shell;

/// Rows that make a database of some pages.
const FILL: &str = "create table t(id integer primary key, a, b); \
    with recursive n(i) as (select 1 union all select i + 1 from n where i < 300) \
    insert into t(a, b) select i, hex(randomblob(100)) from n";

#[track_caller]
fn switch(connection: &super::Connection, mode: &str) {
    let found: String = sqlite::value(connection, &format!("pragma journal_mode={mode}"));
    assert_eq!(found, mode);
}

#[test_matrix(["auto", "off"], ["auto", "dev"])]
fn the_journal_mode_changes_while_others_have_the_database_open(
    passthrough: &'static str,
    transport: &'static str,
) {
    let node = strict_over(transport, passthrough);
    let mut watched = Watched::new(&node, DB);
    let db = &sqlite::open(&node.file(DB));
    watched.run(db, FILL, 2);
    let mut count = 300;
    let modes = ["wal", "delete", "wal", "truncate", "wal", "persist", "delete", "wal"];
    for mode in modes {
        let before: String = sqlite::value(db, "pragma journal_mode");
        let mut other = Shell::open(&node.file(DB));
        assert_eq!(other.run("select count(*) from t"), count.to_string());
        if before == "wal" {
            // An open connection keeps the WAL.
            sqlite::refused(&node.file(DB), &format!(".timeout 1\npragma journal_mode={mode};"));
            watched.expect("a refused change", 0);
            other.run("insert into t(a, b) values (1, 'by the other')");
            watched.expect("a write of the other", 1);
            count += 1;
            other.close();
            // Or SQLite goes on with the pages of its cache: it finds out about those that others
            // wrote to a WAL as long as it reads from the WAL, but not afterwards.
            let seen: i64 = sqlite::value(db, "select count(*) from t");
            assert_eq!(seen, count);
            switch(db, mode);
            watched.expect(mode, 1);
        } else {
            switch(db, mode);
            watched.expect(mode, u64::from(mode == "wal"));
            other.run("insert into t(a, b) values (1, 'by the other')");
            watched.expect("a write of the other", 1);
            count += 1;
            other.close();
        }
        // SQLite leaves alone what has that value already.
        watched.run(db, "update t set a = a + 1 where id % 3 = 0", 1);
        watched.run(db, "begin; delete from t; rollback", 0);
        watched.check_chain();
    }
    check_integrity(db);
    check_silent(&node);
}

#[test_matrix(["delete", "truncate", "persist"], ["auto", "off"])]
fn vacuum_changes_the_page_size(mode: &str, passthrough: &'static str) {
    let mut node = strict(passthrough);
    let mut watched = Watched::new(&node, DB);
    let db = sqlite::open(&node.file(DB));
    switch(&db, mode);
    watched.run(&db, FILL, 2);
    for page_size in [512, 65536, 1024, 4096] {
        watched.run(&db, &format!("pragma page_size={page_size}; vacuum"), 1);
        assert_eq!(sqlite::value::<u32>(&db, "pragma page_size"), page_size);
        watched.run(&db, "insert into t(a, b) values (1, 'between')", 1);
        watched.check_chain();
    }
    check_integrity(&db);
    drop(db);
    let pos = node.pos(DB);
    check_silent(&node);
    node.stop();
    node.start();
    assert_eq!(node.pos(DB), pos);
}

#[test_case("auto")]
#[test_case("off")]
fn a_kept_journal_may_be_cut_to_a_size(passthrough: &'static str) {
    let node = strict(passthrough);
    let mut watched = Watched::new(&node, DB);
    let db = &sqlite::open(&node.file(DB));
    switch(db, "persist");
    watched.run(db, &format!("pragma journal_size_limit=3000; {FILL}"), 2);
    for _ in 0..3 {
        watched.run(db, "update t set a = a + 1", 1);
        let journal = node.db_dir(DB).journal().metadata().unwrap().len();
        assert!(journal <= 3000, "journal of {journal} bytes");
    }
    watched.run(db, "begin; update t set a = a + 1; rollback", 0);
    watched.check_chain();
    check_silent(&node);
}

#[test_matrix(["memory", "off"], ["auto", "off"])]
fn a_journal_mode_without_transactions_is_refused(mode: &str, passthrough: &'static str) {
    let node = strict(passthrough);
    let mut watched = Watched::new(&node, DB);
    let file = node.file(DB);
    watched.run(&sqlite::open(&file), FILL, 2);
    let before = sqlite::run(&file, ".dump");
    let complaint =
        sqlite::refused(&file, &format!("pragma journal_mode={mode}; update t set a = a + 1;"));
    assert!(complaint.contains("disk I/O error"), "{complaint}");
    watched.expect(mode, 0);
    assert_eq!(sqlite::run(&file, ".dump"), before, "nothing has changed");
    assert_eq!(node.log_count("use journal_mode"), 1, "{}", node.log());
    let db = sqlite::open(&file);
    watched.run(&db, "update t set a = a + 1", 1);
    check_integrity(&db);
    watched.check_chain();
}

#[test_matrix(["delete", "truncate", "persist"], ["auto", "off"])]
fn an_exclusive_connection_commits_one_by_one(mode: &str, passthrough: &'static str) {
    let node = strict(passthrough);
    let mut watched = Watched::new(&node, DB);
    let db = sqlite::open(&node.file(DB));
    switch(&db, mode);
    watched.run(&db, &format!("pragma locking_mode=exclusive; {FILL}"), 2);
    for _ in 0..3 {
        watched.run(&db, "update t set a = a + 1 where id < 9", 1);
        watched.run(&db, "begin; update t set b = 'gone'; rollback", 0);
        watched.run(&db, "begin immediate; commit", 0);
    }
    watched.run(&db, "pragma locking_mode=normal; select count(*) from t", 0);
    drop(db);
    let found = sqlite::run(&node.file(DB), "update t set a = 0; pragma integrity_check;");
    assert_eq!(found, "ok");
    watched.expect("another process", 1);
    watched.check_chain();
    check_silent(&node);
}

#[test_case("auto")]
#[test_case("off")]
fn a_wal_without_index_is_refused(passthrough: &'static str) {
    let node = strict(passthrough);
    let file = node.file(DB);
    let mut watched = Watched::new(&node, DB);
    sqlite::run(&file, &format!("pragma journal_mode=wal; {FILL};"));
    watched.expect("fill", 3);
    let before = sqlite::run(&file, ".dump");
    sqlite::refused(&file, "pragma locking_mode=exclusive; insert into t(a) values (1);");
    watched.expect("exclusive from the start", 0);
    let fresh = node.file("fresh.db");
    sqlite::refused(
        &fresh,
        "pragma locking_mode=exclusive; pragma journal_mode=wal; create table t(x);",
    );
    assert_eq!(sqlite::run(&file, ".dump"), before);
    watched.run(&sqlite::open(&file), "insert into t(a) values (1)", 1);
    watched.check_chain();
}

/// What an exclusive connection commits is not seen one by one, but it must not be lost.
#[test_case("auto")]
#[test_case("off")]
fn an_exclusive_connection_to_a_wal_is_captured_when_it_ends(passthrough: &'static str) {
    let node = strict(passthrough);
    let file = node.file(DB);
    let mut shell = Shell::open(&file);
    shell.run(&format!("pragma journal_mode=wal; {FILL}"));
    let before = node.pos(DB).txid.0;
    shell.run("pragma locking_mode=exclusive; update t set a = a + 1");
    for _ in 0..5 {
        shell.run("insert into t(a, b) values (1, 'exclusive')");
    }
    shell.run("update t set b = 'changed' where id = 3; select count(*) from t");
    shell.close();
    let found = sqlite::run(&file, "pragma integrity_check; select count(*) from t;");
    assert_eq!(found, "ok\n305");
    assert!(node.pos(DB).txid.0 > before, "nothing was captured");
    let mut watched = Watched::new(&node, DB);
    watched.check_chain();
    watched.run(&sqlite::open(&file), "insert into t(a) values (1)", 1);
    watched.check_chain();
}

#[test_case("auto")]
#[test_case("off")]
fn an_exclusive_connection_to_a_wal_is_captured_when_it_becomes_normal(passthrough: &'static str) {
    let node = strict(passthrough);
    let file = node.file(DB);
    let mut shell = Shell::open(&file);
    shell.run(&format!("pragma journal_mode=wal; {FILL}"));
    shell.run("pragma locking_mode=exclusive; update t set a = a + 1");
    shell.run("insert into t(a, b) values (1, 'exclusive')");
    shell.run("pragma locking_mode=normal; select 1 from t");
    let found = sqlite::run(&file, "pragma integrity_check; select count(*) from t;");
    assert_eq!(found, "ok\n301");
    shell.run("insert into t(a, b) values (1, 'normal')");
    let watched = Watched::new(&node, DB);
    watched.check_chain();
}

/// SQLite does not wait for anybody here, nor does it on a bare file system.
#[test_case("auto")]
#[test_case("off")]
fn a_read_only_wal_index_is_no_obstacle_after_an_import(passthrough: &'static str) {
    let node = strict(passthrough);
    let source = node.scratch("source.db");
    sqlite::run(&source, "pragma journal_mode=wal; create table t(x); insert into t values (7)");
    let mut shell = Shell::open(&node.file(DB));
    shell.run("pragma journal_mode=wal; create table t(x); insert into t values (1)");
    let imported = node.litefs("import", &["-name", DB, source.to_str().unwrap()]);
    assert!(imported.status.success(), "{imported:?}");
    // Nobody is left who has the wal-index open, and nobody removed it.
    shell.kill();
    let read_only = format!("file:{}?readonly_shm=1", node.file(DB).display());
    assert_eq!(sqlite::run(Path::new(&read_only), "select x from t"), "7");
    assert_eq!(sqlite::run(&node.file(DB), "insert into t values (8); select sum(x) from t"), "15");
    check_chain(&node.db_dir(DB), node.pos(DB));
}

#[test_matrix(["delete", "truncate", "persist", "wal"], ["auto", "off"])]
fn one_transaction_changes_two_databases(mode: &str, passthrough: &'static str) {
    let node = strict(passthrough);
    let names = ["one.db", "two.db"];
    for name in names {
        let db = sqlite::open(&node.file(name));
        switch(&db, mode);
        db.execute_batch(FILL).unwrap();
    }
    let mut watched = names.map(|name| Watched::new(&node, name));
    let db = sqlite::open(&node.file("one.db"));
    let two = node.file("two.db").display().to_string();
    db.execute_batch(&format!("attach '{two}' as two; pragma two.journal_mode={mode}")).unwrap();
    for round in 0..3 {
        let change = "update main.t set a = a + 1; update two.t set a = a + 2";
        db.execute_batch(&format!("begin; {change}; commit")).unwrap();
        watched.iter_mut().for_each(|one| one.expect("commit of both", 1));
        db.execute_batch(&format!("begin; {change}; rollback")).unwrap();
        watched.iter_mut().for_each(|one| one.expect("rollback of both", 0));
        db.execute_batch("begin; update main.t set a = 0; commit").unwrap();
        watched[0].expect("commit of one", 1);
        watched[1].expect("commit of the other", 0);
        let sum: i64 = sqlite::value(&db, "select a from two.t where id = 300");
        assert_eq!(sum, 300 + 2 * (round + 1));
    }
    for one in &watched {
        one.check_chain();
    }
    assert_eq!(node.databases(), names, "a super-journal is left");
    check_silent(&node);
}

#[test_case("delete", "auto")]
#[test_case("delete", "off")]
#[test_case("wal", "auto")]
#[test_case("wal", "off")]
fn a_database_may_be_mapped_into_memory(mode: &str, passthrough: &'static str) {
    let node = strict(passthrough);
    let mut watched = Watched::new(&node, DB);
    let db = &sqlite::open(&node.file(DB));
    db.execute_batch("pragma mmap_size=100000000").unwrap();
    switch(db, mode);
    watched.expect(mode, u64::from(mode == "wal"));
    watched.run(db, FILL, 2);
    let mut other = Shell::open(&node.file(DB));
    other.run("pragma mmap_size=100000000");
    for round in 1..=5 {
        watched.run(db, &format!("update t set b = 'mine {round}'"), 1);
        let sql =
            format!("select distinct b from t; update t set a = {round}; select max(a) from t");
        assert_eq!(other.run(&sql), format!("mine {round}\n{round}"));
        watched.expect("the other's update", 1);
        watched.run(db, "delete from t where id in (select id from t limit 20)", 1);
        watched.run(db, "vacuum", 1);
        if mode == "wal" {
            db.execute_batch("pragma wal_checkpoint(truncate)").unwrap();
        }
    }
    check_integrity(db);
    assert_eq!(other.run("pragma integrity_check; select count(*) from t"), "ok\n200");
    watched.check_chain();
    check_silent(&node);
}

/// Transactions of one database do not wait for those of another.
#[test]
fn many_databases_live_side_by_side() {
    let mut node = strict("auto");
    let names: Vec<String> = (0..12).map(|n| format!("db-{n:02}.sqlite")).collect();
    let files: Vec<_> = names.iter().map(|name| node.file(name)).collect();
    std::thread::scope(|scope| {
        for (n, file) in files.iter().enumerate() {
            scope.spawn(move || {
                let db = sqlite::open(file);
                switch(&db, ["wal", "delete", "persist"][n % 3]);
                db.execute_batch(FILL).unwrap();
                for _ in 0..10 {
                    db.execute_batch("update t set a = a + 1").unwrap();
                }
            });
        }
    });
    assert_eq!(node.databases(), names);
    let before: Vec<_> = names.iter().map(|name| node.pos(name)).collect();
    for (n, (name, pos)) in names.iter().zip(&before).enumerate() {
        assert_eq!(pos.txid.0, 12 + u64::from(n % 3 == 0), "{name}");
        check_chain(&node.db_dir(name), *pos);
    }
    check_silent(&node);
    node.stop();
    node.start();
    let after: Vec<_> = names.iter().map(|name| node.pos(name)).collect();
    assert_eq!(before, after);
}

/// With 64 KiB pages the page that SQLite never uses, at 1 GiB, is the 16,385th.
#[test]
fn a_database_grows_over_the_lock_page() {
    const BEFORE: u32 = 16_380;
    let mut node = Node::new(&Default::default(), Member::Primary);
    make_sparse(&node.db_dir(DB), BEFORE);
    node.start();
    let db = sqlite::open(&node.file(DB));
    assert_eq!(sqlite::value::<u32>(&db, "pragma page_count"), BEFORE);
    db.execute_batch("insert into t values (randomblob(3000000))").unwrap();
    assert!(sqlite::value::<u32>(&db, "pragma page_count") > 16_385 + 20);
    switch(&db, "wal");
    db.execute_batch("insert into t values (randomblob(3000000))").unwrap();
    drop(db);
    let pos = node.pos(DB);
    node.stop();
    // Without this file every page is read and summed up.
    std::fs::remove_file(node.db_dir(DB).checksums()).unwrap();
    node.start();
    assert_eq!(node.pos(DB), pos);
    let mut watched = Watched::new(&node, DB);
    let db = sqlite::open(&node.file(DB));
    db.execute_batch("vacuum").unwrap();
    assert!(sqlite::value::<u32>(&db, "pragma page_count") < 150);
    check_integrity(&db);
    db.execute_batch("pragma wal_checkpoint(truncate)").unwrap();
    watched.expect("vacuum", 1);
}

/// A database of many pages of zeros that belong to nothing, as the node finds it at its start.
fn make_sparse(dir: &DbDir, pages: u32) {
    /// Where a database file says its size in pages (file format, section 1.3).
    const PAGES_AT: u64 = 28;
    std::fs::create_dir_all(dir.path()).unwrap();
    sqlite::run(&dir.database(), "pragma page_size=65536; create table t(b);");
    let file = std::fs::OpenOptions::new().write(true).open(dir.database()).unwrap();
    file.write_all_at(&pages.to_be_bytes(), PAGES_AT).unwrap();
    file.set_len(u64::from(pages) * 65536).unwrap();
}
