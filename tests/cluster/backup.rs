//! A second copy elsewhere: in a directory, and on a server.

use std::fs;

use ltx::Pos;
use test_case::{test_case, test_matrix};

use super::lease::is_primary;
use super::{Cluster, check_node};
use crate::support::consul::Consul;
use crate::support::image::{self, Image};
use crate::support::node::{Lease, Member, Node, READY, Settings};
use crate::support::shell::Shell;
use crate::support::vault::{self, Cloud, Snapshots, Vault};
use crate::support::{sqlite, wait};

const DB: &str = "app.db";
const OTHER: &str = "other.db";

/// How often a backup is looked at, for tests that wait for it.
const TIMING: &str = "delay: 20ms, full-sync-interval: 300ms";

#[derive(Debug, Clone, Copy)]
enum Kind {
    File,
    Cloud,
}
use Kind::{Cloud as OnServer, File as InDirectory};

/// A backup of either kind.
struct Backup {
    vault: Vault,
    cloud: Option<Cloud>,
}

impl Backup {
    fn new(kind: Kind) -> Backup {
        match kind {
            Kind::File => Backup { vault: Vault::new(), cloud: None },
            Kind::Cloud => {
                let cloud = Cloud::start();
                Backup { vault: cloud.vault.clone(), cloud: Some(cloud) }
            }
        }
    }

    /// What stands in the configuration.
    fn lines(&self) -> &'static str {
        let place = match &self.cloud {
            None => format!("type: file, path: {}", self.vault.path().display()),
            Some(cloud) => format!(
                "type: litefs-cloud, url: '{}', cluster: '{}', auth-token: '{}'",
                cloud.url(),
                vault::CLUSTER,
                vault::TOKEN
            ),
        };
        Box::leak(format!("backup: {{{place}, {TIMING}}}").into_boxed_str())
    }

    fn settings(&self) -> Settings {
        Settings { lines: self.lines(), ..Settings::default() }
    }

    /// Waits until all of a database of `node` is in the backup, which leads to its pages.
    #[track_caller]
    fn check(&self, node: &Node, name: &str) -> Pos {
        let pos = node.pos(name);
        self.vault.wait_for_pos(name, pos);
        let image = Image::of_files(&node.db_dir(name));
        let ours = image.as_ref().map_or(&[][..], Image::bytes);
        assert!(self.vault.database(name) == ours, "{name}: the backup has other pages");
        pos
    }
}

fn run(node: &Node, sql: &str) -> String {
    sqlite::run(&node.file(DB), sql)
}

fn count(node: &Node) -> String {
    run(node, "select count(*) from t")
}

/// How many LTX files a node keeps of the database.
fn kept(node: &Node) -> usize {
    image::chain_files(&node.db_dir(DB)).len()
}

/// Everything comes in increments, also after a restart, and what was committed last before the end.
#[test_matrix([InDirectory, OnServer], ["delete", "wal"])]
fn a_backup_follows_its_primary(kind: Kind, mode: &str) {
    let backup = Backup::new(kind);
    let mut node = Node::primary(&backup.settings());
    run(&node, &format!("pragma journal_mode={mode}; create table t (x)"));
    backup.check(&node, DB);
    for n in 0..3 {
        run(&node, &format!("insert into t values ({n})"));
        backup.check(&node, DB);
    }
    run(&node, "insert into t select randomblob(2000) from generate_series(1, 500)");
    run(&node, "delete from t where x is not null; vacuum");
    backup.check(&node, DB);
    sqlite::run(&node.file("other.db"), "create table o (x)");
    backup.check(&node, "other.db");
    run(&node, "insert into t values ('last')");
    let pos = node.pos(DB);
    assert!(node.stop().success());
    assert_eq!(backup.vault.pos(DB), pos, "what was committed last is there at the end");
    node.start();
    run(&node, "insert into t values ('after')");
    backup.check(&node, DB);
    let whole = backup.vault.files(DB).into_iter().filter(|(min, ..)| *min == ltx::Txid(1));
    assert_eq!(whole.count(), 1, "only the first one is a snapshot");
    fs::remove_file(node.file("other.db")).unwrap();
    backup.check(&node, "other.db");
    check_node(&node, DB, node.pos(DB));
}

/// A node without data is ready when it has what its backup has, and goes on from there.
#[test_matrix([InDirectory, OnServer])]
fn an_empty_node_gets_what_its_backup_has(kind: Kind) {
    let backup = Backup::new(kind);
    let mut node = Node::primary(&backup.settings());
    run(&node, "pragma journal_mode=wal; create table t (x)");
    for n in 0..5 {
        run(&node, &format!("insert into t values ({n})"));
        backup.check(&node, DB);
    }
    sqlite::run(&node.file("other.db"), "create table o (x); insert into o values (7)");
    let positions = [DB, "other.db"].map(|name| backup.check(&node, name));
    node.stop();
    let node = Node::primary(&backup.settings());
    assert_eq!([DB, "other.db"].map(|name| node.pos(name)), positions, "as soon as it is ready");
    assert_eq!((count(&node).as_str(), node.log_count("restored from the backup")), ("5", 2));
    assert_eq!(sqlite::run(&node.file("other.db"), "select x from o"), "7");
    run(&node, "insert into t values (5)");
    backup.check(&node, DB);
    check_node(&node, DB, node.pos(DB));
    assert!(!node.db_dir(DB).lost_found().exists(), "nothing was in its place");
}

/// What somebody does who wants the state before a mistake: in a copy, which this backup is here.
#[test]
fn a_backup_without_its_last_files_is_an_earlier_state() {
    let backup = Backup::new(InDirectory);
    let mut node = Node::primary(&backup.settings());
    run(&node, "pragma journal_mode=wal; create table t (x)");
    backup.check(&node, DB);
    run(&node, "insert into t values (1)");
    let wanted = backup.check(&node, DB);
    for sql in ["delete from t", "insert into t values ('a mistake')"] {
        run(&node, sql);
        backup.check(&node, DB);
    }
    node.stop();
    let later = backup.vault.files(DB).into_iter().filter(|(_, max, _)| *max > wanted.txid);
    assert_eq!(later.map(|(.., path)| fs::remove_file(path).unwrap()).count(), 2);
    let node = Node::primary(&backup.settings());
    assert_eq!((node.pos(DB), run(&node, "select x from t").as_str()), (wanted, "1"));
}

/// A server that has two databases, and where they stand.
fn two_on_a_server() -> (Backup, [Pos; 2]) {
    let backup = Backup::new(OnServer);
    let mut node = Node::primary(&backup.settings());
    run(&node, "create table t (x); insert into t values (1)");
    sqlite::run(&node.file(OTHER), "create table o (x); insert into o values (7)");
    let positions = [DB, OTHER].map(|name| backup.check(&node, name));
    node.stop();
    (backup, positions)
}

/// Has what the backup has, and had it before it said that it is ready.
#[track_caller]
fn check_restored(node: &Node, positions: [Pos; 2]) {
    assert_eq!([DB, OTHER].map(|name| node.pos(name)), positions);
    assert_eq!(sqlite::run(&node.file(OTHER), "select x from o"), "7");
    let log = node.log();
    let line_of = |what: &str| log.lines().position(|line| line.contains(what));
    let restored = line_of("restored from the backup\" db=other.db");
    assert!(restored.is_some() && restored < line_of(READY), "{log}");
    assert!(!node.data().join("restoring").exists(), "it is done");
}

/// A database of the backup that cannot be restored yet is waited for: an application would begin another
/// history of it.
#[test]
fn an_empty_node_waits_for_each_database_of_its_backup() {
    let (backup, positions) = two_on_a_server();
    let cloud = backup.cloud.as_ref().unwrap();
    cloud.send_snapshots(Snapshots::Damaged(OTHER));
    let before = cloud.snapshots_asked(OTHER);
    let mut node = Node::new(&backup.settings(), Member::Primary);
    node.spawn();
    wait::until_true("a second try", || cloud.snapshots_asked(OTHER) >= before + 2);
    node.wait_for_log("waiting to connect to cluster");
    node.wait_for_pos(DB, positions[0]);
    assert!(!node.log().contains(READY), "{}", node.log());
    cloud.send_snapshots(Snapshots::Whole);
    node.wait_ready();
    check_restored(&node, positions);
    backup.check(&node, OTHER);
}

/// A node that was killed between two databases of its backup has data, but is not ready with it.
#[test]
fn a_restore_that_was_killed_is_finished_by_the_next_start() {
    let (backup, positions) = two_on_a_server();
    let cloud = backup.cloud.as_ref().unwrap();
    let node = || {
        cloud.send_snapshots(Snapshots::Held(OTHER));
        let before = cloud.snapshots_asked(OTHER);
        let mut node = Node::new(&backup.settings(), Member::Primary);
        node.spawn();
        wait::until_true("the second restore", || cloud.snapshots_asked(OTHER) > before);
        node.kill();
        node
    };
    let mut killed = node();
    killed.spawn();
    killed.wait_for_log("a restore from the backup was begun");
    killed.wait_for_log("waiting to connect to cluster");
    killed.wait_for_pos(DB, positions[0]);
    assert!(!killed.log().contains(READY), "{}", killed.log());
    cloud.send_snapshots(Snapshots::Whole);
    killed.wait_ready();
    check_restored(&killed, positions);
    backup.check(&killed, OTHER);

    // Another one becomes a replica, which is ready with what its primary has.
    let mut follower = node();
    let id = fs::read(killed.data().join("clusterid")).unwrap();
    fs::write(follower.data().join("clusterid"), id).unwrap();
    let url = killed.url();
    follower.configure(&backup.settings(), Member::Replica(&url));
    follower.start();
    assert_eq!([DB, OTHER].map(|name| follower.pos(name)), positions);
    assert!(!follower.data().join("restoring").exists(), "there is nothing left to restore");
}

/// A directory that is away, as that of a disk that is not mounted, is not begun anew where it should be, and a
/// node without data waits for it.
#[test]
fn a_directory_that_is_missing_is_no_empty_backup() {
    let backup = Backup::new(InDirectory);
    let path = backup.vault.path();
    let away = path.with_extension("away");
    let missing = || {
        fs::rename(path, &away).unwrap();
        format!("backup directory {} is missing", path.display())
    };
    let come_back = || {
        assert!(!path.exists());
        fs::rename(&away, path).unwrap();
    };
    let mut node = Node::primary(&backup.settings());
    run(&node, "create table t (x)");
    backup.check(&node, DB);
    let line = missing();
    run(&node, "insert into t values (1)");
    node.wait_for_log(&line);
    come_back();
    let pos = backup.check(&node, DB);
    node.stop();
    let line = missing();
    let mut empty = Node::new(&backup.settings(), Member::Primary);
    empty.spawn();
    empty.wait_for_log(&line);
    empty.wait_for_log("waiting to connect to cluster");
    assert!(!empty.log().contains(READY), "{}", empty.log());
    come_back();
    empty.wait_ready();
    assert_eq!(empty.pos(DB), pos);
}

/// A lease that is lost before everything was restored, and comes back.
#[test]
fn a_lease_that_is_lost_for_a_moment_ends_no_restore() {
    let (backup, positions) = two_on_a_server();
    let (cloud, consul) = (backup.cloud.as_ref().unwrap(), Consul::start());
    cloud.send_snapshots(Snapshots::Held(OTHER));
    let (url, before) = (&consul.url(), cloud.snapshots_asked(OTHER));
    let lease = Lease { url, hostname: "a", advertise: "", candidate: true, ttl: "10s" };
    let mut node = Node::new(&backup.settings(), Member::Consul(lease));
    node.spawn();
    node.wait_for_log("waiting for what its backup has");
    wait::until_true("the second restore", || cloud.snapshots_asked(OTHER) > before);
    consul.delete("test/lease");
    wait::until_true("the lease again", || cloud.snapshots_asked(OTHER) > before + 1);
    node.wait_for_log("waiting to connect to cluster");
    assert!(!node.log().contains(READY), "{}", node.log());
    cloud.send_snapshots(Snapshots::Whole);
    node.wait_ready();
    check_restored(&node, positions);
}

/// A last file in the backup that is cut off: nothing is made of that database, and the others go on.
#[test_case(50; "in its header")]
#[test_case(ltx::HEADER_SIZE + 10; "after its header")]
fn a_torn_file_in_the_backup_holds_up_its_database_only(len: usize) {
    let backup = Backup::new(InDirectory);
    let mut node = Node::primary(&backup.settings());
    run(&node, "create table t (x)");
    sqlite::run(&node.file(OTHER), "create table o (x); insert into o values (7)");
    let positions = [DB, OTHER].map(|name| backup.check(&node, name));
    node.stop();
    let (_, _, whole) = backup.vault.files(OTHER).pop().unwrap();
    let (next, refused) = (positions[1].txid.next(), "other.db: not backed up for now");
    let torn = backup.vault.dir(OTHER).join(ltx::file_name(next, next));
    fs::write(&torn, &fs::read(whole).unwrap()[..len]).unwrap();
    let files = backup.vault.files(OTHER);
    node.start();
    sqlite::run(&node.file(OTHER), "insert into o values (8)");
    run(&node, "insert into t values (1)");
    let first = backup.check(&node, DB);
    node.wait_for_log(refused);
    let path = torn.display().to_string();
    assert!(node.log().lines().any(|line| line.contains(refused) && line.contains(&path)));
    node.stop();

    let mut empty = Node::new(&backup.settings(), Member::Primary);
    empty.spawn();
    empty.wait_for_log(refused);
    empty.wait_for_log("waiting to connect to cluster");
    empty.wait_for_pos(DB, first);
    assert!(!empty.log().contains(READY), "{}", empty.log());
    assert_eq!(backup.vault.files(OTHER), files, "nothing was sent or removed");
    // Somebody looks at the file and removes it.
    fs::remove_file(torn).unwrap();
    empty.wait_ready();
    check_restored(&empty, [first, positions[1]]);
    empty.stop();
    node.start();
    backup.check(&node, OTHER);
    assert_eq!(sqlite::run(&node.file(OTHER), "select count(*) from o"), "2");
}

/// A file before the last one that is cut off is met only by who restores.
#[test]
fn a_torn_file_in_the_middle_holds_up_one_restore_only() {
    let backup = Backup::new(InDirectory);
    let mut node = Node::primary(&backup.settings());
    sqlite::run(&node.file(OTHER), "create table o (x); insert into o values (7)");
    let other = backup.check(&node, OTHER);
    run(&node, "create table t (x)");
    backup.check(&node, DB);
    run(&node, "insert into t values (1)");
    let pos = backup.check(&node, DB);
    node.stop();
    let (_, _, path) = backup.vault.files(DB).swap_remove(0);
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..50]).unwrap();
    let mut empty = Node::new(&backup.settings(), Member::Primary);
    empty.spawn();
    empty.wait_for_log("app.db: not backed up for now");
    empty.wait_for_pos(OTHER, other);
    assert!(!empty.log().contains(READY), "{}", empty.log());
    fs::write(&path, whole).unwrap();
    empty.wait_ready();
    check_restored(&empty, [pos, other]);
}

/// Two histories of one database, of which the backup's has fewer or more transactions.
#[test_matrix([InDirectory, OnServer], [1, 9])]
fn two_histories_stay_as_they_are(kind: Kind, transactions: u32) {
    let backup = Backup::new(kind);
    let mut stranger = Node::primary(&backup.settings());
    run(&stranger, "create table t (x)");
    for n in 0..transactions {
        run(&stranger, &format!("insert into t values ({n})"));
    }
    backup.check(&stranger, DB);
    stranger.stop();
    let files = backup.vault.files(DB);

    let mut node = Node::primary(&Settings::default());
    run(&node, "create table t (x, y)");
    for n in 0..4 {
        run(&node, &format!("insert into t values ({n}, 'mine')"));
    }
    let pos = node.pos(DB);
    node.stop();
    node.configure(&backup.settings(), Member::Primary);
    node.start();
    node.wait_for_log("backup stands still");
    sqlite::run(&node.file("other.db"), "create table o (x)");
    backup.check(&node, "other.db");
    run(&node, "insert into t values (4, 'mine')");
    let stalled = format!("litefs_db_backup_stalled{{db=\"{DB}\"}}");
    assert_eq!(node.metric(&stalled), 1.0);
    let status = node.litefs("status", &[]).stdout;
    assert!(String::from_utf8_lossy(&status).contains("BACKUP STANDS STILL"));
    assert_eq!((node.pos(DB).txid, count(&node).as_str()), (pos.txid.next(), "5"));
    assert_eq!(backup.vault.files(DB), files, "the backup is as it was");
    // Somebody decides for the node.
    fs::rename(backup.vault.dir(DB), node.scratch("decided")).unwrap();
    backup.check(&node, DB);
    wait::until_true("a backup that goes on", || node.metric(&stalled) == 0.0);
    assert_eq!(node.log_count("backup stands still"), 1, "it is said once");
}

/// A backup of `kind` with one history of [`DB`], which ends in a table with 'theirs', and nothing else.
fn strangers_backup(kind: Kind) -> (Backup, Pos) {
    let backup = Backup::new(kind);
    let mut stranger = Node::primary(&backup.settings());
    run(&stranger, "create table t (x); insert into t values ('theirs')");
    let pos = backup.check(&stranger, DB);
    stranger.stop();
    (backup, pos)
}

/// What docs/operations.md says to do with a stopped node where the backup counts.
fn let_the_backup_count(node: &Node) {
    fs::rename(node.db_dir(DB).path(), node.scratch("moved away")).unwrap();
    fs::write(node.data().join("restoring"), "").unwrap();
}

/// Two histories, of which a person chooses the backup's. The node has another database, and must not be ready
/// without the one that is to come.
#[test]
fn a_node_gets_the_history_that_its_backup_has() {
    let (backup, theirs) = strangers_backup(OnServer);
    let cloud = backup.cloud.as_ref().unwrap();
    let mut cluster = Cluster::of(2);
    run(cluster.primary(), "create table t (x); insert into t values ('ours'), ('and ours')");
    sqlite::run(&cluster.file(OTHER), "create table o (x); insert into o values (7)");
    let ours = cluster.sync(DB);
    let other = cluster.sync(OTHER);
    cluster.nodes.iter_mut().for_each(|node| _ = node.stop());
    let url = cluster.primary().url();
    cluster.nodes[0].configure(&backup.settings(), Member::Primary);
    cluster.nodes[1].configure(&backup.settings(), Member::Replica(&url));

    let node = &mut cluster.nodes[0];
    node.start();
    node.wait_for_log("backup stands still");
    node.stop();
    let_the_backup_count(node);
    cloud.send_snapshots(Snapshots::Held(DB));
    let before = cloud.snapshots_asked(DB);
    node.spawn();
    node.wait_for_log("a restore from the backup was begun");
    wait::until_true("the restore", || cloud.snapshots_asked(DB) > before);
    node.wait_for_log("waiting to connect to cluster");
    assert!(!node.log().contains(READY), "{}", node.log());
    cloud.send_snapshots(Snapshots::Whole);
    node.wait_ready();
    assert_eq!((node.pos(DB), node.pos(OTHER)), (theirs, other));
    assert_eq!(run(node, "select x from t"), "theirs");
    assert!(!node.data().join("restoring").exists(), "it is done");

    let replica = &mut cluster.nodes[1];
    replica.start();
    replica.wait_for_pos(DB, theirs);
    let lost = fs::read_dir(replica.db_dir(DB).lost_found()).unwrap();
    let lost = lost.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let has_ours =
        |name: String| ltx::parse_file_name(&name).is_some_and(|(_, max)| max == ours.txid);
    assert!(lost.into_iter().any(has_ours), "what was here is kept");
    run(cluster.primary(), "insert into t values ('more')");
    backup.check(cluster.primary(), DB);
    cluster.sync(DB);
    cluster.check();
}

/// With a lease an empty node does not begin by itself where the last primary had data: a person says so.
#[test]
fn a_forced_primary_gets_what_its_backup_has() {
    let (backup, theirs) = strangers_backup(InDirectory);
    let consul = Consul::start();
    let member = |hostname| {
        let url = Box::leak(consul.url().into_boxed_str());
        Member::Consul(Lease { url, hostname, advertise: "", candidate: true, ttl: "10s" })
    };
    let mut nodes = ["a", "b"].map(|name| Node::new(&Settings::default(), member(name)));
    nodes.iter_mut().for_each(Node::start);
    run(&nodes[0], "create table t (x); insert into t values ('ours'), ('and ours')");
    nodes[1].wait_for_pos(DB, nodes[0].pos(DB));
    for (node, name) in nodes.iter_mut().zip(["a", "b"]).rev() {
        node.stop();
        node.configure(&backup.settings(), member(name));
    }
    let [node, other] = &mut nodes;
    let_the_backup_count(node);
    node.spawn();
    node.wait_for_log("to begin with what its backup has");
    let forced = node.litefs("promote", &["-force"]);
    assert!(forced.status.success(), "{}", node.log());
    node.wait_ready();
    assert_eq!((node.pos(DB), run(node, "select x from t").as_str()), (theirs, "theirs"));
    other.start();
    other.wait_for_pos(DB, theirs);
    assert!(other.db_dir(DB).lost_found().exists(), "what was here is kept");
    run(node, "insert into t values ('more')");
    let pos = backup.check(node, DB);
    other.wait_for_pos(DB, pos);
    check_node(node, DB, pos);
    check_node(other, DB, pos);
}

/// What somebody restores on the backup's side is taken over by a node of which the backup has all.
#[test_matrix([InDirectory, OnServer], ["delete", "wal"])]
fn a_backup_that_was_set_back_on_purpose_is_followed(kind: Kind, mode: &str) {
    let backup = Backup::new(kind);
    let cluster = Cluster::with(2, &backup.settings());
    let node = cluster.primary();
    run(node, &format!("pragma journal_mode={mode}; create table t (x); insert into t values (1)"));
    backup.check(node, DB);
    let earlier = backup.vault.database(DB);
    run(node, "delete from t; insert into t values ('a mistake')");
    let before = backup.check(node, DB);
    let mut readers = [node, cluster.replica()].map(|node| {
        cluster.sync(DB);
        Shell::open(&node.file(DB))
    });
    for reader in &mut readers {
        assert_eq!(reader.run("select x from t"), "a mistake");
    }
    let set = backup.vault.set(DB, &earlier, 7);
    // Another transaction, for the counters of page 1.
    wait::until_true("the restore", || node.pos(DB).txid == set.txid.next());
    // As many as there were: who remembers pages by the change counter alone would find the mistake.
    run(node, "insert into t values (2); insert into t values (3)");
    cluster.sync(DB);
    for reader in &mut readers {
        assert_eq!(reader.run("select x from t order by x"), "1\n2\n3");
    }
    backup.check(node, DB);
    wait::until_true("a note of that", || {
        let known = fs::read_to_string(node.db_dir(DB).backup()).unwrap_or_default();
        known.starts_with(&node.pos(DB).to_string())
    });
    cluster.check();
    let lost = fs::read_dir(node.db_dir(DB).lost_found()).unwrap();
    let lost = lost.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let has_last =
        |name: String| ltx::parse_file_name(&name).is_some_and(|(_, max)| max == before.txid);
    assert!(lost.into_iter().any(has_last), "what was replaced is kept");
}

/// A server that is away, or says that it cannot now: nothing is lost, and no LTX file is removed before
/// it is in the backup, on the replica neither.
#[test]
fn files_are_kept_until_they_are_in_the_backup() {
    let mut backup = Backup::new(OnServer);
    let data = ", retention: 1ms, retention-monitor-interval: 20ms";
    let mut cluster = Cluster::with(2, &Settings { data, ..backup.settings() });
    let (node, replica) = (cluster.primary(), cluster.replica());
    run(node, "pragma journal_mode=wal; create table t (x)");
    let first = backup.check(node, DB);
    backup.cloud.as_ref().unwrap().refuse(true);
    node.wait_for_log("refused to ask for positions of: 503 not now");
    backup.cloud.as_mut().unwrap().stop();
    // More than fit into one upload.
    run(node, "pragma journal_mode=delete; pragma synchronous=off");
    let inserts = "pragma synchronous=off; insert into t values (1);\n".repeat(300);
    run(node, &inserts);
    cluster.sync(DB);
    wait::until_true("an error", || node.metric("litefs_backup_error_count") > 1.0);
    for node in [node, replica] {
        let begins = image::chain_files(&node.db_dir(DB))[0].0;
        assert!(begins <= first.txid.next(), "{begins} is the first, the backup is at {first}");
    }
    assert!(kept(node) > 256);
    let cloud = backup.cloud.as_mut().unwrap();
    cloud.refuse(false);
    cloud.resume();
    backup.check(node, DB);
    node.wait_for_log("works again");
    // The newest stays, and what the mark is not past: the last upload.
    run(node, "insert into t values ('one more')");
    let last = backup.check(node, DB);
    let hwm = format!("litefs_db_backup_hwm{{db=\"{DB}\"}}");
    for node in [node, replica] {
        wait::until_true("a mark", || node.metric(&hwm) == last.txid.0 as f64);
        wait::until_true("no old files", || kept(node) <= 2);
    }
    // A restart does not forget the mark.
    let node = &mut cluster.nodes[0];
    node.stop();
    backup.cloud.as_mut().unwrap().stop();
    node.start();
    assert_eq!(node.metric(&hwm), last.txid.0 as f64);
    backup.cloud.as_mut().unwrap().resume();
    cluster.check();
}

/// Another page size is another database for LTX files: in a directory the whole of it follows, a server
/// is not sent what it could not merge.
#[test_matrix([InDirectory, OnServer])]
fn a_page_size_change_reaches_the_backup_or_stops_it(kind: Kind) {
    let backup = Backup::new(kind);
    let mut node = Node::primary(&backup.settings());
    run(&node, "create table t (x); insert into t values (1)");
    let before = backup.check(&node, DB);
    run(&node, "pragma page_size=8192; vacuum");
    match kind {
        Kind::File => {
            run(&node, "insert into t values (2)");
            let pos = backup.check(&node, DB);
            node.stop();
            let node = Node::primary(&backup.settings());
            assert_eq!((node.pos(DB), count(&node).as_str()), (pos, "2"));
            check_node(&node, DB, pos);
        }
        Kind::Cloud => {
            node.wait_for_log("the page size has changed, and a server cannot merge the two");
            assert_eq!(backup.vault.pos(DB), before);
            let stalled = format!("litefs_db_backup_stalled{{db=\"{DB}\"}}");
            assert_eq!(node.metric(&stalled), 1.0);
            let status = node.litefs("status", &[]).stdout;
            assert!(String::from_utf8_lossy(&status).contains("set another backup.cluster"));
            run(&node, "insert into t values (2)");
            // Somebody does one of the two: it goes on, without a restart, and all of it is there.
            fs::rename(backup.vault.dir(DB), node.scratch("removed there")).unwrap();
            let pos = backup.check(&node, DB);
            wait::until_true("a backup that goes on", || node.metric(&stalled) == 0.0);
            run(&node, "insert into t values (3)");
            assert_eq!(backup.check(&node, DB).txid, pos.txid.next());
            assert_eq!(count(&node), "3");
        }
    }
}

/// The lease goes to another node, and comes back: the backup goes on from where it stands.
#[test]
fn a_new_primary_goes_on_with_the_backup() {
    let backup = Backup::new(OnServer);
    let consul = Consul::start();
    let node = |hostname: &str| {
        let lease =
            Lease { url: &consul.url(), hostname, advertise: "", candidate: true, ttl: "10s" };
        let mut node = Node::new(&backup.settings(), Member::Consul(lease));
        node.start();
        node
    };
    let mut nodes = [node("a"), node("b")];
    run(&nodes[0], "pragma journal_mode=wal; create table t (x)");
    backup.check(&nodes[0], DB);
    for round in 1..=2 {
        let next = &nodes[round % 2];
        assert!(next.litefs("promote", &[]).status.success(), "{}", next.log());
        assert!(is_primary(next));
        run(next, "insert into t values (1)");
        backup.check(next, DB);
    }
    // What was committed last, on a node that dies at once.
    let pos = nodes[0].pos(DB);
    nodes[1].wait_for_pos(DB, pos);
    nodes[0].kill();
    wait::until_true("another primary", || is_primary(&nodes[1]));
    run(&nodes[1], "insert into t values (2)");
    backup.check(&nodes[1], DB);
    let whole = backup.vault.files(DB).into_iter().filter(|(min, ..)| *min == ltx::Txid(1));
    assert_eq!(whole.count(), 1, "only the first one is a snapshot");
    assert_eq!(nodes[1].log_count("stands still"), 0);
}

/// The server is told the cluster's id and the instance that answered, and a wrong token is named.
#[test]
fn calls_are_as_litefs_cloud_knows_them() {
    let backup = Backup::new(OnServer);
    let mut node = Node::primary(&backup.settings());
    run(&node, "create table t (x)");
    backup.check(&node, DB);
    let requests = backup.cloud.as_ref().unwrap().requests();
    let id = fs::read_to_string(node.data().join("clusterid")).unwrap();
    let id = id.trim();
    let tx = format!("POST /db/tx?db=app.db&cluster=my%20cluster id={id} instance=instance-1");
    assert!(requests.contains(&tx), "{tx} in {requests:#?}");
    let first = format!("GET /pos?cluster=my%20cluster id={id} instance=");
    assert_eq!(requests[0], first);
    node.stop();
    let lines = backup.lines().replace(vault::TOKEN, "another secret");
    let lines: &str = Box::leak(lines.into_boxed_str());
    node.configure(&Settings { lines, ..Settings::default() }, Member::Primary);
    node.start();
    node.wait_for_log("401 EUNAUTHORIZED who are you?");
    assert!(!node.log().contains("another secret"));
}
