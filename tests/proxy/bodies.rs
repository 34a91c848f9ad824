//! Large and strange messages through one or two proxies: to node 0, the primary, and through node 1.

use std::io::Write as _;
use std::time::Duration;

use super::app::{pattern, sum};
use super::wire::Connection;
use super::{Plan, Site};
use crate::support::node::Member;
use crate::support::wait;

const LARGE: usize = 6 << 20;

#[test]
fn large_bodies_go_both_ways() {
    let site = Site::of(2);
    let data = pattern(LARGE);
    let expected = format!("{LARGE} {}", sum(&data));
    for node in 0..2 {
        let mut connection = Connection::open(&site.proxies[node]);
        assert_eq!(connection.ask("POST", "/upload", "", &data).text(), expected);
        assert!(connection.ask("POST", &format!("/download/{LARGE}"), "", b"").body == data);
        // Chunks of all sizes, on the same connection.
        connection.write("POST /upload HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
        let mut writer = connection.writer();
        let chunks: Vec<u8> = data
            .chunks(77_777)
            .flat_map(|chunk| {
                [format!("{:x}\r\n", chunk.len()).as_bytes(), chunk, b"\r\n"].concat()
            })
            .collect();
        writer.write_all(&chunks).unwrap();
        writer.write_all(b"0\r\n\r\n").unwrap();
        assert_eq!(connection.answer("POST").text(), expected);
        let chunks = connection.ask("POST", "/chunks/2000", "", b"").body;
        assert_eq!((chunks.len(), &chunks[..8]), (8000, &b"00000001"[..]));
    }
    assert_eq!(site.apps[1].requests(), 0);
}

#[test]
fn a_read_may_have_a_body() {
    let site = Site::with(2, &Plan { proxy: ", always-forward: ['/upload']", ..Plan::default() });
    for node in 0..2 {
        let mut connection = Connection::open(&site.proxies[node]);
        let expected = format!("5 {}", sum(b"01234"));
        assert_eq!(connection.ask("GET", "/upload", "", b"01234").text(), expected);
        connection.write("GET /upload HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
        connection.write("2\r\n01\r\n3\r\n234\r\n0\r\n\r\n");
        assert_eq!(connection.answer("GET").text(), expected);
        // One that has none is not given one.
        let echo = connection.ask("GET", "/echo", "", b"").text().to_lowercase();
        assert!(!echo.contains("transfer-encoding") && !echo.contains("content-length"), "{echo}");
    }
    assert_eq!(site.apps[1].requests(), 1);
}

#[test]
fn both_ways_at_a_time() {
    // The application answers while it is being told: what was sent is what comes back.
    let site = Site::of(2);
    let mut connection = Connection::open(&site.proxies[1]);
    connection.write(
        b"GET /socket HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    );
    assert_eq!(connection.head().unwrap().status(), 101);
    assert_eq!(connection.bytes(5), b"hello");
    let mut writer = connection.writer();
    let line = "x".repeat(99);
    let wanted = 20_000;
    let sender = std::thread::spawn(move || {
        for _ in 0..wanted {
            writeln!(writer, "{line}").unwrap();
        }
    });
    for _ in 0..wanted {
        assert_eq!(connection.line().len(), "echo ".len() + 99);
    }
    sender.join().unwrap();
}

#[test]
fn a_protocol_switch_is_a_tunnel_through_every_proxy() {
    let site = Site::with(2, &Plan { proxy: ", always-forward: ['/socket']", ..Plan::default() });
    for node in 0..2 {
        let mut connection = Connection::open(&site.proxies[node]);
        let answer = connection.ask(
            "GET",
            "/socket",
            "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n",
            b"",
        );
        assert_eq!((answer.status(), answer.header("upgrade")), (101, Some("websocket")));
        assert_eq!(answer.header("connection").map(str::to_lowercase), Some("upgrade".into()));
        assert_eq!(connection.bytes(5), b"hello");
        for text in ["one", "two"] {
            connection.write(format!("{text}\n"));
            assert_eq!(connection.line(), format!("echo {text}"));
        }
        // An empty line ends the application's side, and so ours.
        connection.write("\n");
        assert!(connection.ends());
    }
    assert_eq!(site.apps[1].requests(), 0);
}

#[test]
fn tunnels_are_connections_that_count() {
    let mut site = Site { nodes: Vec::new(), apps: Vec::new(), proxies: Vec::new() };
    site.add(&Plan::default(), Member::Primary);
    // A connection for three files.
    let connections_max = 80;
    site.nodes[0].limit_files(3 * connections_max);
    site.nodes[0].start();
    let tunnel = |_| {
        let mut connection = Connection::open(&site.proxies[0]);
        let head = "Connection: Upgrade\r\nUpgrade: websocket\r\n";
        assert_eq!(connection.ask("GET", "/socket", head, b"").status(), 101);
        assert_eq!(connection.bytes(5), b"hello");
        connection
    };
    let mut tunnels: Vec<_> = (0..connections_max).map(tunnel).collect();
    let mut next = Connection::open(&site.proxies[0]);
    next.write("GET /echo HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(next.is_silent_for(Duration::from_millis(300)), "one connection too many");
    tunnels.pop().unwrap().close();
    assert_eq!(next.answer("GET").status(), 200);
}

#[test]
fn events_come_when_they_are_made() {
    let plan = Plan { proxy: ", always-forward: ['/events']", ..Plan::default() };
    let site = Site::with(2, &plan);
    let mut connection = Connection::open(&site.proxies[1]);
    connection.write("GET /events HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(connection.head().unwrap().header("content-type"), Some("text/event-stream"));
    for number in 0..3 {
        // The next one is made only after this one has arrived.
        assert_eq!(connection.chunk().unwrap(), format!("data: {number}\n\n").as_bytes());
        site.apps[0].release();
    }
    assert_eq!(site.apps[1].requests(), 0);
    // The application notices that nobody listens any more.
    connection.close();
    wait::until_true("the end of the request", || {
        site.apps[0].release();
        (0..2).all(|node| site.metric(node, "litefs_proxy_in_flight") == 0.0)
    });
}

#[test]
fn a_body_is_sent_when_it_is_asked_for() {
    let site = Site::of(2);
    for node in 0..2 {
        let mut connection = Connection::open(&site.proxies[node]);
        connection.write(
            "POST /upload HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n",
        );
        assert_eq!(connection.answer("POST").status(), 100);
        connection.write("01234");
        assert_eq!(connection.answer("POST").text(), format!("5 {}", sum(b"01234")));
        // One that nobody wants is not asked for.
        connection.write(
            "POST /refuse HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n",
        );
        assert_eq!(connection.answer("POST").seen(), (417, "no".to_owned()));
        assert!(connection.ends());
    }
}

#[test]
fn an_early_answer_reaches_a_client_that_still_sends() {
    let site = Site::of(2);
    let mut connection = Connection::open(&site.proxies[1]);
    connection.write("POST /refuse HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n");
    let answer = connection.answer("POST");
    // The application closes with the body unread, so its answer may be lost on the way.
    assert!(matches!(answer.status(), 417 | 502), "{}", answer.first);
}

#[test]
fn connections_are_used_again() {
    // Proxies of the environment do not count: nobody answers there.
    let nobody = [("HTTP_PROXY", "http://127.0.0.1:1"), ("http_proxy", "http://127.0.0.1:1")];
    let site = Site::with(2, &Plan { environment: Box::leak(nobody.into()), ..Plan::default() });
    for node in 0..2 {
        let mut connection = Connection::open(&site.proxies[node]);
        for _ in 0..20 {
            assert_eq!(connection.ask("POST", "/echo", "", b"x").status(), 200);
            assert_eq!(connection.ask("GET", "/echo", "", b"").status(), 200);
        }
    }
    // One connection to the application here, and one from the other node; now and then one more, for a
    // request that comes before the last connection is back.
    for (app, requests) in site.apps.iter().zip([60, 20]) {
        assert_eq!(app.requests(), requests);
        assert!(app.connections() * 6 < requests, "{} connections", app.connections());
    }
    // Requests that come without waiting for answers are answered in order.
    let mut connection = Connection::open(&site.proxies[0]);
    connection.write("GET /a HTTP/1.1\r\nHost: a\r\n\r\nGET /b HTTP/1.1\r\nHost: a\r\n\r\n");
    for path in ["/a", "/b"] {
        let echo = connection.answer("GET").text();
        assert!(echo.starts_with(&format!("GET {path} ")), "{echo}");
    }
}

#[test]
fn a_slow_client_is_cut_off() {
    let plan = Plan {
        proxy: ", read-header-timeout: 200ms, read-timeout: 300ms, idle-timeout: 200ms, \
                write-timeout: 300ms",
        ..Plan::default()
    };
    let site = Site::with(1, &plan);
    let begin = |text: &str| {
        let mut connection = Connection::open(&site.proxies[0]);
        connection.write(text);
        connection
    };
    // It sends nothing, half a head, half a body, or nothing more.
    assert!(begin("").ends());
    assert!(begin("GET / HTT").ends());
    let mut half = begin("POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n1");
    let answer = half.head();
    assert!(answer.is_none_or(|answer| answer.status() == 502));
    let mut idle = begin("GET /echo HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(idle.answer("GET").status(), 200);
    assert!(idle.ends());
    // It does not take its answer.
    let mut deaf = begin(&format!("GET /download/{LARGE} HTTP/1.1\r\nHost: a\r\n\r\n"));
    let in_flight = "litefs_proxy_in_flight";
    wait::until_true("the end of the request", || {
        site.apps[0].requests() == 3 && site.metric(0, in_flight) == 0.0
    });
    let mut answer = deaf.head().unwrap();
    let all = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| deaf.body(&mut answer)));
    assert!(all.is_err(), "all of the body came");
}
