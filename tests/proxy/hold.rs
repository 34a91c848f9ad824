//! A primary that is not there when a write comes.

use std::net::TcpStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use test_case::test_case;

use super::wire::{self, Connection, Message};
use super::{Plan, Site};
use crate::support::consul::Consul;
use crate::support::node::{Lease, Member, Node, Settings};
use crate::support::process::Process;
use crate::support::wait;

const PATIENT: Plan = Plan {
    proxy: ", primary-redirect-timeout: 25s",
    http: "",
    lease: "",
    environment: &[],
    lines: "",
};

#[test]
fn a_write_waits_for_a_primary_that_comes_back() {
    let mut site = Site::with(2, &PATIENT);
    assert_eq!(site.ask(1, "POST", "/add/a", "").seen(), (200, "1".to_owned()));
    site.nodes[0].kill();
    let proxy = site.proxies[1].clone();
    let body = "x".repeat(100_000);
    let writer = thread::spawn(move || {
        let mut connection = Connection::open(&proxy);
        connection.ask("POST", "/add/a", "", body.as_bytes()).seen()
    });
    let waits = "litefs_proxy_in_flight";
    wait::until_true("the write at the replica", || site.metric(1, waits) == 1.0);
    site.nodes[0].start();
    assert_eq!(writer.join().unwrap(), (200, "2".to_owned()));
    // The application got it once.
    assert_eq!(site.ask(0, "GET", "/get/a", "").text(), "2");
    assert_eq!(site.metric(1, "litefs_proxy_wait_count{for=\"primary\",result=\"met\"}"), 1.0);
}

/// Whoever of the two that are left becomes primary: each of them takes a write meanwhile.
#[test_case(Signal::SIGTERM)]
#[test_case(Signal::SIGKILL)]
fn a_write_waits_for_another_primary(signal: Signal) {
    let consul = Consul::start();
    let mut site = Site { nodes: Vec::new(), apps: Vec::new(), proxies: Vec::new() };
    for hostname in ["node0", "node1", "node2"] {
        let (url, advertise) = (&consul.url(), "");
        let lease = Lease { url, hostname, advertise, candidate: true, ttl: "4s" };
        site.add(&PATIENT, Member::Consul(lease));
        site.nodes.last_mut().unwrap().start();
    }
    let written = site.ask(1, "POST", "/add/a", "");
    assert_eq!(written.seen(), (200, "1".to_owned()));
    for node in &site.nodes {
        node.wait_for_pos("app.db", site.nodes[0].pos("app.db"));
    }
    site.apps[0].close();
    match signal {
        Signal::SIGTERM => assert!(site.nodes[0].stop().success()),
        _ => site.nodes[0].kill(),
    }
    let write =
        |proxy: String| thread::spawn(move || wire::ask(&proxy, "POST", "/add/a", "", b"x"));
    let writers = [1, 2].map(|node| write(site.proxies[node].clone()));
    let mut answers = writers.map(|writer| writer.join().unwrap());
    answers.sort_by_key(wire::Message::text);
    assert_eq!(answers[0].seen(), (200, "2".to_owned()));
    assert_eq!(answers[1].seen(), (200, "3".to_owned()));
    let seen = wire::cookie(&answers[1]).expect("a cookie");
    for node in [1, 2] {
        assert_eq!(site.ask(node, "GET", "/get/a", &seen).seen(), (200, "3".to_owned()));
    }
    assert_eq!(site.apps[0].requests(), 1);
}

/// A lease that is on its way from node 0 to node 1, which is stopped; what came of it in the end.
fn handing_over() -> (Consul, Site, thread::JoinHandle<Message>) {
    let consul = Consul::start();
    let mut site = Site { nodes: Vec::new(), apps: Vec::new(), proxies: Vec::new() };
    for hostname in ["node0", "node1"] {
        let (url, advertise) = (&consul.url(), "");
        let lease = Lease { url, hostname, advertise, candidate: true, ttl: "30s" };
        site.add(&PATIENT, Member::Consul(lease));
        site.nodes.last_mut().unwrap().start();
    }
    assert_eq!(site.ask(0, "POST", "/add/a", "").text(), "1");
    site.nodes[1].wait_for_pos("app.db", site.nodes[0].pos("app.db"));
    let id = site.node_id(1);
    site.nodes[1].signal(Signal::SIGSTOP);
    let primary = site.nodes[0].address().to_owned();
    let asked = thread::spawn(move || {
        wire::ask(&primary, "POST", &format!("/handoff?nodeID={id}"), "", b"")
    });
    let connection = rusqlite::Connection::open(site.nodes[0].file("app.db")).unwrap();
    connection.busy_timeout(Duration::ZERO).unwrap();
    wait::until_true("the pause", || {
        connection.execute_batch("begin immediate; rollback").is_err()
    });
    (consul, site, asked)
}

/// Whether the lease was taken, which it may be if that is `wanted`, and was not in time otherwise.
fn was_taken(asked: thread::JoinHandle<Message>, wanted: bool) -> bool {
    let answer = asked.join().unwrap();
    let is_taken = answer.status() == 200;
    let is_late = answer.text().contains("did not take the lease in time");
    assert!(if is_taken { wanted } else { is_late }, "{answer:?}");
    is_taken
}

/// While the lease is on its way to a node that is slow to take it, the primary's own application could
/// only fail; where the lease ends up the write is made.
#[test_case(true; "the other node takes it")]
#[test_case(false; "it stays")]
fn a_write_waits_while_the_lease_is_handed_over(taken: bool) {
    // A slow machine may be too slow for the other node to take it in time.
    wait::until_true("the lease where it should be", || write_during_handoff(taken) == taken);
}

/// A write that waits, whether the other node takes the lease or not; whether it did.
fn write_during_handoff(taken: bool) -> bool {
    let (_consul, site, asked) = handing_over();
    let proxy = site.proxies[0].clone();
    let writer = thread::spawn(move || wire::ask(&proxy, "POST", "/add/a", "", b"x").seen());
    wait::until_true("the write", || site.metric(0, "litefs_proxy_in_flight") == 1.0);
    if taken {
        site.nodes[1].signal(Signal::SIGCONT);
    }
    let taken = was_taken(asked, taken);
    assert_eq!(writer.join().unwrap(), (200, "2".to_owned()));
    site.nodes[1].signal(Signal::SIGCONT);
    let made = [site.apps[0].requests(), site.apps[1].requests()];
    assert_eq!(made, if taken { [1, 1] } else { [2, 0] });
    taken
}

/// The node that takes the lease may be ahead of the one that gives it, and only the primary can say that
/// what a client has seen is lost.
#[test_case(true; "the other node takes it")]
#[test_case(false; "it stays")]
fn a_read_waits_while_the_lease_is_handed_over(taken: bool) {
    // A slow machine may be too slow for the other node to take it in time.
    wait::until_true("the lease where it should be", || read_during_handoff(taken) == taken);
}

/// A read that waits, whether the other node takes the lease or not; whether it did.
fn read_during_handoff(taken: bool) -> bool {
    let (_consul, site, asked) = handing_over();
    let mut reader = Connection::open(&site.proxies[0]);
    reader.write("GET /get/a HTTP/1.1\r\nHost: a\r\nCookie: __txid=00000000ffffffff\r\n\r\n");
    assert!(reader.is_silent_for(Duration::from_millis(300)), "who may be no primary has answered");
    if taken {
        site.nodes[1].signal(Signal::SIGCONT);
    }
    let taken = was_taken(asked, taken);
    let answer = reader.answer("GET");
    assert_eq!(answer.seen(), (200, "1".to_owned()));
    let last = format!("cookie: __txid={}\r\n", site.nodes[0].pos("app.db").txid);
    assert_eq!(wire::cookie(&answer), Some(last));
    site.nodes[1].signal(Signal::SIGCONT);
    let made = [site.apps[0].requests(), site.apps[1].requests()];
    assert_eq!(made, if taken { [1, 1] } else { [2, 0] });
    taken
}

/// The former primary is alive, and may take its time also where another one is primary now.
#[test]
fn a_long_write_outlasts_a_handoff_to_the_node_that_passed_it_on() {
    let consul = Consul::start();
    let mut site = Site { nodes: Vec::new(), apps: Vec::new(), proxies: Vec::new() };
    let plan = Plan { proxy: ", primary-redirect-timeout: 2s", ..Plan::default() };
    for hostname in ["node0", "node1"] {
        let (url, advertise) = (&consul.url(), "");
        let lease = Lease { url, hostname, advertise, candidate: true, ttl: "30s" };
        site.add(&plan, Member::Consul(lease));
        site.nodes.last_mut().unwrap().start();
    }
    let mut writer = Connection::open(&site.proxies[1]);
    writer.write(
        "POST /late HTTP/1.1
Host: a

",
    );
    wait::until_true("the request", || site.apps[0].requests() == 1);
    let path = format!("/handoff?nodeID={}", site.node_id(1));
    assert_eq!(wire::ask(site.nodes[0].address(), "POST", &path, "", b"").status(), 200);
    assert!(
        writer.is_silent_for(Duration::from_secs(3)),
        "the answer of a node that knows nothing"
    );
    site.apps[0].release();
    assert_eq!(writer.answer("POST").status(), 200);
}

/// What was passed on to a host that died has no answer, and need not be waited for as long as TCP tries.
#[test_case(1; "here is the primary now")]
#[test_case(2; "a third node is the primary now")]
fn a_write_fails_once_the_host_it_was_passed_on_to_is_dead(asked: usize) {
    let consul = Consul::start();
    let mut site = Site { nodes: Vec::new(), apps: Vec::new(), proxies: Vec::new() };
    for (hostname, candidate) in [("node0", true), ("node1", true), ("node2", false)] {
        let (url, advertise) = (&consul.url(), "");
        let lease = Lease { url, hostname, advertise, candidate, ttl: "30s" };
        site.add(&Plan::default(), Member::Consul(lease));
        site.nodes.last_mut().unwrap().start();
    }
    let mut writer = Connection::open(&site.proxies[asked]);
    writer.write("POST /late HTTP/1.1\r\nHost: a\r\n\r\n");
    wait::until_true("the request", || site.apps[0].requests() == 1);
    let path = format!("/handoff?nodeID={}", site.node_id(1));
    assert_eq!(wire::ask(site.nodes[0].address(), "POST", &path, "", b"").status(), 200);
    site.nodes[0].signal(Signal::SIGSTOP);
    // A host that is gone neither takes nor refuses a connection, nor does one with so many that wait.
    let mut crowd = Process::open(Path::new("/dev/null"));
    let (_, port) = site.proxies[0].rsplit_once(':').unwrap();
    crowd.expect("(n := __import__('resource')).setrlimit(n.RLIMIT_NOFILE, (4096, 4096))", "None");
    crowd.expect("(s := [__import__('socket').socket() for _ in range(1100)]) and None", "None");
    let connect = format!("c.setblocking(False) or c.connect_ex(('127.0.0.1', {port}))");
    crowd.expect(&format!("[{connect} for c in s] and None"), "None");
    let proxy = site.proxies[0].parse().unwrap();
    let answers = || TcpStream::connect_timeout(&proxy, Duration::from_secs(1)).is_ok();
    wait::until_true("silence", || !answers());
    writer.writer().set_read_timeout(Some(2 * wait::DEADLINE)).unwrap();
    let answer = writer.answer("POST");
    assert_eq!(answer.status(), 502);
    assert!(answer.text().contains("whether the request took effect is unknown"), "{answer:?}");
    site.nodes[0].signal(Signal::SIGCONT);
}

/// A primary that stops has no proxy any more while it hands its lease over.
#[test]
fn a_body_that_waits_to_be_asked_for_waits_for_another_primary() {
    let consul = Consul::start();
    let mut site = Site { nodes: Vec::new(), apps: Vec::new(), proxies: Vec::new() };
    for (hostname, candidate) in [("node0", true), ("node1", true), ("node2", false)] {
        let (url, advertise) = (&consul.url(), "");
        let lease = Lease { url, hostname, advertise, candidate, ttl: "30s" };
        site.add(&PATIENT, Member::Consul(lease));
        site.nodes.last_mut().unwrap().start();
    }
    assert_eq!(site.ask(2, "POST", "/add/a", "").text(), "1");
    site.nodes[1].wait_for_pos("app.db", site.nodes[0].pos("app.db"));
    site.apps[0].close();
    site.nodes[1].signal(Signal::SIGSTOP);
    site.nodes[0].signal(Signal::SIGTERM);
    wait::until_true("the end of the proxy", || TcpStream::connect(&site.proxies[0]).is_err());
    let mut writer = Connection::open(&site.proxies[2]);
    writer.write(
        "POST /add/a HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n",
    );
    assert!(writer.is_silent_for(Duration::from_millis(300)), "nobody can have it");
    site.nodes[1].signal(Signal::SIGCONT);
    assert_eq!(writer.answer("POST").status(), 100);
    writer.write("x");
    assert_eq!(writer.answer("POST").seen(), (200, "2".to_owned()));
    assert_eq!((site.apps[0].requests(), site.apps[1].requests()), (1, 1));
}

#[test]
fn a_write_is_refused_when_no_primary_comes() {
    let mut site = Site::with(2, &Plan { proxy: ", primary-redirect-timeout: 100ms", ..PATIENT });
    site.nodes[0].kill();
    wait::until_true("the end of the stream", || {
        site.nodes[1].log_count("disconnected from primary") > 0
    });
    let refused = site.ask(1, "POST", "/add/a", "");
    let url = site.nodes[0].url();
    let text = format!("Proxy error: no connection to the primary primary at {url}\n");
    assert_eq!(refused.seen(), (503, text));
    assert_eq!(refused.header("retry-after"), Some("1"));
    // Reads go on.
    assert_eq!(site.ask(1, "GET", "/echo", "").status(), 200);
}

/// A LiteFS primary has no proxy that it tells of; nor has this one.
#[test]
fn a_write_is_refused_when_the_primary_has_no_proxy() {
    let mut site = Site { nodes: Vec::new(), apps: Vec::new(), proxies: Vec::new() };
    let primary = Node::primary(&Settings::default());
    site.add(&Plan::default(), Member::Replica(&primary.url()));
    site.nodes[0].start();
    let text = "Proxy error: the primary primary has no proxy that takes writes of other nodes\n";
    assert_eq!(site.ask(0, "POST", "/add/a", "").seen(), (503, text.to_owned()));
}

#[test]
fn a_node_that_is_not_ready_says_so() {
    let mut site = Site { nodes: Vec::new(), apps: Vec::new(), proxies: Vec::new() };
    site.add(&Plan::default(), Member::Primary);
    let url = site.nodes[0].url();
    site.add(
        &Plan { proxy: ", primary-redirect-timeout: 100ms", ..PATIENT },
        Member::Replica(&url),
    );
    site.nodes[1].spawn();
    site.nodes[1].wait_for_log("waiting to connect to cluster");
    let health = site.ask(1, "GET", "/litefs/health", "");
    assert_eq!(health.seen(), (503, "not ready\n".to_owned()));
    assert_eq!(site.ask(1, "HEAD", "/litefs/health", "").status(), 503);
    let refused = site.ask(1, "GET", "/get/a", "");
    assert_eq!(refused.seen(), (503, "Proxy error: the node is not ready\n".to_owned()));
    assert_eq!(site.apps[1].requests(), 0);
    site.nodes[0].start();
    site.nodes[1].wait_ready();
    assert_eq!(site.ask(1, "GET", "/litefs/health", "").status(), 200);
    assert_eq!(site.ask(1, "GET", "/echo", "").status(), 200);
}

#[test]
fn an_application_that_starts_late_is_waited_for() {
    let mut site = Site::of(1);
    let app = site.apps.remove(0);
    let (address, database) = (app.address.clone(), site.nodes[0].file("app.db"));
    drop(app);
    wait::until_true("the end of the application", || TcpStream::connect(&address).is_err());
    let proxy = site.proxies[0].clone();
    let client = thread::spawn(move || wire::ask(&proxy, "POST", "/add/a", "", b"x").seen());
    wait::until_true("the request", || site.metric(0, "litefs_proxy_in_flight") == 1.0);
    site.apps.push(super::app::App::start(&address, &database));
    assert_eq!(client.join().unwrap(), (200, "1".to_owned()));
}

#[test]
fn a_primary_that_dies_with_the_request_is_an_error() {
    let mut site = Site::with(2, &PATIENT);
    let proxy = site.proxies[1].clone();
    let client = thread::spawn(move || wire::ask(&proxy, "POST", "/late", "", b"x"));
    wait::until_true("the request", || site.apps[0].requests() == 1);
    site.nodes[0].kill();
    // It may have taken effect, so it is not sent again.
    assert_eq!(client.join().unwrap().status(), 502);
    site.apps[0].release();
    assert_eq!(site.apps[0].requests(), 1);
}

#[test]
fn a_node_that_stops_refuses_what_waits() {
    let mut site = Site::with(2, &PATIENT);
    site.nodes[0].kill();
    wait::until_true("the end of the stream", || {
        site.nodes[1].log_count("disconnected from primary") > 0
    });
    let proxy = site.proxies[1].clone();
    let client = thread::spawn(move || wire::ask(&proxy, "POST", "/add/a", "", b"x").seen());
    wait::until_true("the request", || site.metric(1, "litefs_proxy_in_flight") == 1.0);
    assert!(site.nodes[1].stop().success());
    assert_eq!(client.join().unwrap(), (503, "Proxy error: the node stops\n".to_owned()));
}
