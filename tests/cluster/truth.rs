//! What a node says of itself and of its primary: `.primary`, `.lag`, `NAME-pos`, `/info` and `/events`
//! tell the truth one heartbeat after it has changed.
//!
//! A heartbeat comes once a second. How long it took is printed; a loaded machine gets [`GENEROUS`].

use std::fmt::Debug;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::lease::primary_of;
use crate::support::consul::{Consul, Link};
use crate::support::node::{Lease, Member, Node, Settings};
use crate::support::{sqlite, wait};

const DB: &str = "app.db";
const TTL: &str = "4s";

/// How often a primary says that it is there.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// What a loaded machine may make of that.
const GENEROUS: Duration = Duration::from_secs(10);
/// What `.lag` says before any news.
const NO_NEWS: i64 = i32::MAX as i64;

/// Who is primary, as one node says it in every way that it has.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Says {
    /// The node itself.
    Me,
    /// That one.
    Other(&'static str),
    /// Nobody.
    Nobody,
}

/// A node, with the last change of the primary that its events told.
struct Witness {
    node: Node,
    name: &'static str,
    told: Arc<Mutex<Option<(bool, String)>>>,
}

impl Witness {
    fn start(consul_url: &str, name: &'static str, advertise: &str) -> Witness {
        let lease = Lease { url: consul_url, hostname: name, advertise, candidate: true, ttl: TTL };
        let mut node = Node::new(&Settings::default(), Member::Consul(lease));
        node.start();
        Witness::of(node, name)
    }

    fn of(node: Node, name: &'static str) -> Witness {
        let told = Arc::new(Mutex::new(None));
        let mut socket = TcpStream::connect(node.address()).unwrap();
        write!(socket, "GET /events HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let of_thread = told.clone();
        // Ends with the node.
        std::thread::spawn(move || {
            for line in BufReader::new(socket).lines().map_while(Result::ok) {
                let Ok(event) = serde_json::from_str::<Value>(&line) else { continue };
                let text = |field| event.pointer(field).and_then(Value::as_str).unwrap_or_default();
                if ["init", "primaryChange"].contains(&text("/type")) {
                    let leads = event.pointer("/data/isPrimary") == Some(&Value::Bool(true));
                    let hostname = text("/data/hostname").to_owned();
                    *of_thread.lock().unwrap() = Some((leads, hostname));
                }
            }
        });
        Witness { node, name, told }
    }

    /// What the API answers: whether the node leads, and who does.
    fn info(&self) -> (bool, String) {
        let info: Value = serde_json::from_str(&self.node.get("/info")).unwrap();
        let hostname = info["primary"]["hostname"].as_str().unwrap_or_default();
        (info["isPrimary"] == Value::Bool(true), hostname.to_owned())
    }

    /// Milliseconds.
    fn lag(&self) -> i64 {
        let text = std::fs::read_to_string(self.node.file(".lag")).unwrap();
        text.trim().parse().unwrap_or_else(|_| panic!("{text:?}"))
    }

    /// What is wrong with what the node says.
    fn errors(&self, says: &Says) -> Vec<String> {
        let (hostname, leads, file) = match says {
            Says::Me => (self.name, true, ""),
            Says::Other(name) => (*name, false, *name),
            Says::Nobody => ("", false, ""),
        };
        let mut errors = Vec::new();
        let mut check = |what: &str, found: &dyn Debug, right: bool| {
            if !right {
                errors.push(format!("{} {what}: {found:?}", self.name));
            }
        };
        let found = primary_of(&self.node);
        check(".primary", &found, found == file);
        let info = self.info();
        check("/info", &info, info == (leads, hostname.to_owned()));
        let told = self.told.lock().unwrap().clone();
        // An event tells the other node's name only.
        let right = told.as_ref().is_some_and(|(is, name)| *is == leads && (leads || name == file));
        check("/events", &told, right);
        let lag = self.lag();
        let right = match says {
            Says::Me => lag == 0,
            Says::Other(_) => lag < GENEROUS.as_millis() as i64,
            Says::Nobody => lag > 0,
        };
        check(".lag", &lag, right);
        errors
    }
}

/// Waits until all say what they should; no longer than [`GENEROUS`] after `since`.
#[track_caller]
fn wait_for_truth(what: &str, since: Instant, all: &[(&Witness, Says)]) {
    let errors = || all.iter().flat_map(|(node, says)| node.errors(says)).collect::<Vec<_>>();
    wait::until_or(|| format!("{what}: {:?}", errors()), || errors().is_empty().then_some(()));
    let took = since.elapsed();
    println!("{what}: true after {} ms, of {} ms", took.as_millis(), HEARTBEAT.as_millis());
    assert!(took <= GENEROUS, "{what}: true only after {took:?}");
}

/// Waits until a row is committed on `node`: from then on it is the primary. When that was.
#[track_caller]
fn write(witness: &Witness, value: u32) -> Instant {
    let sql = format!("insert into t values ({value})");
    wait::until_or(
        || format!("a write on {}:\n{}", witness.name, witness.node.log()),
        || sqlite::try_run(&witness.node.file(DB), &sql).is_ok().then(Instant::now),
    )
}

/// All stand where `primary` stands.
#[track_caller]
fn check_pos(what: &str, since: Instant, primary: &Witness, others: &[&Witness]) {
    let pos = primary.node.pos(DB);
    assert!(!pos.is_zero());
    for other in others {
        other.node.wait_for_pos(DB, pos);
    }
    let took = since.elapsed();
    println!("{what}: -pos true after {} ms, of {} ms", took.as_millis(), HEARTBEAT.as_millis());
    assert!(took <= GENEROUS, "{what}: positions are equal only after {took:?}");
}

fn three(consul: &Consul) -> [Witness; 3] {
    let [a, b, c] = ["a", "b", "c"].map(|name| Witness::start(&consul.url(), name, ""));
    sqlite::run(&a.node.file(DB), "pragma journal_mode = wal; create table t(x)");
    let now = Instant::now();
    check_pos("start", now, &a, &[&b, &c]);
    let all = [(&a, Says::Me), (&b, Says::Other("a")), (&c, Says::Other("a"))];
    wait_for_truth("start", now, &all);
    [a, b, c]
}

#[test]
fn all_say_who_is_primary_a_heartbeat_after_a_failover() {
    let consul = Consul::start();
    let [mut a, b, c] = three(&consul);
    a.node.kill();
    // One of the others.
    let (mut new, mut old) = (b, c);
    let since = wait::until("another primary", || {
        if sqlite::try_run(&old.node.file(DB), ".timeout 0\ninsert into t values (1)").is_ok() {
            std::mem::swap(&mut new, &mut old);
            return Some(Instant::now());
        }
        let written = sqlite::try_run(&new.node.file(DB), ".timeout 0\ninsert into t values (1)");
        written.is_ok().then(Instant::now)
    });
    check_pos("failover", since, &new, &[&old]);
    let name = new.name;
    wait_for_truth("failover", since, &[(&new, Says::Me), (&old, Says::Other(name))]);
    a.node.start();
    let a = Witness::of(a.node, "a");
    let since = Instant::now();
    wait_for_truth("return", since, &[(&a, Says::Other(name)), (&new, Says::Me)]);
    check_pos("return", since, &new, &[&a, &old]);
}

#[test]
fn all_say_who_is_primary_a_heartbeat_after_a_hand_off() {
    let consul = Consul::start();
    let [a, b, c] = three(&consul);
    let output = b.node.litefs("promote", &[]);
    assert!(output.status.success(), "{output:?}");
    let since = Instant::now();
    // It is said when it is so, and so it is true at once on the two that it concerns.
    assert_eq!(a.info(), (false, "b".to_owned()));
    assert_eq!(b.info(), (true, "b".to_owned()));
    assert_eq!((primary_of(&a.node), primary_of(&b.node)), ("b".to_owned(), String::new()));
    let all = [(&a, Says::Other("b")), (&b, Says::Me), (&c, Says::Other("b"))];
    wait_for_truth("hand-off", since, &all);
    let since = write(&b, 1);
    check_pos("hand-off", since, &b, &[&a, &c]);
}

/// The primary is where it was, and cannot be heard.
#[test]
fn a_replica_says_within_a_heartbeat_how_long_it_has_heard_nothing() {
    let consul = Consul::start();
    let url = consul.url();
    let lease =
        |advertise| Lease { url: &url, hostname: "a", advertise, candidate: true, ttl: TTL };
    let mut node = Node::new(&Settings::default(), Member::Consul(lease("")));
    let link = Link::to(node.address());
    let advertise = format!("http://{}", link.address());
    node.configure(&Settings::default(), Member::Consul(lease(&advertise)));
    node.start();
    let a = Witness::of(node, "a");
    sqlite::run(&a.node.file(DB), "pragma journal_mode = wal; create table t(x)");
    let b = Witness::start(&consul.url(), "b", "");
    check_pos("start", Instant::now(), &a, &[&b]);
    link.cut();
    let cut = Instant::now();
    let before = b.node.pos(DB);
    write(&a, 1);
    // Each time that it is asked it is at the most one heartbeat off.
    for beats in 1..=3 {
        wait::until_true("a heartbeat", || cut.elapsed() >= beats * HEARTBEAT);
        let least = cut.elapsed().as_millis() as i64;
        let lag = b.lag();
        let most = cut.elapsed() + GENEROUS;
        println!("cut for {least} ms: .lag says {lag}");
        // The clocks of both are one; what a heartbeat took on its way counts as difference.
        assert!(lag + 100 >= least && lag <= most.as_millis() as i64, "{lag} after {least} ms");
        assert_eq!((b.info(), primary_of(&b.node)), ((false, "a".to_owned()), "a".to_owned()));
        assert_eq!(*b.told.lock().unwrap(), Some((false, "a".to_owned())));
        assert_eq!(b.node.pos(DB), before);
    }
    assert_eq!(a.info(), (true, "a".to_owned()));
    link.mend();
    let since = Instant::now();
    check_pos("mended", since, &a, &[&b]);
    wait::until_true("news", || b.lag() < HEARTBEAT.as_millis() as i64);
    wait_for_truth("mended", since, &[(&a, Says::Me), (&b, Says::Other("a"))]);
}

#[test]
fn a_node_without_a_primary_is_told_apart_from_a_primary() {
    let consul = Consul::start();
    let link = Link::to(consul.address());
    let a = Witness::start(&format!("http://{}", link.address()), "a", "");
    sqlite::run(&a.node.file(DB), "pragma journal_mode = wal; create table t(x)");
    wait_for_truth("start", Instant::now(), &[(&a, Says::Me)]);
    link.cut();
    a.node.wait_for_log("exiting primary, lease lost");
    let since = Instant::now();
    wait_for_truth("alone", since, &[(&a, Says::Nobody)]);
    assert_eq!(a.lag(), NO_NEWS);
    let refused = sqlite::refused(&a.node.file(DB), ".timeout 0\ninsert into t values (1)");
    assert!(refused.contains("locked"), "{refused}");
    link.mend();
    let since = write(&a, 2);
    wait_for_truth("again", since, &[(&a, Says::Me)]);
}

/// One that may not lead itself, while nobody else does: what it says of itself is neither a primary's nor a
/// replica's, but for how old its data is.
#[test]
fn a_replica_says_that_nobody_leads_and_how_old_it_is() {
    let consul = Consul::start();
    let url = consul.url();
    let mut a = Witness::start(&url, "a", "");
    sqlite::run(&a.node.file(DB), "pragma journal_mode = wal; create table t(x)");
    let lease = Lease { url: &url, hostname: "b", advertise: "", candidate: false, ttl: TTL };
    let mut node = Node::new(&Settings::default(), Member::Consul(lease));
    node.start();
    let b = Witness::of(node, "b");
    check_pos("start", Instant::now(), &a, &[&b]);
    wait_for_truth("start", Instant::now(), &[(&b, Says::Other("a"))]);
    let pos = b.node.pos(DB);
    a.node.kill();
    let dead = Instant::now();
    // As long as the lease is its, it is the primary.
    b.node.wait_for_log("cannot find primary & ineligible to become primary");
    let since = Instant::now();
    wait_for_truth("nobody", since, &[(&b, Says::Nobody)]);
    let (least, lag) = (dead.elapsed().as_millis() as i64, b.lag());
    println!("for {least} ms without a primary: .lag says {lag}");
    assert!(lag + 100 >= least && lag < NO_NEWS, "{lag} after {least} ms");
    assert_eq!(b.node.pos(DB), pos);
    a.node.start();
    let a = Witness::of(a.node, "a");
    let since = Instant::now();
    wait_for_truth("again", since, &[(&a, Says::Me), (&b, Says::Other("a"))]);
    let since = write(&a, 1);
    check_pos("again", since, &a, &[&b]);
}
