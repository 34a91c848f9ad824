//! Nodes with a lease in a real Consul agent: who leads, and what becomes of it when something dies, is
//! cut off or stands still.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use ltx::{Pos, Txid};
use nix::sys::signal::Signal;
use test_case::{test_case, test_matrix};

use super::check_node;
use super::halt::{Halt, is_held};
use crate::support::certificates::{Certificates, leak};
use crate::support::consul::{Consul, Link};
use crate::support::node::{Lease, Member, Node, Settings};
use crate::support::shell::Shell;
use crate::support::{sqlite, wait};

pub const DB: &str = "app.db";

/// A TTL with room for pauses of a loaded machine.
pub const TTL: &str = "10s";
/// A TTL for tests in which a session has to run out.
const SHORT_TTL: &str = "4s";

/// Nodes with a lease in Consul.
struct Cluster {
    consul: Consul,
    nodes: Vec<Node>,
}

pub fn node(url: &str, hostname: &str, candidate: bool, ttl: &str) -> Node {
    let lease = Lease { url, hostname, advertise: "", candidate, ttl };
    Node::new(&Settings::default(), Member::Consul(lease))
}

impl Cluster {
    /// So many candidates, ready; the first one leads.
    fn of(count: usize, ttl: &str) -> Cluster {
        Cluster::with(&Settings::default(), count, ttl)
    }

    fn with(settings: &Settings, count: usize, ttl: &str) -> Cluster {
        let consul = Consul::start();
        let url = consul.url();
        let of = |n: usize| {
            let lease =
                Lease { url: &url, hostname: &name(n), advertise: "", candidate: true, ttl };
            Node::new(settings, Member::Consul(lease))
        };
        let mut nodes: Vec<Node> = (0..count).map(of).collect();
        nodes.iter_mut().for_each(Node::start);
        Cluster { consul, nodes }
    }

    /// Waits until one node leads and all others that run follow it; which.
    #[track_caller]
    fn settle(&self) -> usize {
        wait::until_or(
            || self.roles(),
            || {
                let running = |n: &usize| self.nodes[*n].is_running();
                let all: Vec<usize> = (0..self.nodes.len()).filter(running).collect();
                let leads = |n: &usize| is_primary(&self.nodes[*n]);
                let primary = all.iter().copied().find(leads)?;
                let follows =
                    |n: &usize| *n == primary || primary_of(&self.nodes[*n]) == name(primary);
                all.iter().all(follows).then_some(primary)
            },
        )
    }

    fn roles(&self) -> String {
        let running = self.nodes.iter().filter(|node| node.is_running());
        let text = |node: &Node| {
            let output = node.litefs("status", &[]).stdout;
            String::from_utf8_lossy(&output).into_owned()
        };
        running.map(text).collect()
    }

    /// Every running node has the same pages at the same position.
    #[track_caller]
    fn check(&self) {
        let primary = &self.nodes[self.settle()];
        let pos = primary.pos(DB);
        let ours = check_node(primary, DB, pos).expect("a database");
        for node in self.nodes.iter().filter(|node| node.is_running()) {
            node.wait_for_pos(DB, pos);
            let theirs = check_node(node, DB, pos).expect("a database");
            assert!(ours.0 == theirs.0, "pages differ");
        }
    }
}

fn name(number: usize) -> String {
    format!("node{number}")
}

fn status(node: &Node, field: &str) -> String {
    let output = node.litefs("status", &["-json"]).stdout;
    let json: serde_json::Value = serde_json::from_slice(&output).unwrap_or_default();
    json.pointer(field)
        .map_or_else(String::new, |value| value.as_str().unwrap_or_default().to_owned())
}

/// Whether the node says that it leads.
pub fn is_primary(node: &Node) -> bool {
    status(node, "/role") == "primary"
}

/// The primary's host name as `.primary` says it; empty without one.
pub fn primary_of(node: &Node) -> String {
    let text = std::fs::read_to_string(node.file(".primary")).unwrap_or_default();
    text.trim_end().to_owned()
}

pub fn insert(node: &Node, value: u32) {
    sqlite::run(&node.file(DB), &format!("insert into t values ({value})"));
}

pub fn create(node: &Node, mode: &str) {
    sqlite::run(&node.file(DB), &format!("pragma journal_mode = {mode}; create table t(x)"));
}

/// Waits until `node` takes a write.
#[track_caller]
fn wait_writable(node: &Node, value: u32) {
    let sql = format!("insert into t values ({value})");
    wait::until_or(
        || format!("a write; log:\n{}", node.log()),
        || sqlite::try_run(&node.file(DB), &sql).is_ok().then_some(()),
    );
}

pub fn rows(node: &Node) -> String {
    sqlite::run(&node.file(DB), "select group_concat(x) from (select x from t order by x)")
}

/// LiteFS: TestMultiNode_Simple.
#[test]
fn the_first_candidate_leads_and_the_others_follow() {
    let cluster = Cluster::of(2, TTL);
    assert_eq!(cluster.settle(), 0);
    create(&cluster.nodes[0], "wal");
    insert(&cluster.nodes[0], 1);
    cluster.check();
    let value = cluster.consul.value("test/lease").unwrap();
    let url = cluster.nodes[0].url();
    let expected = format!(r#"{{"hostname":"node0","advertise-url":"{url}","#);
    assert!(value.starts_with(&expected), "{value}");
    let id = cluster.consul.value("test/lease/clusterid").unwrap();
    assert_eq!(
        std::fs::read_to_string(cluster.nodes[1].data().join("clusterid")).unwrap(),
        id + "\n"
    );
}

/// `HOSTNAME` is for the configuration and the application: others know the node by its machine's name.
#[test]
fn a_node_without_a_host_name_has_that_of_its_machine() {
    let consul = Consul::start();
    let (url, hostname, advertise) = (&consul.url(), "''", "");
    let lease = Lease { url, hostname, advertise, candidate: true, ttl: TTL };
    let settings = Settings { environment: &[("HOSTNAME", "elsewhere")], ..Settings::default() };
    Node::new(&settings, Member::Consul(lease)).start();
    let machine = nix::unistd::gethostname().unwrap().into_string().unwrap();
    let value = consul.value("test/lease").unwrap();
    assert!(value.starts_with(&format!(r#"{{"hostname":"{machine}","#)), "{value}");
}

/// LiteFS: TestMultiNode_Candidate.
#[test]
fn a_node_that_is_no_candidate_never_leads() {
    let consul = Consul::start();
    let mut replica = node(&consul.url(), "replica", false, TTL);
    replica.spawn();
    replica.wait_for_log("cannot find primary & ineligible to become primary");
    let mut candidate = node(&consul.url(), "candidate", true, TTL);
    candidate.start();
    replica.wait_ready();
    assert_eq!(primary_of(&replica), "candidate");
}

/// LiteFS: TestMultiNode_ForcedReelection.
#[test]
fn another_node_takes_over_from_one_that_was_killed() {
    let mut cluster = Cluster::of(2, TTL);
    create(&cluster.nodes[0], "wal");
    insert(&cluster.nodes[0], 1);
    cluster.check();
    let began = Instant::now();
    cluster.nodes[0].kill();
    wait_writable(&cluster.nodes[1], 2);
    println!("taken over {} ms after the kill", began.elapsed().as_millis());
    cluster.nodes[0].start();
    assert_eq!(cluster.settle(), 1);
    assert_eq!(rows(&cluster.nodes[0]), "1,2");
    cluster.check();
}

#[test]
fn a_restarted_primary_takes_up_its_own_lease() {
    let mut cluster = Cluster::of(1, TTL);
    create(&cluster.nodes[0], "wal");
    let began = Instant::now();
    cluster.nodes[0].kill();
    cluster.nodes[0].start();
    insert(&cluster.nodes[0], 1);
    println!("writable again {} ms after the kill", began.elapsed().as_millis());
    cluster.nodes[0].wait_for_log("took up the lease of before");
    assert!(is_primary(&cluster.nodes[0]));
}

/// Without passthrough it is the commit that is refused.
#[test_case("auto", "database is locked")]
#[test_case("off", "disk I/O error")]
fn a_primary_without_consul_refuses_writes_and_resumes_with_it(
    passthrough: &'static str,
    refusal: &str,
) {
    let settings = Settings { passthrough, ..Settings::default() };
    let cluster = Cluster::with(&settings, 2, TTL);
    create(&cluster.nodes[0], "wal");
    insert(&cluster.nodes[0], 1);
    cluster.check();
    cluster.consul.signal(Signal::SIGSTOP);
    cluster.nodes[0].wait_for_log("writes are refused: the lease could not be confirmed");
    let sql = ".timeout 0\ninsert into t values (9)";
    let refused = sqlite::refused(&cluster.nodes[0].file(DB), sql);
    assert!(refused.contains(refusal), "{refused}");
    assert_eq!(rows(&cluster.nodes[0]), "1");
    assert_eq!(rows(&cluster.nodes[1]), "1");
    cluster.consul.signal(Signal::SIGCONT);
    wait_writable(&cluster.nodes[cluster.settle()], 2);
    cluster.check();
}

/// The first write after the process wakes up is refused: no timer has had a chance to fire.
#[test]
fn a_primary_that_was_suspended_is_refused_its_first_write() {
    let cluster = Cluster::of(2, SHORT_TTL);
    create(&cluster.nodes[0], "wal");
    insert(&cluster.nodes[0], 1);
    cluster.check();
    cluster.nodes[0].signal(Signal::SIGSTOP);
    wait_writable(&cluster.nodes[1], 2);
    let file = cluster.nodes[0].file(DB);
    let writer =
        std::thread::spawn(move || sqlite::try_run(&file, ".timeout 0\ninsert into t values (9)"));
    // The writer is inside its first call by then, or comes later: either way it finds the fence.
    std::thread::park_timeout(Duration::from_millis(300));
    cluster.nodes[0].signal(Signal::SIGCONT);
    assert!(writer.join().unwrap().is_err(), "a write was acknowledged");
    assert_eq!(cluster.settle(), 1);
    cluster.nodes[0].wait_for_pos(DB, cluster.nodes[1].pos(DB));
    assert_eq!(rows(&cluster.nodes[0]), "1,2");
    cluster.check();
}

/// A primary that Consul does not hear from, while its clients do.
#[test]
fn a_primary_that_is_cut_off_from_consul_stops_before_another_begins() {
    let consul = Consul::start();
    let link = Link::to(consul.address());
    let mut primary = node(&format!("http://{}", link.address()), "node0", true, SHORT_TTL);
    primary.start();
    let mut other = node(&consul.url(), "node1", true, SHORT_TTL);
    other.start();
    create(&primary, "wal");
    insert(&primary, 1);
    other.wait_for_pos(DB, primary.pos(DB));
    link.cut();
    wait_writable(&other, 2);
    let refused = sqlite::try_run(&primary.file(DB), ".timeout 0\ninsert into t values (9)");
    assert!(refused.is_err(), "two nodes take writes");
    link.mend();
    let cluster = Cluster { consul, nodes: vec![primary, other] };
    assert_eq!(cluster.settle(), 1);
    cluster.nodes[0].wait_for_pos(DB, cluster.nodes[1].pos(DB));
    assert_eq!(rows(&cluster.nodes[0]), "1,2");
    cluster.check();
}

/// LiteFS: TestMultiNode_Handoff.
#[test]
fn promote_moves_the_lease_and_answers_when_it_has() {
    let cluster = Cluster::of(2, TTL);
    create(&cluster.nodes[0], "wal");
    insert(&cluster.nodes[0], 1);
    let output = cluster.nodes[1].litefs("run", &["-promote", "--", "true"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(is_primary(&cluster.nodes[1]));
    insert(&cluster.nodes[1], 2);
    assert_eq!(cluster.settle(), 1);
    assert_eq!(cluster.nodes[0].log_count("cannot connect to self"), 0);
    cluster.check();
}

/// SEMANTICS H4: a lock that the primary has lost is of no use. Its holder may be the next primary.
#[test_matrix(["delete", "wal"], [1, 2])]
fn a_hand_over_ends_the_halt_locks(mode: &str, to: usize) {
    let cluster = Cluster::of(3, TTL);
    create(&cluster.nodes[0], mode);
    cluster.check();
    let holder = &cluster.nodes[2];
    let halt = Halt::on(holder);
    insert(holder, 1);
    let output = cluster.nodes[to].litefs("promote", &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(cluster.settle(), to);
    assert!(!is_held(holder));
    wait_writable(&cluster.nodes[to], 2);
    for node in cluster.nodes.iter().filter(|node| !is_primary(node)) {
        sqlite::refused(&node.file(DB), ".timeout 0\ninsert into t values (9)");
    }
    halt.release();
    assert_eq!(rows(&cluster.nodes[to]), "1,2");
    cluster.check();
}

#[test]
fn a_stopping_primary_hands_its_lease_over() {
    let mut cluster = Cluster::of(2, TTL);
    create(&cluster.nodes[0], "wal");
    insert(&cluster.nodes[0], 1);
    assert!(cluster.nodes[0].stop().success());
    assert_eq!(cluster.nodes[0].log_count("lease handed over to"), 1);
    wait_writable(&cluster.nodes[1], 2);
    cluster.nodes[0].start();
    assert_eq!(cluster.settle(), 1);
    cluster.check();
}

#[test]
fn a_primary_alone_gives_its_lease_back_at_its_end() {
    let mut cluster = Cluster::of(1, TTL);
    create(&cluster.nodes[0], "wal");
    assert!(cluster.nodes[0].stop().success());
    assert_eq!(cluster.consul.value("test/lease").as_deref(), Some(""));
    cluster.nodes[0].start();
    insert(&cluster.nodes[0], 1);
}

/// `docs/differences.md`, cluster 31: "Everything is closed first".
#[test]
fn an_application_that_fails_at_the_end_keeps_no_lease() {
    let consul = Consul::start();
    let (url, hostname) = (&consul.url(), "node0");
    let lease = Member::Consul(Lease { url, hostname, advertise: "", candidate: true, ttl: TTL });
    let mut node = Node::new(&Settings::default(), lease);
    let up = node.scratch("up");
    let script = format!("trap 'exit 9' TERM; touch {}; while :; do :; done", up.display());
    let lines = format!("exec: [{{cmd: 'sh -c \"{}\"'}}]", script.replace('\'', "''"));
    node.configure(&Settings { lines: leak(lines), ..Settings::default() }, lease);
    node.start();
    wait::until_true("the application", || up.exists());
    assert_ne!(consul.value("test/lease").as_deref(), Some(""));
    assert_eq!(node.stop().code(), Some(9));
    assert_eq!(consul.value("test/lease").as_deref(), Some(""));
}

/// A node that lost its directory, while those with the data are away.
#[test]
fn an_empty_node_does_not_take_over_a_cluster_with_data() {
    let mut cluster = Cluster::of(1, TTL);
    create(&cluster.nodes[0], "wal");
    insert(&cluster.nodes[0], 1);
    let id = std::fs::read(cluster.nodes[0].data().join("clusterid")).unwrap();
    assert!(cluster.nodes[0].stop().success());
    let mut empty = node(&cluster.consul.url(), "empty", true, TTL);
    std::fs::create_dir_all(empty.data()).unwrap();
    std::fs::write(empty.data().join("clusterid"), id).unwrap();
    empty.spawn();
    empty.wait_for_log("this node has no data, and the last primary");
    cluster.nodes[0].start();
    empty.wait_ready();
    assert_eq!(primary_of(&empty), "node0");
    assert_eq!(rows(&empty), "1");
}

#[test]
fn a_node_that_lost_everything_can_be_forced_to_lead() {
    let mut cluster = Cluster::of(1, TTL);
    create(&cluster.nodes[0], "wal");
    insert(&cluster.nodes[0], 1);
    assert!(cluster.nodes[0].stop().success());
    let mut empty = node(&cluster.consul.url(), "empty", true, TTL);
    empty.spawn();
    empty.wait_for_log("this node has no cluster id and the cluster has one");
    let output = empty.litefs("promote", &[]);
    assert!(!output.status.success());
    let output = empty.litefs("promote", &["-force"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    create(&empty, "wal");
    insert(&empty, 5);
    assert_eq!(rows(&empty), "5");
}

/// A primary that was killed with transactions that nobody has, and comes back.
#[test]
fn a_primary_that_comes_back_keeps_what_nobody_has() {
    let mut cluster = Cluster::of(2, TTL);
    create(&cluster.nodes[0], "wal");
    insert(&cluster.nodes[0], 1);
    cluster.check();
    cluster.nodes[1].signal(Signal::SIGSTOP);
    insert(&cluster.nodes[0], 77);
    cluster.nodes[0].kill();
    cluster.nodes[1].signal(Signal::SIGCONT);
    wait_writable(&cluster.nodes[1], 2);
    insert(&cluster.nodes[1], 3);
    cluster.nodes[0].start();
    assert_eq!(cluster.settle(), 1);
    cluster.nodes[0].wait_for_pos(DB, cluster.nodes[1].pos(DB));
    let rows = rows(&cluster.nodes[0]);
    // What was still in the socket of the stopped replica arrived there after all.
    if rows != "1,2,3,77" {
        assert_eq!(rows, "1,2,3");
        let kept = std::fs::read_dir(cluster.nodes[0].db_dir(DB).lost_found()).unwrap();
        assert!(kept.count() > 0, "what nobody has is gone");
    }
    cluster.check();
}

/// Writes numbers one by one to whichever node takes them, each until it was acknowledged.
struct Load {
    end: std::sync::Arc<std::sync::atomic::AtomicBool>,
    writer: std::thread::JoinHandle<(u32, Duration)>,
}

impl Load {
    fn on(nodes: &[Node]) -> Load {
        let files: Vec<_> = nodes.iter().map(|node| node.file(DB)).collect();
        let end = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let ended = end.clone();
        let writer = std::thread::spawn(move || {
            let (mut number, mut at, mut gap) = (0, 0, Duration::ZERO);
            let mut last = Instant::now();
            while !ended.load(std::sync::atomic::Ordering::SeqCst) {
                let sql = format!(".timeout 0\ninsert or ignore into t values ({number})");
                match sqlite::try_run(&files[at], &sql) {
                    Ok(_) => {
                        gap = gap.max(last.elapsed());
                        last = Instant::now();
                        number += 1;
                    }
                    Err(_) => at = (at + 1) % files.len(),
                }
            }
            (number, gap)
        });
        Load { end, writer }
    }

    /// How many were acknowledged, and the longest time without one.
    fn stop(self) -> (u32, Duration) {
        self.end.store(true, std::sync::atomic::Ordering::SeqCst);
        self.writer.join().unwrap()
    }
}

/// Each node is stopped as a service manager would, and started again, under constant writes.
#[test]
fn a_rolling_restart_under_load_loses_nothing() {
    let mut cluster = Cluster::of(3, TTL);
    let setup = "pragma journal_mode = wal; create table t(x integer primary key)";
    sqlite::run(&cluster.nodes[0].file(DB), setup);
    cluster.check();
    let load = Load::on(&cluster.nodes);
    for number in 0..3 {
        let before = cluster.nodes[(number + 1) % 3].pos(DB).txid.0;
        wait::until_true("writes", || cluster.nodes[(number + 1) % 3].pos(DB).txid.0 > before + 20);
        // Its exit code is 1 if a writer has the mount open in that moment.
        cluster.nodes[number].stop();
        cluster.nodes[number].start();
        cluster.settle();
    }
    let (count, gap) = load.stop();
    println!("{count} writes acknowledged, {} ms without one at the most", gap.as_millis());
    cluster.check();
    for node in &cluster.nodes {
        let sql = format!("select count(*) from t where x < {count}");
        assert_eq!(
            sqlite::run(&node.file(DB), &sql),
            count.to_string(),
            "an acknowledged row is lost"
        );
    }
}

/// Asks a node to hand its lease to the process of `to`; the head and the text of its answer.
fn hand_off(node: &Node, to: &str) -> String {
    let mut answer = String::new();
    ask_hand_off(node, to).read_to_string(&mut answer).unwrap();
    answer
}

/// Asks that; where the answer comes.
pub fn ask_hand_off(node: &Node, to: &str) -> TcpStream {
    let mut socket = TcpStream::connect(node.address()).unwrap();
    socket.set_read_timeout(Some(wait::DEADLINE)).unwrap();
    let body = format!(r#"{{"nodeID":"{to}"}}"#);
    let (host, len) = (node.address(), body.len());
    let head =
        format!("POST /handoff?nodeID={to} HTTP/1.0\r\nHost: {host}\r\nContent-Length: {len}");
    write!(socket, "{head}\r\n\r\n{body}").unwrap();
    socket
}

/// `docs/differences.md`, cluster 20: "They answer when the result is known; a replica of ours that is
/// no candidate is refused".
#[test]
fn a_hand_off_that_cannot_be_leaves_the_primary_as_it_is() {
    let mut cluster = Cluster::of(2, TTL);
    create(&cluster.nodes[0], "wal");
    let mut follower = node(&cluster.consul.url(), "follower", false, TTL);
    follower.start();
    let refused = hand_off(&cluster.nodes[0], &connected_id(&cluster.nodes[0], "follower"));
    assert!(refused.contains("not eligible to become primary"), "{refused}");
    let refused = hand_off(&cluster.nodes[0], "00000000000000AB");
    assert!(refused.contains("target node is not currently connected"), "{refused}");
    // A target that does not take what it is offered.
    cluster.nodes[1].signal(Signal::SIGSTOP);
    let refused = hand_off(&cluster.nodes[0], &connected_id(&cluster.nodes[0], "node1"));
    assert!(!refused.starts_with("HTTP/1.0 200"), "{refused}");
    assert!(is_primary(&cluster.nodes[0]));
    insert(&cluster.nodes[0], 1);
    cluster.nodes[1].signal(Signal::SIGCONT);
    cluster.nodes.push(follower);
    assert_eq!(cluster.settle(), 0);
    cluster.check();
}

/// Whoever follows the primary all the while knows it by its process: its lease has another session since.
#[test]
fn a_primary_that_dies_after_a_hand_off_that_failed_is_replaced_at_once() {
    let mut cluster = Cluster::of(3, "60s");
    create(&cluster.nodes[0], "wal");
    insert(&cluster.nodes[0], 1);
    cluster.check();
    cluster.nodes[1].signal(Signal::SIGSTOP);
    let refused = hand_off(&cluster.nodes[0], &connected_id(&cluster.nodes[0], "node1"));
    assert!(!refused.starts_with("HTTP/1.0 200"), "{refused}");
    cluster.nodes[0].kill();
    cluster.nodes[2].wait_for_log("is gone (its port is closed)");
    cluster.nodes[1].signal(Signal::SIGCONT);
    cluster.nodes[0].spawn();
    cluster.settle();
    cluster.check();
}

/// The id of a connected replica, as its primary knows it from the log.
fn connected_id(primary: &Node, hostname: &str) -> String {
    let log = primary.log();
    let end = format!("hostname={hostname}");
    let line = log.lines().rfind(|line| line.contains("stream connected") && line.ends_with(&end));
    let line = line.unwrap_or_else(|| panic!("{hostname} is not connected:\n{log}"));
    line.split("peer=").nth(1).unwrap().split(' ').next().unwrap().to_owned()
}

/// `docs/differences.md`, cluster 37: "Tried again until there is a primary, for 30 s".
#[test]
fn a_node_that_is_to_be_promoted_leads_when_it_is_ready() {
    let mut cluster = Cluster::of(1, TTL);
    create(&cluster.nodes[0], "wal");
    insert(&cluster.nodes[0], 1);
    let (url, hostname) = (&cluster.consul.url(), "node1");
    let lease = Lease { url, hostname, advertise: "", candidate: true, ttl: TTL };
    let settings = Settings { lease: ", promote: true", ..Settings::default() };
    let mut promoted = Node::new(&settings, Member::Consul(lease));
    promoted.start();
    assert!(is_primary(&promoted));
    insert(&promoted, 2);
    cluster.nodes.push(promoted);
    assert_eq!(cluster.settle(), 1);
    cluster.check();
}

/// `docs/differences.md`, cluster 37: there may be no primary in that moment, or another one in the next.
#[test]
fn nodes_that_are_to_be_promoted_at_once_all_become_ready() {
    let mut cluster = Cluster::of(1, TTL);
    create(&cluster.nodes[0], "wal");
    let settings = Settings { lease: ", promote: true", ..Settings::default() };
    let url = cluster.consul.url();
    for n in 1..4 {
        let hostname = &name(n);
        let lease = Lease { url: &url, hostname, advertise: "", candidate: true, ttl: TTL };
        cluster.nodes.push(Node::new(&settings, Member::Consul(lease)));
    }
    cluster.nodes[1..].iter_mut().for_each(Node::spawn);
    // In the middle of that the primary goes, and comes back.
    cluster.nodes[0].kill();
    cluster.nodes[0].start();
    cluster.nodes[1..].iter().for_each(Node::wait_ready);
    wait_writable(&cluster.nodes[cluster.settle()], 1);
    cluster.check();
}

/// `docs/differences.md`, cluster 24: "Made only where there is none".
#[test]
fn nodes_that_start_at_once_agree_on_one_cluster_id() {
    let consul = Consul::start();
    let of = |n: usize| node(&consul.url(), &name(n), true, TTL);
    let mut nodes: Vec<Node> = (0..3).map(of).collect();
    nodes.iter_mut().for_each(Node::spawn);
    nodes.iter().for_each(Node::wait_ready);
    let id = consul.value("test/lease/clusterid").unwrap();
    for node in &nodes {
        let ours = std::fs::read_to_string(node.data().join("clusterid")).unwrap();
        assert_eq!(ours.trim_end(), id);
    }
    let cluster = Cluster { consul, nodes };
    create(&cluster.nodes[cluster.settle()], "wal");
    cluster.check();
}

/// `docs/differences.md`, cluster 43: Consul "need not be there" at the start, whatever its URL is.
#[test]
fn a_node_waits_for_a_consul_that_is_not_there_yet() {
    let consul = Consul::start();
    let link = Link::to(consul.address());
    link.cut();
    let url = format!("http://{}/prefix", link.address());
    let mut node = node(&url, "node0", true, TTL);
    node.spawn();
    node.wait_for_log("waiting to connect to cluster");
    node.wait_for_log("retrying");
    link.mend();
    node.wait_ready();
    create(&node, "wal");
    insert(&node, 1);
    assert!(is_primary(&node));
}

/// What `.lag` says, in milliseconds.
fn lag(node: &Node) -> i64 {
    std::fs::read_to_string(node.file(".lag")).unwrap().trim().parse().unwrap()
}

/// A node that its primary cannot reach any more, while both reach Consul; then the primary dies.
#[test]
fn a_replica_behind_a_cut_link_says_how_old_it_is_and_catches_up() {
    let consul = Consul::start();
    let (url, hostname) = (&consul.url(), "node0");
    let lease = |advertise| Lease { url, hostname, advertise, candidate: true, ttl: SHORT_TTL };
    let primary = Node::new(&Settings::default(), Member::Consul(lease("")));
    let link = Link::to(primary.address());
    let advertise = format!("http://{}", link.address());
    primary.configure(&Settings::default(), Member::Consul(lease(&advertise)));
    let mut nodes = vec![primary, node(&consul.url(), "node1", true, SHORT_TTL)];
    nodes.iter_mut().for_each(Node::start);
    create(&nodes[0], "wal");
    insert(&nodes[0], 1);
    nodes[1].wait_for_pos(DB, nodes[0].pos(DB));
    link.cut();
    insert(&nodes[0], 2);
    wait::until_true("a lag", || lag(&nodes[1]) > 2000);
    assert_eq!((lag(&nodes[0]), rows(&nodes[1]).as_str()), (0, "1"));
    let info = nodes[1].get("/info");
    assert!(info.contains("\"primary\""), "{info}");
    link.mend();
    nodes[1].wait_for_pos(DB, nodes[0].pos(DB));
    wait::until_true("no lag", || lag(&nodes[1]) < 2000);
    nodes[0].kill();
    wait_writable(&nodes[1], 3);
    assert!(is_primary(&nodes[1]));
    assert_eq!((lag(&nodes[1]), primary_of(&nodes[1]).as_str()), (0, ""));
    nodes[0].start();
    let cluster = Cluster { consul, nodes };
    assert_eq!(cluster.settle(), 1);
    cluster.check();
    wait::until_true("no lag", || lag(&cluster.nodes[0]) < 2000);
    assert_eq!(rows(&cluster.nodes[0]), "1,2,3");
}

/// What a node must know of a Consul with TLS and tokens.
fn consul_files(certificates: &Certificates, more: &[(&'static str, &str)]) -> Settings {
    let file = |name| leak(certificates.file(name).display().to_string());
    let mut environment = vec![
        ("CONSUL_CACERT", file("ca")),
        ("CONSUL_CLIENT_CERT", file("cert")),
        ("CONSUL_CLIENT_KEY", file("key")),
    ];
    environment.extend(more.iter().map(|(name, value)| (*name, leak((*value).to_owned()))));
    Settings { environment: Box::leak(environment.into()), ..Settings::default() }
}

fn secured(settings: &Settings, url: &str, hostname: &str) -> Node {
    let lease = Lease { url, hostname, advertise: "", candidate: true, ttl: TTL };
    Node::new(settings, Member::Consul(lease))
}

/// Elected, handed over, killed: all of it through TLS with both certificates, under a token that may no
/// more than it must.
#[test]
fn a_lease_is_kept_in_a_consul_with_tls_and_tokens() {
    let certificates = Certificates::new();
    let (consul, token) = Consul::secure(&certificates);
    let address = consul.secure_address().to_owned();
    let plain = format!("https://{address}");
    let by_variable = consul_files(&certificates, &[("CONSUL_HTTP_TOKEN", &token)]);
    let by_url = consul_files(&certificates, &[]);
    let first = secured(&by_variable, &plain, "node0");
    let second = secured(&by_url, &format!("https://:{token}@{address}"), "node1");
    let mut cluster = Cluster { consul, nodes: vec![first, second] };
    cluster.nodes.iter_mut().for_each(Node::start);
    assert_eq!(cluster.settle(), 0);
    create(&cluster.nodes[0], "wal");
    insert(&cluster.nodes[0], 1);
    cluster.check();
    assert!(cluster.nodes[1].litefs("promote", &[]).status.success());
    assert_eq!(cluster.settle(), 1);
    insert(&cluster.nodes[1], 2);
    cluster.check();
    cluster.nodes[1].kill();
    wait_writable(&cluster.nodes[0], 3);
    cluster.nodes[1].start();
    assert_eq!(cluster.settle(), 0);
    cluster.check();
    assert_eq!(rows(&cluster.nodes[1]), "1,2,3");
    for node in &cluster.nodes {
        assert!(!node.whole_log().contains(&token), "the token is in the log");
    }
}

/// Each says what is wrong, and does not lead.
#[test]
fn a_consul_that_does_not_know_a_node_is_named_with_its_reason() {
    let certificates = Certificates::new();
    let (consul, token) = Consul::secure(&certificates);
    let url = format!("https://{}", consul.secure_address());
    let no_token = consul_files(&certificates, &[]);
    let wrong = "00000000-1111-4222-8333-444444444444";
    let wrong_token = consul_files(&certificates, &[("CONSUL_HTTP_TOKEN", wrong)]);
    let strangers = Certificates::new();
    let ca = strangers.file("ca").display().to_string();
    let variables = [("CONSUL_CACERT", ca.as_str()), ("CONSUL_HTTP_TOKEN", token.as_str())];
    let other_authority = consul_files(&certificates, &variables);
    let nodes = [
        (no_token, "403"),
        (wrong_token, "ACL not found"),
        (other_authority, "invalid peer certificate"),
    ];
    let nodes = nodes.map(|(settings, reason)| {
        let mut node = secured(&settings, &url, "stranger");
        node.spawn();
        (node, reason)
    });
    for (node, reason) in &nodes {
        node.wait_for_log(reason);
        node.wait_for_log(&url);
        assert!(!is_primary(node));
        assert!(!node.whole_log().contains(wrong) && !node.whole_log().contains(&token));
    }
    assert_eq!(consul.value("test/lease"), None);
}

fn write_to(node: &Node, db: &str, sql: &str) {
    sqlite::run(&node.file(db), sql);
}

/// Waits until the primary has written these positions beside the lease; what it has written.
fn wait_recorded(consul: &Consul, positions: &[Pos]) -> String {
    wait::until("the positions beside the lease", || {
        let record = consul.value("test/lease/positions")?;
        positions.iter().all(|pos| record.contains(&pos.to_string())).then_some(record)
    })
}

/// Databases in rollback mode, and on each of two replicas a reader of another one, which keeps that one where it
/// is, while others go on.
fn held_back(cluster: &Cluster, setup: &str) -> [Shell; 2] {
    for db in ["a.db", "b.db"] {
        write_to(&cluster.nodes[0], db, setup);
        let pos = cluster.nodes[0].pos(db);
        cluster.nodes[1..].iter().for_each(|node| node.wait_for_pos(db, pos));
    }
    [(1, "a.db"), (2, "b.db")].map(|(node, db)| {
        let mut reader = Shell::open(&cluster.nodes[node].file(db));
        reader.run("begin; select * from t");
        reader
    })
}

/// Each replica has everything of the database that it can follow, all nodes die, and the replicas are
/// started again; which one leads.
fn lead_without_the_primary(cluster: &mut Cluster, readers: [Shell; 2]) -> usize {
    let [a, b] = ["a.db", "b.db"].map(|db| cluster.nodes[0].pos(db));
    cluster.nodes[2].wait_for_pos("a.db", a);
    cluster.nodes[1].wait_for_pos("b.db", b);
    wait_recorded(&cluster.consul, &[a, b]);
    cluster.nodes.iter_mut().for_each(Node::kill);
    readers.into_iter().for_each(Shell::kill);
    for node in &mut cluster.nodes[1..] {
        node.spawn();
    }
    cluster.settle()
}

/// Decision 0019 with everything real: the last primary is gone, and of its two replicas each lacks
/// something of another database. Both say what; who has more leads, and what only the other one has is
/// kept.
#[test]
fn of_two_stale_candidates_the_one_with_more_leads_and_nothing_is_thrown_away() {
    let mut cluster = Cluster::of(3, SHORT_TTL);
    let readers = held_back(&cluster, "create table t(x); insert into t values ('common')");
    for n in 0..3 {
        write_to(&cluster.nodes[0], "a.db", &format!("insert into t values ('a{n}')"));
    }
    write_to(&cluster.nodes[0], "b.db", "insert into t values ('b')");
    assert_eq!(lead_without_the_primary(&mut cluster, readers), 2);
    let [one, two] = [&cluster.nodes[1], &cluster.nodes[2]];
    // Of a.db it has two, of b.db three.
    one.wait_for_log("has 7 transactions in term 1, this node 5");
    two.wait_for_log("had 8 transactions in term 1, this node has 7");
    two.wait_for_log("taking the lease although transactions are missing");
    write_to(two, "b.db", "insert into t values ('later')");
    for db in ["a.db", "b.db"] {
        one.wait_for_pos(db, two.pos(db));
        let [ours, theirs] = [one, two].map(|node| check_node(node, db, two.pos(db)).unwrap().0);
        assert!(ours == theirs, "{db}: pages differ");
    }
    let kept = std::fs::read_dir(one.db_dir("b.db").lost_found()).into_iter().flatten().count();
    assert!(kept > 0, "what only this node had is gone");
    assert!(!one.db_dir("a.db").lost_found().exists(), "nothing of it was lost");
    // The former primary had everything, and comes too late.
    cluster.nodes[0].start();
    assert_eq!(cluster.settle(), 2);
    let former = &cluster.nodes[0];
    former.wait_for_pos("b.db", cluster.nodes[2].pos("b.db"));
    assert!(std::fs::read_dir(former.db_dir("b.db").lost_found()).unwrap().count() > 0);
    assert_eq!(sqlite::run(&former.file("a.db"), "select count(*) from t"), "4");
}

/// Decision 0019: "a replica whose readers block one with a rollback journal goes on with the others", until
/// it has as many transactions as the record of the last primary, and still not all of them.
#[test]
fn a_candidate_that_lacks_a_database_waits_whatever_the_sum_is() {
    let mut cluster = Cluster::of(2, SHORT_TTL);
    for db in ["a.db", "b.db"] {
        write_to(&cluster.nodes[0], db, "create table t(x)");
        cluster.nodes[1].wait_for_pos(db, cluster.nodes[0].pos(db));
    }
    let mut reader = Shell::open(&cluster.nodes[1].file("b.db"));
    reader.run("begin; select * from t");
    for n in 0..3 {
        write_to(&cluster.nodes[0], "b.db", &format!("insert into t values ({n})"));
    }
    let b = cluster.nodes[0].pos("b.db");
    let record = wait_recorded(&cluster.consul, &[b]);
    // As many as the replica lacks; the primary dies before it writes down that it has them.
    for n in 0..3 {
        write_to(&cluster.nodes[0], "a.db", &format!("insert into t values ({n})"));
    }
    cluster.nodes[1].wait_for_pos("a.db", cluster.nodes[0].pos("a.db"));
    cluster.nodes.iter_mut().for_each(Node::kill);
    reader.kill();
    cluster.consul.put("test/lease/positions", &record);
    cluster.nodes[1].spawn();
    let candidate = &cluster.nodes[1];
    candidate.wait_for_log(&format!("had b.db at {}, this node at {}", b.txid, Txid(1)));
    candidate.wait_for_log("no primary: waiting, because the last primary");
    // Who had everything does not come back.
    assert_eq!(cluster.settle(), 1);
    candidate.wait_for_log("taking the lease although transactions are missing");
    for (db, count) in [("a.db", "3"), ("b.db", "0")] {
        assert_eq!(sqlite::run(&candidate.file(db), "select count(*) from t"), count);
    }
    write_to(candidate, "b.db", "insert into t values ('later')");
    // What only the former primary has is kept there.
    cluster.nodes[0].start();
    assert_eq!(cluster.settle(), 1);
    let [former, now] = [&cluster.nodes[0], &cluster.nodes[1]];
    for db in ["a.db", "b.db"] {
        former.wait_for_pos(db, now.pos(db));
        let [ours, theirs] = [former, now].map(|node| check_node(node, db, now.pos(db)).unwrap().0);
        assert!(ours == theirs, "{db}: pages differ");
    }
    assert!(std::fs::read_dir(former.db_dir("b.db").lost_found()).unwrap().count() > 0);
    assert!(!former.db_dir("a.db").lost_found().exists(), "nothing of it was lost");
}

/// Decision 0019: "Between two candidates of which each lacks something there is no right answer": either
/// leads, and what only the other one has is kept.
#[test]
fn of_two_candidates_with_as_many_transactions_either_leads_and_nothing_is_thrown_away() {
    let mut cluster = Cluster::of(3, SHORT_TTL);
    let readers = held_back(&cluster, "create table t(x)");
    for n in 0..2 {
        for db in ["a.db", "b.db"] {
            write_to(&cluster.nodes[0], db, &format!("insert into t values ({n})"));
        }
    }
    let leads = lead_without_the_primary(&mut cluster, readers);
    let (new, other) = (&cluster.nodes[leads], &cluster.nodes[3 - leads]);
    new.wait_for_log("taking the lease although transactions are missing");
    let (lacks, has) = if leads == 1 { ("a.db", "b.db") } else { ("b.db", "a.db") };
    write_to(new, lacks, "insert into t values ('later')");
    for (db, rows) in [(lacks, "later"), (has, "0,1")] {
        other.wait_for_pos(db, new.pos(db));
        assert_eq!(sqlite::run(&new.file(db), "select group_concat(x) from t"), rows);
        let [ours, theirs] = [new, other].map(|node| check_node(node, db, new.pos(db)).unwrap().0);
        assert!(ours == theirs, "{db}: pages differ");
    }
    assert!(std::fs::read_dir(other.db_dir(lacks).lost_found()).unwrap().count() > 0);
    assert!(!other.db_dir(has).lost_found().exists(), "nothing of it was lost");
}
