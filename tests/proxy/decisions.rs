//! Where a request goes, and what becomes of its headers.

use std::process::Command;

use super::wire::{self, Connection, Message, cookie};
use super::{Plan, Site};
use crate::support::certificates::Certificates;
use crate::support::node::Member;
use crate::support::{program, wait};

/// The lines of an echoed request.
fn lines(text: &str) -> Vec<&str> {
    text.lines().collect()
}

#[test]
fn a_write_goes_to_the_primary_and_a_read_stays() {
    let site = Site::of(2);
    let written = site.ask(1, "POST", "/add/a", "");
    assert_eq!(written.seen(), (200, "1".to_owned()));
    assert_eq!((site.apps[0].requests(), site.apps[1].requests()), (1, 0));
    let seen = cookie(&written).expect("a cookie");
    assert_eq!(site.ask(1, "GET", "/get/a", &seen).seen(), (200, "1".to_owned()));
    assert_eq!((site.apps[0].requests(), site.apps[1].requests()), (1, 1));
    // Methods that change nothing by definition stay too; a CORS preflight is one of them.
    for method in ["HEAD", "OPTIONS"] {
        assert_eq!(site.ask(1, method, "/echo", "").status(), 200);
    }
    assert_eq!((site.apps[0].requests(), site.apps[1].requests()), (1, 3));
    for method in ["PUT", "PATCH", "DELETE", "CUSTOM"] {
        let echo = site.ask(1, method, "/echo?x=%41&y", "");
        assert_eq!(lines(&echo.text())[0], format!("{method} /echo?x=%41&y HTTP/1.1"));
    }
    assert_eq!((site.apps[0].requests(), site.apps[1].requests()), (5, 3));
    let forwarded = "litefs_proxy_request_count{kind=\"write\",outcome=\"forwarded\"}";
    assert_eq!(site.metric(1, forwarded), 5.0);
    let here = "litefs_proxy_request_count{kind=\"read\",outcome=\"target\"}";
    assert_eq!(site.metric(1, here), 3.0);
}

#[test]
fn patterns_decide_before_methods() {
    let plan = Plan {
        proxy: ", passthrough: ['*.js', '/static/*'], always-forward: ['/login', '/ws/*']",
        ..Plan::default()
    };
    let site = Site::with(2, &plan);
    for path in ["/x.js", "/static/a/b"] {
        let answer = site.ask(1, "POST", path, "");
        assert_eq!((answer.status(), cookie(&answer)), (200, None));
    }
    assert_eq!((site.apps[0].requests(), site.apps[1].requests()), (0, 2));
    // What is passed through waits for nothing, whatever the cookie says.
    let ahead = "cookie: __txid=00000000ffffffff\r\n";
    assert_eq!(site.ask(1, "GET", "/x.js", ahead).status(), 200);
    site.ask(0, "POST", "/add/a", "");
    for path in ["/login", "/%6cogin", "/ws/1"] {
        let answer = site.ask(1, "GET", path, "");
        assert!(cookie(&answer).is_some(), "{path} got no cookie");
    }
    assert_eq!((site.apps[0].requests(), site.apps[1].requests()), (4, 3));
}

#[test]
fn a_read_waits_for_no_database_that_the_node_does_not_take() {
    let mut site = Site { nodes: Vec::new(), apps: Vec::new(), proxies: Vec::new() };
    site.add(&Plan::default(), Member::Primary);
    site.nodes[0].start();
    let url = site.nodes[0].url();
    let plan = Plan { lease: ", databases: [other.db]", ..Plan::default() };
    site.add(&plan, Member::Replica(&url));
    site.nodes[1].start();
    let written = cookie(&site.ask(0, "POST", "/add/a", "")).unwrap();
    assert_eq!(site.ask(1, "GET", "/echo", &written).status(), 200);
    assert_eq!((site.apps[0].requests(), site.apps[1].requests()), (1, 1));
}

/// LiteFS: TestProxyServer.
#[test]
fn the_cookie_is_that_of_litefs() {
    let site = Site::of(1);
    let answer = site.ask(0, "POST", "/add/a", "");
    let cookies = answer.all("set-cookie");
    let [cookie] = cookies[..] else { panic!("{cookies:?}") };
    let txid = site.nodes[0].pos("app.db").txid;
    let (begin, end) = (format!("__txid={txid}; Path=/; Expires="), " GMT; HttpOnly");
    assert!(cookie.starts_with(&begin) && cookie.ends_with(end), "{cookie}");
    // Not for reads, and before the application's own.
    assert_eq!(site.ask(0, "GET", "/get/a", "").all("set-cookie"), [""; 0]);
    let answer = site.ask(0, "POST", "/cookies", "");
    let cookies = answer.all("set-cookie");
    assert!(cookies[0].starts_with("__txid="), "{cookies:?}");
    assert_eq!(cookies[1..], ["a=1", "b=2"]);
}

#[test]
fn headers_for_one_connection_stay_there() {
    let site = Site::of(2);
    let head = "Connection: keep-alive, X-Mine\r\nX-Mine: 1\r\nX-Other: 2\r\nKeep-Alive: 9\r\n\
                TE: trailers, gzip\r\nProxy-Authorization: x\r\nUpgrade: h2c\r\n";
    for (node, method) in [(0, "GET"), (1, "POST")] {
        let echo = site.ask(node, method, "/echo", head).text();
        let names: Vec<_> = lines(&echo).into_iter().filter_map(|l| l.split_once(": ")).collect();
        let value = |name: &str| {
            names.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| *value)
        };
        assert_eq!(value("host"), Some("app.test"));
        assert_eq!(value("x-other"), Some("2"));
        assert_eq!(value("te"), Some("trailers"));
        for gone in [
            "x-mine",
            "keep-alive",
            "proxy-authorization",
            "upgrade",
            "litefs-forwarded-by",
            "litefs-cluster-id",
        ] {
            assert_eq!(value(gone), None, "{gone}:\n{echo}");
        }
        // The same wherever the client connects.
        assert_eq!(value("x-forwarded-for"), Some("127.0.0.1"));
        assert_eq!(value("x-forwarded-host"), Some("app.test"));
        assert_eq!(value("x-forwarded-proto"), Some("http"));
        let forwarded = "for=127.0.0.1;host=\"app.test\";proto=http";
        assert_eq!(value("forwarded"), Some(forwarded));
        // Spelled as they came.
        assert!(echo.contains("\nX-Other: 2\n"), "{echo}");
        let answer = site.ask(node, method, "/hop", "");
        assert_eq!(answer.first, "HTTP/1.1 200 Fine");
        assert_eq!((answer.header("x-mine"), answer.header("x-other")), (None, Some("2")));
        assert_eq!((answer.header("keep-alive"), answer.header("connection")), (None, None));
    }
}

#[test]
fn a_target_in_any_form_reaches_the_application() {
    let site = Site::of(1);
    let mut connection = Connection::open(&site.proxies[0]);
    let mut first = |request: &str| {
        connection.write(request);
        let echo = connection.answer("GET").text();
        let host = echo.lines().find(|line| line.to_lowercase().starts_with("host: "));
        (lines(&echo)[0].to_owned(), host.unwrap_or_default()["host: ".len()..].to_owned())
    };
    let check = |seen: (String, String), line: &str, host: &str| {
        assert_eq!((seen.0.as_str(), seen.1.as_str()), (line, host));
    };
    let seen = first("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n");
    check(seen, "OPTIONS * HTTP/1.1", "a");
    let seen = first("GET http://b:1/x?y HTTP/1.1\r\nHost: a\r\n\r\n");
    check(seen, "GET /x?y HTTP/1.1", "b:1");
    let seen = first("GET //a/../b;c?%zz HTTP/1.1\r\nHost: a\r\n\r\n");
    check(seen, "GET //a/../b;c?%zz HTTP/1.1", "a");
    let seen = first("GET /old HTTP/1.0\r\n\r\n");
    check(seen, "GET /old HTTP/1.1", &site.apps[0].address);
    let refused = site.ask(0, "CONNECT", "a:1", "");
    assert_eq!(refused.status(), 405);
}

#[test]
fn head_is_answered_as_get_without_the_body() {
    let site = Site::of(2);
    for node in 0..2 {
        let head = site.ask(node, "HEAD", "/missing", "");
        assert_eq!((head.status(), head.header("content-length")), (404, Some("7")));
        let health = site.ask(node, "HEAD", "/litefs/health", "");
        assert_eq!((health.status(), health.header("content-length")), (200, Some("3")));
        assert_eq!(site.ask(node, "GET", "/litefs/health", "").seen(), (200, "OK\n".to_owned()));
    }
    // Anything else there is the application's.
    assert_eq!(site.apps[1].requests(), 1);
    site.ask(0, "POST", "/litefs/health", "");
    assert_eq!(site.apps[0].requests(), 2);
}

#[test]
fn on_fly_io_the_request_is_played_again() {
    let site = Site::with(2, &Plan { environment: &[("FLY_APP_NAME", "app")], ..Plan::default() });
    let answer = site.ask(1, "POST", "/add/a", "");
    assert_eq!(answer.seen(), (200, String::new()));
    assert_eq!(answer.header("fly-replay"), Some("instance=primary"));
    let answer = site.ask(0, "POST", "/add/a", "");
    assert_eq!((answer.seen(), answer.header("fly-replay")), ((200, "1".to_owned()), None));
    assert_eq!(site.ask(1, "GET", "/echo", "").status(), 200);
    assert_eq!((site.apps[0].requests(), site.apps[1].requests()), (1, 1));
    let replayed = "litefs_proxy_request_count{kind=\"write\",outcome=\"replayed\"}";
    assert_eq!(site.metric(1, replayed), 1.0);
}

#[test]
fn a_request_that_comes_back_is_refused() {
    let site = Site::of(2);
    let (id, cluster) = (site.node_id(1), site.status(1, "clusterId"));
    let head = format!("Litefs-Forwarded-By: {id}\r\nLitefs-Cluster-Id: {cluster}\r\n");
    let answer = site.ask(1, "POST", "/add/a", &head);
    assert_eq!(answer.seen(), (508, "Proxy error: the request has been here before\n".to_owned()));
    // Anybody else's word counts for nothing.
    let head = format!("Litefs-Forwarded-By: {id}\r\nLitefs-Cluster-Id: LFSC0000000000000000\r\n");
    assert_eq!(site.ask(1, "POST", "/add/a", &head).status(), 200);
}

/// A request that the application closes a used connection for, and how often it has read it. A
/// connection is kept only a moment after its answer, and until then another one is opened.
fn broken(site: &Site, connection: &mut Connection, method: &str) -> (Message, usize) {
    wait::until("a kept connection that breaks", || {
        let before = site.apps[0].requests();
        let answer = connection.ask(method, "/close", "", b"");
        let read = site.apps[0].requests() - before;
        (answer.status() == 502).then_some((answer, read))
    })
}

#[test]
fn a_failing_application_is_said_to_fail() {
    let site = Site::of(2);
    // It reads the head, and closes.
    for node in 0..2 {
        let mut connection = Connection::open(&site.proxies[node]);
        let (failed, read) = broken(&site, &mut connection, "POST");
        assert_eq!(read, 1);
        assert!(failed.text().starts_with("Proxy error: no answer from 127.0.0.1:"));
        // A request that changes nothing is sent again when a used connection breaks.
        let mut connection = Connection::open(&site.proxies[node]);
        assert_eq!(connection.ask("GET", "/echo", "", b"").status(), 200);
        assert_eq!(connection.ask("GET", "/close", "", b"").status(), 200);
    }
}

#[test]
fn a_write_by_its_path_is_sent_once_whatever_its_method() {
    let site = Site::with(2, &Plan { proxy: ", always-forward: ['/close']", ..Plan::default() });
    for node in 0..2 {
        let mut connection = Connection::open(&site.proxies[node]);
        let (failed, read) = broken(&site, &mut connection, "GET");
        assert!(failed.text().starts_with("Proxy error: no answer from 127.0.0.1:"));
        assert_eq!(read, 1);
    }
}

#[test]
fn what_is_no_request_is_refused() {
    let site = Site::of(1);
    let long = format!("GET / HTTP/1.1\r\nHost: a\r\nx: {}\r\n\r\n", "x".repeat(300_000));
    let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "x: y\r\n".repeat(300));
    for (request, status) in [("nonsense\r\n\r\n", 400), (&long, 431), (&many, 431)] {
        let mut connection = Connection::open(&site.proxies[0]);
        // It may be refused before all of it is sent.
        let _ = connection.try_write(request.as_bytes());
        assert_eq!(connection.answer("GET").status(), status);
    }
    assert_eq!(site.apps[0].requests(), 0);
    assert_eq!(wire::ask(&site.proxies[0], "GET", "/echo", "", b"").status(), 200);
}

#[test]
fn a_write_is_encrypted_on_its_way_to_the_primary() {
    let certificates = Certificates::new();
    let plan = Plan { http: certificates.http(""), ..Plan::default() };
    let site = Site::with(2, &plan);
    let written = site.ask(1, "POST", "/add/a", "");
    assert_eq!(written.seen(), (200, "1".to_owned()));
    assert_eq!((site.apps[0].requests(), site.apps[1].requests()), (1, 0));
    // Who calls the primary's proxy with TLS is another node; applications' clients do not.
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--max-time", "20", "--cacert"]).arg(certificates.file("ca"));
    let url = format!("https://{}/echo", site.proxies[0]);
    let stranger = program::output(curl.arg(url)).unwrap();
    assert!(!stranger.status.success(), "a stranger got in");
}
