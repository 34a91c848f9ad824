//! What an application does on the primary, and what its replica has then: every journal mode, page
//! size and way of serving the files.

use test_case::test_matrix;

use super::Cluster;
use crate::support::image::Image;
use crate::support::node::Settings;
use crate::support::sqlite;

/// What an application does, step by step; each step is a process of its own.
const STEPS: &[&str] = &[
    "create table t(id integer primary key, x text, y blob)",
    "with recursive n(i) as (select 1 union all select i + 1 from n where i < 500)
     insert into t select i, 'row ' || i, randomblob(i) from n",
    "update t set x = x || ' again', y = randomblob(200) where id % 7 = 0",
    "delete from t where id % 3 = 0",
    "create index t_x on t(x); create index t_y on t(y, x)",
    "begin; delete from t; insert into t values (1, 'gone', zeroblob(100000)); rollback",
    "pragma cache_size = 5; begin; update t set y = randomblob(900); rollback",
    "begin; insert into t(x) values ('a'); savepoint s; update t set y = zeroblob(3);
     rollback to s; insert into t(x) values ('b'); commit",
    "drop index t_y",
    "insert into t(x, y) values ('large', randomblob(300000))",
    "delete from t where id > 40",
    "vacuum",
    "begin immediate; commit",
    "drop table t; create table u(a, b); insert into u values (1, randomblob(5000))",
    "reindex; analyze; vacuum; insert into u select * from u",
];

#[test_matrix(["delete", "truncate", "persist", "wal"], [512, 4096, 65536], ["auto", "off"], ["auto"])]
#[test_matrix(["delete", "wal"], [4096], ["auto", "off"], ["dev"])]
fn a_replica_has_the_same_pages_after_each_step(
    mode: &str,
    page_size: u32,
    passthrough: &'static str,
    transport: &'static str,
) {
    let cluster = Cluster::with(2, &Settings { passthrough, transport, ..Settings::default() });
    let path = cluster.file("app.db");
    let start = format!("pragma page_size = {page_size}; pragma journal_mode = {mode}");
    assert_eq!(sqlite::run(&path, &format!("{start};")), mode);
    for step in STEPS {
        sqlite::run(&path, &format!("pragma journal_mode = {mode}; {step};"));
        let pos = cluster.sync("app.db");
        let image = Image::of_files(&cluster.replica().db_dir("app.db")).unwrap();
        assert_eq!(image.checksum(), pos.checksum, "{step}");
    }
    cluster.check();
}
