//! Health, and reading one's own writes.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use litefs::limits;

use super::wire::{Connection, cookie};
use super::{Plan, Site};
use crate::support::consul::Consul;
use crate::support::node::{Lease, Member, Node, free_address};
use crate::support::wait;

/// How many writes, each with a read of it, are made under lag: `LITEFS_TEST_READS`, or this.
const READS: usize = 1000;
/// How many clients make them.
const CLIENTS: usize = 8;
/// The longest time that a relay holds bytes back, in milliseconds.
const LAG_MS_MAX: u64 = 15;

#[test]
fn lag_is_not_healthy() {
    let mut site = Site::with(2, &Plan { proxy: ", max-lag: 100ms", ..Plan::default() });
    let health = |site: &Site| site.ask(1, "GET", "/litefs/health", "").seen();
    let healthy = || (200, "OK\n".to_owned());
    let late = || (503, "Replication lag exceeded\n".to_owned());
    // Between two heartbeats, which are a second apart, the lag may be larger than this limit.
    wait::until_true("health", || health(&site) == healthy());
    site.nodes[0].kill();
    wait::until_true("lag", || health(&site) == late());
    site.nodes[0].start();
    wait::until_true("health again", || health(&site) == healthy());
}

#[test]
fn a_former_primary_that_hears_nobody_is_not_healthy() {
    let consul = Consul::start();
    let mut site = Site { nodes: Vec::new(), apps: Vec::new(), proxies: Vec::new() };
    let (url, hostname, advertise) = (&consul.url(), "node0", "");
    let lease = Lease { url, hostname, advertise, candidate: true, ttl: "4s" };
    site.add(&Plan { proxy: ", max-lag: 500ms", ..Plan::default() }, Member::Consul(lease));
    site.nodes[0].start();
    let health = || site.ask(0, "GET", "/litefs/health", "").seen();
    assert_eq!(health(), (200, "OK\n".to_owned()));
    drop(consul);
    wait::until_true("lag", || health() == (503, "Replication lag exceeded\n".to_owned()));
    assert!(site.metric(0, "litefs_lag_seconds") >= 0.5);
    let lag = std::fs::read_to_string(site.nodes[0].file(".lag")).unwrap();
    assert_eq!(lag, "+2147483647");
}

#[test]
fn a_cookie_from_before_a_loss_costs_little_and_goes() {
    let site = Site::of(2);
    let written = site.ask(0, "POST", "/add/a", "");
    assert!(cookie(&written).is_some());
    let ahead = "cookie: __txid=00000000ffffffff\r\n";
    // The primary knows best.
    let answer = site.ask(0, "GET", "/get/a", ahead);
    assert_eq!((answer.seen(), cookie(&answer)), ((200, "1".to_owned()), cookie(&written)));
    // A replica asks it.
    let answer = site.ask(1, "GET", "/get/a", ahead);
    assert_eq!((answer.seen(), cookie(&answer)), ((200, "1".to_owned()), cookie(&written)));
    assert_eq!(site.apps[1].requests(), 0);
    let seen = cookie(&answer).unwrap();
    assert_eq!(site.ask(1, "GET", "/get/a", &seen).text(), "1");
    assert_eq!(site.apps[1].requests(), 1);
    // So it is for a database that is not there at all.
    let site = Site::of(1);
    let answer = site.ask(0, "GET", "/echo", ahead);
    assert_eq!(cookie(&answer).as_deref(), Some("cookie: __txid=0000000000000000\r\n"));
}

#[test]
fn a_read_times_out_when_what_was_seen_cannot_come() {
    let mut site = Site::of(2);
    let seen = cookie(&site.ask(1, "POST", "/add/a", "")).unwrap();
    assert_eq!(site.ask(1, "GET", "/get/a", &seen).text(), "1");
    site.nodes[0].kill();
    let ahead = "cookie: __txid=00000000ffffffff\r\n";
    let answer = site.ask(1, "GET", "/get/a", ahead);
    assert_eq!(answer.seen(), (504, "Proxy timeout\n".to_owned()));
    assert_eq!(site.ask(1, "GET", "/get/a", &seen).text(), "1");
}

#[test]
fn a_read_waits_for_what_its_client_wrote() {
    let site = Site::of(2);
    let seen = cookie(&site.ask(1, "POST", "/add/a", "")).unwrap();
    assert_eq!(site.ask(1, "GET", "/get/a", &seen).text(), "1");
    // After a while the primary is asked, which has to have it by then.
    wait::until_true("a write in time", || {
        // A primary that answers nothing, whose next transaction cannot have come.
        let written = site.ask(0, "POST", "/add/a", "");
        let pos = site.nodes[0].pos("app.db");
        site.nodes[1].wait_for_pos("app.db", pos);
        let next = format!("cookie: __txid={}\r\n", pos.txid.next());
        assert!(cookie(&written).is_some());
        let before: u32 = written.text().parse().unwrap();
        let (begin, proxy) = (Instant::now(), site.proxies[1].clone());
        let reader =
            thread::spawn(move || Connection::open(&proxy).ask("GET", "/get/a", &next, b"").text());
        wait::until_true("the read", || site.metric(1, "litefs_proxy_in_flight") == 1.0);
        assert_eq!(site.ask(0, "POST", "/add/a", "").text(), (before + 1).to_string());
        let is_late = begin.elapsed() >= limits::READ_HERE_WAIT;
        let read: u32 = reader.join().unwrap().parse().unwrap();
        assert!(read == before + 1 || (read == before && is_late), "{read} after {before}");
        read > before
    });
}

/// The way between a replica and its primary, on which bytes take their time.
struct Relay {
    address: String,
}

impl Relay {
    /// A relay to `target`, `HOST:PORT`, with a lag that `random` draws from for each piece.
    fn to(target: &str, random: &'static Random) -> Relay {
        let address = free_address();
        let listener = TcpListener::bind(&address).unwrap();
        let target = target.to_owned();
        thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(client), Ok(server)) = (client, TcpStream::connect(&target)) else {
                    continue;
                };
                let (to, from) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                thread::spawn(move || pass(from, to, None));
                thread::spawn(move || pass(server, client, Some(random)));
            }
        });
        Relay { address }
    }
}

/// Passes bytes on, each piece after a while.
fn pass(mut from: TcpStream, mut to: TcpStream, lag: Option<&Random>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if let Some(random) = lag {
            thread::park_timeout(Duration::from_millis(random.below(LAG_MS_MAX)));
        }
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}

/// Numbers by chance, from a seed.
struct Random(AtomicU64);

impl Random {
    fn below(&self, end: u64) -> u64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut x = self.0.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ x >> 31) % end
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn who_writes_reads_it_through_any_node_under_lag() {
    let seed = setting("LITEFS_TEST_SEED", u64::from(std::process::id()));
    println!("LITEFS_TEST_SEED={seed}");
    let random: &Random = Box::leak(Box::new(Random(AtomicU64::new(seed))));
    let reads = setting("LITEFS_TEST_READS", READS as u64) as usize;
    let mut site = Site { nodes: Vec::new(), apps: Vec::new(), proxies: Vec::new() };
    let plan = Plan::default();
    site.add(&plan, Member::Primary);
    let primary = site.nodes[0].url()["http://".len()..].to_owned();
    for _ in 0..2 {
        let relay = Relay::to(&primary, random);
        site.add(&plan, Member::Replica(&format!("http://{}", relay.address)));
    }
    site.nodes.iter_mut().for_each(Node::spawn);
    site.nodes.iter().for_each(Node::wait_ready);
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let site = &site;
            scope.spawn(move || write_and_read(site, random, client, reads / CLIENTS));
        }
    });
    let waits = "litefs_proxy_wait_count{for=\"txid\",result=\"met\"}";
    let waited: f64 = (0..3).map(|node| site.metric(node, waits)).sum();
    assert!(waited > 0.0, "nothing lagged: the test shows nothing");
    let sum = crate::support::sqlite::run(
        &site.nodes[0].file("app.db"),
        "select sum(value), count(*) from numbers",
    );
    assert_eq!(sum, format!("{}|{CLIENTS}", reads / CLIENTS * CLIENTS));
    println!("{reads} writes and reads, {waited} reads waited");
}

/// A client that adds to its number through one node and reads it through another.
fn write_and_read(site: &Site, random: &Random, client: usize, times: usize) {
    let mut nodes: Vec<_> = site.proxies.iter().map(|proxy| Connection::open(proxy)).collect();
    let mut seen = String::new();
    for expected in 1..=times {
        let any = || random.below(nodes.len() as u64) as usize;
        let (to, from) = (any(), any());
        let written = nodes[to].ask("POST", &format!("/add/{client}"), &seen, b"");
        assert_eq!(written.seen(), (200, expected.to_string()), "written through node {to}");
        seen = cookie(&written).expect("a cookie");
        let read = nodes[from].ask("GET", &format!("/get/{client}"), &seen, b"");
        assert_eq!(read.seen(), (200, expected.to_string()), "read through node {from}");
    }
}
