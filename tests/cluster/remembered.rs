//! Connections that stay open while transactions that they have seen go, and others of the same numbers
//! come: no answer is made of what is not there any more.

use std::fs;

use test_case::{test_case, test_matrix};

use super::Cluster;
use super::join::{copy, create};
use super::lease::{is_primary, primary_of};
use crate::support::consul::{Consul, Link};
use crate::support::node::{Lease, Member, Node, Settings};
use crate::support::sqlite::{self, Session};
use crate::support::wait;

/// Two applications that have a database open: one is this process.
struct Open {
    inside: rusqlite::Connection,
    outside: Session,
    /// How the node reaches its primary, if it is through this.
    way: Option<Link>,
}

impl Open {
    fn on(node: &Node) -> Open {
        let path = node.file("app.db");
        Open { inside: sqlite::open(&path), outside: Session::open(&path), way: None }
    }

    /// What each says to a question of one value, or its complaint.
    fn ask(&mut self, sql: &str) -> [String; 2] {
        let inside = self.inside.query_row(sql, [], |row| row.get::<_, String>(0));
        let inside = inside.unwrap_or_else(|error| format!("Error: {error}"));
        [inside, self.outside.run(&format!("{sql};"))]
    }

    #[track_caller]
    fn check(&mut self, sql: &str, expected: &str) {
        assert_eq!(self.ask(sql), [expected; 2], "{sql}");
    }

    /// They get an error that makes an application open its database again, every time.
    #[track_caller]
    fn check_ended(&mut self, sql: &str) {
        for _ in 0..2 {
            for answer in self.ask(sql) {
                let ended = ["disk I/O error", "unable to open database file"];
                assert!(ended.iter().any(|text| answer.contains(text)), "{sql}: {answer}");
            }
        }
    }
}

/// The primary makes `theirs` in place of `gone`, which the replica, whose connections are open, has seen.
fn go_another_way(
    mode: &str,
    passthrough: &'static str,
    gone: &str,
    theirs: &str,
) -> (Cluster, Open) {
    let settings = Settings { passthrough, ..Settings::default() };
    let mut cluster = Cluster::with(1, &settings);
    let way = Link::to(cluster.primary().address());
    let mut replica = Node::new(&settings, Member::Replica(&format!("http://{}", way.address())));
    replica.start();
    cluster.nodes.push(replica);
    create(cluster.primary(), "app.db", mode);
    sqlite::run(&cluster.file("app.db"), "update t set x = 'common' where rowid = 1");
    cluster.sync("app.db");
    cluster.nodes[0].stop();
    let (data, old) = (cluster.primary().data(), cluster.primary().scratch("old"));
    copy(&data, &old);
    cluster.nodes[0].start();
    let mut open = Open::on(cluster.replica());
    open.check("select x from t where rowid = 1", "common");
    sqlite::run(&cluster.file("app.db"), gone);
    cluster.sync("app.db");
    open.check(SEEN, "gone");
    // It sees nothing of what the primary has before it has all.
    way.cut();
    cluster.nodes[0].stop();
    copy(&old, &data);
    cluster.nodes[0].start();
    sqlite::run(&cluster.file("app.db"), theirs);
    way.mend();
    open.way = Some(way);
    cluster.sync("app.db");
    // Whichever of the two is ahead by now.
    cluster.replica().wait_for_log("kept in lost+found");
    let kept = fs::read_dir(cluster.replica().db_dir("app.db").lost_found()).unwrap();
    assert!(kept.count() > 0);
    (cluster, open)
}

/// What the connections have seen.
const SEEN: &str = "select max(x) from seen";

fn table(name: &str, x: &str) -> String {
    format!("create table {name}(x); insert into {name} values ('{x}')")
}

/// The schema cookies are the same, the schemas are not.
#[test_matrix(["delete", "wal"], ["auto", "off"])]
fn a_schema_that_is_gone_gives_no_answers(mode: &str, passthrough: &'static str) {
    let (gone, theirs) = (table("seen", "gone"), table("other", "theirs"));
    let (cluster, mut open) = go_another_way(mode, passthrough, &gone, &theirs);
    open.check_ended(SEEN);
    open.check_ended("select count(*) from t");
    // Who opens the database anew is not concerned, also beside one that did not.
    let mut anew = Open::on(cluster.replica());
    anew.check("select x from other", "theirs");
    sqlite::run(&cluster.file("app.db"), "update other set x = 'later'");
    cluster.sync("app.db");
    anew.check("select x from other", "later");
    open.check_ended(SEEN);
    anew.way = open.way.take();
    drop(open);
    anew.check("select x from other", "later");
    sqlite::run(&cluster.file("app.db"), "update other set x = 'last'");
    cluster.sync("app.db");
    anew.check("select x from other", "last");
    let way = anew.way.take();
    drop(anew);
    cluster.check();
    drop(way);
}

/// The cookie that was seen comes later.
#[test]
fn a_schema_cookie_that_comes_again_later_is_no_trap() {
    let gone = format!("create table u(x); {}", table("seen", "gone"));
    let (cluster, mut open) = go_another_way("wal", "auto", &gone, "delete from t");
    open.check_ended(SEEN);
    let way = open.way.take();
    drop(open);
    cluster.check();
    drop(way);
}

/// Page and schema caches stay where nothing can be mistaken, and connections with them.
#[test_case("wal", "update t set x = 'theirs'"; "wal")]
#[test_case("delete", "delete from t where rowid > 1; update t set x = 'theirs'"; "delete")]
#[test_case("wal", "create table a(x); update t set x = 'theirs'"; "newer cookie")]
fn connections_that_cannot_be_mistaken_go_on(mode: &str, theirs: &str) {
    let gone = "create view seen as select x from t; update t set x = 'gone'";
    let theirs = format!("create view seen as select x from t; {theirs}");
    let (cluster, mut open) = go_another_way(mode, "auto", gone, &theirs);
    open.check(SEEN, "theirs");
    assert_eq!(cluster.replica().log_count("opens the database again"), 0);
    let way = open.way.take();
    drop(open);
    cluster.check();
    drop(way);
}

/// Without a WAL the change counter is all that SQLite looks at.
#[test_case("auto")]
#[test_case("off")]
fn pages_that_are_gone_give_no_answers(passthrough: &'static str) {
    let view = "create view seen as select x from t;";
    let gone = format!("{view} update t set x = 'gone'");
    let theirs = format!("{view} update t set x = 'them'");
    let (cluster, mut open) = go_another_way("delete", passthrough, &gone, &theirs);
    open.check_ended(SEEN);
    let mut anew = Open::on(cluster.replica());
    anew.check(SEEN, "them");
    let way = open.way.take();
    drop((open, anew));
    cluster.check();
    drop(way);
}

/// The application whose own transactions are gone: its node was primary, and lost the lease while it
/// went on.
#[test_case("delete")]
#[test_case("wal")]
fn a_former_primary_gives_no_answers_from_its_own_lost_schema(mode: &str) {
    let consul = Consul::start();
    let way = Link::to(consul.address());
    let lease = |url, hostname, advertise| {
        Member::Consul(Lease { url, hostname, advertise, candidate: true, ttl: "4s" })
    };
    let url = format!("http://{}", way.address());
    let mut former = Node::new(&Settings::default(), lease(&url, "node0", ""));
    let peers = Link::to(former.address());
    let advertise = format!("http://{}", peers.address());
    former.configure(&Settings::default(), lease(&url, "node0", &advertise));
    former.start();
    let url = consul.url();
    let mut next = Node::new(&Settings::default(), lease(&url, "node1", ""));
    next.start();
    create(&former, "app.db", mode);
    next.wait_for_pos("app.db", former.pos("app.db"));
    let mut open = Open::on(&former);
    open.check("select count(*) || '' from t", "200");
    peers.cut();
    open.outside.run(&format!("{};", table("seen", "gone")));
    open.check(SEEN, "gone");
    way.cut();
    wait::until_true("another primary", || is_primary(&next));
    sqlite::run(&next.file("app.db"), &table("other", "theirs"));
    way.mend();
    peers.mend();
    wait::until_true("the former primary to follow", || primary_of(&former) == "node1");
    former.wait_for_pos("app.db", next.pos("app.db"));
    open.check_ended(SEEN);
    let mut anew = Open::on(&former);
    anew.check("select x from other", "theirs");
    // It may lead again, and write.
    former.litefs("promote", &[]);
    wait::until_true("the former primary to lead", || is_primary(&former));
    anew.outside.run("insert into other values ('z');");
    drop(open);
    anew.check("select max(x) from other", "z");
    assert!(fs::read_dir(former.db_dir("app.db").lost_found()).unwrap().count() > 0);
}
