//! Three nodes with a lease in Consul, one writer on each, and faults by chance: killed, suspended, cut
//! off from Consul, restarted. After each round everything is mended, and what was acknowledged is
//! looked for.
//!
//! `LITEFS_TEST_SEED` repeats a run, `LITEFS_TEST_MINUTES` makes it longer.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::lease::{is_primary, primary_of};
use crate::support::consul::{Consul, Link};
use crate::support::node::{Lease, Member, Node, Settings};
use crate::support::{image, sqlite, wait};

const DB: &str = "app.db";
const TTL: &str = "4s";
const NODES: usize = 3;
/// Faults on one set of nodes; a process of a test does not run for long.
const ROUNDS: usize = 5;
/// Two nodes that acknowledge in turn within this time do so at a time: no lease moves there and back
/// so quickly.
const AT_A_TIME: Duration = Duration::from_millis(500);

/// A generator that gives the same numbers for the same seed (xorshift).
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// A row that SQLite reported as committed.
#[derive(Debug, Clone, Copy)]
struct Ack {
    node: usize,
    row: u64,
    begun: Instant,
    ended: Instant,
}

/// What the writers share.
#[derive(Default)]
struct Log {
    next: AtomicU64,
    paused: AtomicBool,
    ended: AtomicBool,
    acks: Mutex<Vec<Ack>>,
    /// Held by a writer in the middle of a row.
    busy: [Mutex<()>; NODES],
}

/// One program after the other, each with one row.
fn write(log: &Log, node: usize, file: &PathBuf) {
    while !log.ended.load(Ordering::SeqCst) {
        let busy = log.busy[node].lock().unwrap();
        if log.paused.load(Ordering::SeqCst) {
            drop(busy);
            std::thread::park_timeout(Duration::from_millis(5));
            continue;
        }
        let row = log.next.fetch_add(1, Ordering::SeqCst);
        let begun = Instant::now();
        let sql = format!(".timeout 0\npragma synchronous = full; insert into t values ({row})");
        match sqlite::try_run(file, &sql) {
            Ok(_) => {
                let ack = Ack { node, row, begun, ended: Instant::now() };
                log.acks.lock().unwrap().push(ack);
            }
            Err(_) => std::thread::park_timeout(Duration::from_millis(20)),
        }
    }
}

struct Cluster {
    consul: Consul,
    links: Vec<Link>,
    nodes: Vec<Node>,
    log: Arc<Log>,
    writers: Vec<JoinHandle<()>>,
    /// Rows that were acknowledged and are on no node any more, and known to be.
    lost: BTreeSet<u64>,
}

impl Cluster {
    fn start(mode: &str) -> Cluster {
        let consul = Consul::start();
        let links: Vec<_> = (0..NODES).map(|_| Link::to(consul.address())).collect();
        let node = |(number, link): (usize, &Link)| {
            let (url, hostname) = (format!("http://{}", link.address()), format!("node{number}"));
            let lease =
                Lease { url: &url, hostname: &hostname, advertise: "", candidate: true, ttl: TTL };
            Node::new(&Settings::default(), Member::Consul(lease))
        };
        let mut nodes: Vec<Node> = links.iter().enumerate().map(node).collect();
        nodes.iter_mut().for_each(Node::start);
        let setup = format!("pragma journal_mode = {mode}; create table t(x integer primary key)");
        sqlite::run(&nodes[0].file(DB), &setup);
        let log = Arc::new(Log::default());
        let writer = |number: usize| {
            let (log, file) = (log.clone(), nodes[number].file(DB));
            std::thread::spawn(move || write(&log, number, &file))
        };
        let writers = (0..NODES).map(writer).collect();
        Cluster { consul, links, nodes, log, writers, lost: BTreeSet::new() }
    }

    /// Lets some rows be acknowledged, or some time pass.
    fn go_on(&self, chance: &mut Chance) {
        let enough = self.log.acks.lock().unwrap().len() + 5 + chance.below(20) as usize;
        let end = Instant::now() + Duration::from_millis(500 + chance.below(2500));
        wait::until_true("some time", || {
            self.log.acks.lock().unwrap().len() >= enough || Instant::now() >= end
        });
    }

    /// One fault, and with some chance a second one before it is mended.
    fn round(&mut self, chance: &mut Chance) -> String {
        let mut story = String::new();
        self.log.paused.store(false, Ordering::SeqCst);
        self.go_on(chance);
        for _ in 0..=chance.below(2) {
            let at = chance.below(NODES as u64) as usize;
            let primary = if is_primary(&self.nodes[at]) { " (primary)" } else { "" };
            let what = match chance.below(4) {
                0 if self.nodes[at].is_running() => {
                    self.nodes[at].kill();
                    "killed"
                }
                1 if self.nodes[at].is_running() => {
                    self.nodes[at].signal(Signal::SIGSTOP);
                    "suspended"
                }
                2 => {
                    self.links[at].cut();
                    "cut off"
                }
                _ if self.nodes[at].is_running() => {
                    self.nodes[at].signal(Signal::SIGCONT);
                    self.nodes[at].stop();
                    "stopped"
                }
                _ => "left alone",
            };
            story += &format!("node{at}{primary} {what}; ");
            self.go_on(chance);
        }
        story
    }

    /// Everything works again, nobody writes, and all nodes agree.
    fn mend(&mut self) {
        for link in &self.links {
            link.mend();
        }
        for node in &mut self.nodes {
            match node.is_running() {
                true => node.signal(Signal::SIGCONT),
                false => node.spawn(),
            }
        }
        self.log.paused.store(true, Ordering::SeqCst);
        for busy in &self.log.busy {
            drop(busy.lock().unwrap());
        }
        let primary = wait::until_or(|| self.logs(), || self.agreed());
        let pos = self.nodes[primary].pos(DB);
        for node in &self.nodes {
            node.wait_for_pos(DB, pos);
            super::check_node(node, DB, pos).expect("a database");
        }
    }

    /// The primary that all other nodes follow.
    fn agreed(&self) -> Option<usize> {
        let primary = (0..NODES).find(|n| is_primary(&self.nodes[*n]))?;
        let name = format!("node{primary}");
        let follows = |n: usize| n == primary || primary_of(&self.nodes[n]) == name;
        (0..NODES).all(follows).then_some(primary)
    }

    fn logs(&self) -> String {
        self.nodes.iter().map(|node| node.log() + "\n---\n").collect()
    }

    /// What was acknowledged is there; what is not was on a node that was lost at that moment, which
    /// has set it aside.
    fn look(&mut self, story: &str) {
        let rows = sqlite::run(&self.nodes[0].file(DB), "select x from t");
        let rows: BTreeSet<u64> = rows.lines().map(|row| row.parse().unwrap()).collect();
        let acks = self.log.acks.lock().unwrap().clone();
        let missing: Vec<_> = acks
            .iter()
            .filter(|ack| !rows.contains(&ack.row) && !self.lost.contains(&ack.row))
            .collect();
        for ack in &missing {
            let aside = image::directory(&self.nodes[ack.node].data(), DB).lost_found();
            let kept = std::fs::read_dir(aside).map_or(0, Iterator::count);
            assert!(
                kept > 0,
                "{story}: row {} of node{} is gone without a trace",
                ack.row,
                ack.node
            );
        }
        self.lost.extend(missing.iter().map(|ack| ack.row));
        check_one_at_a_time(&acks, story);
    }

    fn end(mut self) -> (u64, Vec<Ack>, usize) {
        self.log.ended.store(true, Ordering::SeqCst);
        for writer in self.writers.drain(..) {
            writer.join().unwrap();
        }
        let acks = self.log.acks.lock().unwrap().clone();
        drop(self.nodes);
        drop(self.consul);
        (self.log.next.load(Ordering::SeqCst), acks, self.lost.len())
    }
}

/// No two nodes acknowledge rows in turn: between two of one node there is none of another that began
/// and ended there.
fn check_one_at_a_time(acks: &[Ack], story: &str) {
    let mut acks = acks.to_vec();
    acks.sort_by_key(|ack| ack.ended);
    for three in acks.windows(3) {
        let [before, between, after] = three else { continue };
        let inside = between.begun > before.ended && between.ended < after.begun;
        let close = after.begun.duration_since(before.ended) < AT_A_TIME;
        let in_turn = before.node == after.node && before.node != between.node;
        assert!(!(inside && close && in_turn), "{story}: two primaries at a time: {three:?}");
    }
}

fn seed() -> u64 {
    let given = std::env::var("LITEFS_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    given.unwrap_or_else(|| u64::from(std::process::id()) * 0x9e37_79b9 + 1)
}

#[test]
fn nodes_agree_after_faults_by_chance() {
    let seed = seed();
    println!("LITEFS_TEST_SEED={seed}");
    let minutes = std::env::var("LITEFS_TEST_MINUTES").ok().and_then(|text| text.parse().ok());
    let (mut chance, mut sets) = (Chance(seed), 0);
    let end = Instant::now() + Duration::from_secs(60 * minutes.unwrap_or(0_u64));
    while sets == 0 || Instant::now() < end {
        let mode = ["wal", "delete"][sets % 2];
        let mut cluster = Cluster::start(mode);
        for round in 0..ROUNDS {
            let story = cluster.round(&mut chance);
            println!("{mode} {round}: {story}");
            cluster.mend();
            cluster.look(&format!("seed {seed}, {mode}, round {round}: {story}"));
        }
        let (tried, mut acks, lost) = cluster.end();
        acks.sort_by_key(|ack| ack.ended);
        let gaps = acks.windows(2).map(|two| two[1].ended.duration_since(two[0].ended));
        println!(
            "{tried} rows tried, {} acknowledged, {lost} lost by asynchronous replication and set aside, \
             {} ms without a write at the most",
            acks.len(),
            gaps.max().unwrap_or_default().as_millis()
        );
        sets += 1;
    }
}
