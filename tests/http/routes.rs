//! Each route: what it answers, and what it refuses.

use std::io::Write as _;

use litefs::http::client::{Client, Error};
use litefs::http::report::{Info, InfoPrimary, StatusRole};
use ltx::Pos;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::node::{Node, make_database, wait_until};

/// Status line, headers and body of one HTTP/1.1 request.
async fn ask(node: &Node, request: &str) -> (String, String, String) {
    let mut socket = TcpStream::connect(node.client.address()).await.unwrap();
    let request = format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let (status, headers) = head.split_once("\r\n").unwrap();
    (status.to_owned(), headers.to_lowercase(), body.to_owned())
}

#[track_caller]
fn has_line(headers: &str, line: &str) {
    assert!(headers.lines().any(|found| found == line), "{line} is missing in:\n{headers}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_request_is_said_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::primary(dir.path(), 0xab).await;
    let check = async |request: &str, status: &str, text: &str| {
        let (found, headers, body) = ask(&node, request).await;
        assert_eq!(found, format!("HTTP/1.1 {status}"), "{request}");
        has_line(&headers, "content-type: text/plain; charset=utf-8");
        has_line(&headers, "x-content-type-options: nosniff");
        has_line(&headers, "litefs-id: 00000000000000ab");
        let id = node.engine.cluster_id().unwrap().to_string().to_lowercase();
        has_line(&headers, &format!("litefs-cluster-id: {id}"));
        if !request.starts_with("HEAD") {
            assert_eq!(body, format!("{text}\n"), "{request}");
        }
    };
    check("GET /nowhere?name=x", "404 Not Found", "404 page not found").await;
    check("GET /debug/pprof/", "404 Not Found", "404 page not found").await;
    check("POST /info", "405 Method Not Allowed", "method not allowed").await;
    check("HEAD /info", "405 Method Not Allowed", "").await;
    check("GET /stream", "405 Method Not Allowed", "method not allowed").await;
    check("DELETE /export?name=x", "405 Method Not Allowed", "method not allowed").await;
    check("POST /stream", "426 Upgrade Required", "Upgrade to HTTP/2 required").await;
    check("GET /export", "400 Bad Request", "name required").await;
    check("GET /export?name=", "400 Bad Request", "name required").await;
    check("GET /export?name=x", "404 Not Found", "database not found").await;
    check("GET /export?name=..%2Fclusterid", "404 Not Found", "database not found").await;
    check("POST /import", "400 Bad Request", "name required").await;
    let escape = "invalid database name \"../x\"";
    check("POST /import?name=../x", "400 Bad Request", escape).await;
    let empty = "read database header: database header too short";
    check("POST /import?name=x", "400 Bad Request", empty).await;
    assert!(node.engine.databases().is_empty(), "nothing of it made a database");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_without_end_is_not_collected() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::primary(dir.path(), 0xab).await;
    let long = format!("GET /info HTTP/1.1\r\nHost: a\r\nx: {}\r\n\r\n", "x".repeat(1 << 20));
    let many = format!("GET /info HTTP/1.1\r\nHost: a\r\n{}\r\n", "x: y\r\n".repeat(1000));
    for request in [long, many] {
        let mut socket = TcpStream::connect(node.client.address()).await.unwrap();
        // It may be refused before all of it is sent.
        let _ = socket.write_all(request.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer).await;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431 "), "{answer}");
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn info_says_who_the_node_is() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::primary(dir.path(), 1).await;
    let (status, headers, body) = ask(&node, "GET /info").await;
    assert_eq!(status, "HTTP/1.1 200 OK");
    has_line(&headers, "content-type: text/plain; charset=utf-8");
    assert!(body.starts_with("{\n  \"clusterID\": \"LFSC") && body.ends_with("}\n"), "{body}");
    let expected = Info {
        cluster_id: node.engine.cluster_id().map(|id| id.to_string()),
        is_primary: true,
        candidate: true,
        path: dir.path().display().to_string(),
        primary: InfoPrimary { hostname: "primary-host".to_owned() },
    };
    assert_eq!(node.client.info().await.unwrap(), expected);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn status_lists_the_databases() {
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(&dir.path().join("a"), 1).await;
    let pos = primary.import("a.db", "CREATE TABLE t (x)").await;
    let mut replica = Node::replica(&dir.path().join("b"), 2, &primary.url).await;
    replica.wait_ready().await;
    for node in [&primary, &replica] {
        let status = node.client.status().await.unwrap();
        assert_eq!(status.databases.len(), 1);
        let db = &status.databases[0];
        assert_eq!((db.name.as_str(), db.position.as_str()), ("a.db", pos.to_string().as_str()));
        assert_eq!((db.mode.as_str(), db.page_size, db.page_count), ("wal", 4096, 2));
        assert_eq!((&db.failure, db.lost_found), (&None, 0));
    }
    let (one, other) =
        (primary.client.status().await.unwrap(), replica.client.status().await.unwrap());
    assert_eq!((one.role, other.role), (StatusRole::Primary, StatusRole::Replica));
    assert_eq!(one.node_id, "0000000000000001");
    assert_eq!((one.primary, one.lag_ms), (None, None));
    assert_eq!(other.primary.unwrap().advertise_url, primary.url);
    replica.stop().await;
    primary.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_tell_what_the_engine_counts() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::primary(dir.path(), 1).await;
    node.import("a.db", "CREATE TABLE t (x)").await;
    for _ in 0..2 {
        let (_, headers, body) = ask(&node, "GET /metrics").await;
        has_line(&headers, "content-type: text/plain; version=0.0.4; charset=utf-8");
        assert!(!headers.contains("litefs-id"), "{headers}");
        for line in ["litefs_db_count 1", "litefs_is_primary 1", "litefs_db_txid{db=\"a.db\"} 1"] {
            assert!(body.lines().any(|found| found == line), "{line} is missing in:\n{body}");
        }
    }
    node.stop().await;
}

/// Imports the file at `path` and returns what is wrong with it.
async fn import(client: &Client, path: &std::path::Path) -> Result<(), Error> {
    let file = tokio::fs::File::open(path).await.unwrap();
    let len = file.metadata().await.unwrap().len();
    client.import("a.db", file, Some(len)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_goes_in_and_comes_out() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::primary(&dir.path().join("data"), 1).await;
    let path = dir.path().join("made.db");
    let rows = "CREATE TABLE t (x);
        WITH RECURSIVE n (v) AS (SELECT 1 UNION ALL SELECT v + 1 FROM n WHERE v < 100000)
        INSERT INTO t SELECT printf('row %d of many', v) FROM n;";
    make_database(&path, rows);
    import(&node.client, &path).await.unwrap();
    assert_eq!(node.pos("a.db").txid.0, 1);
    let mut exported = tempfile::NamedTempFile::new().unwrap();
    let len = node.client.export("a.db", exported.as_file_mut()).await.unwrap();
    assert_eq!(len, std::fs::metadata(&path).unwrap().len());
    exported.flush().unwrap();
    let connection = rusqlite::Connection::open(exported.path()).unwrap();
    let count: i64 = connection.query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap();
    assert_eq!(count, 100_000);
    let error = node.client.export("b.db", &mut std::io::sink()).await.unwrap_err();
    assert!(matches!(error, Error::DatabaseNotFound));
    let spool = std::fs::read_dir(dir.path().join("data/spool")).unwrap();
    assert_eq!(spool.count(), 0, "nothing is left behind");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_upload_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::primary(&dir.path().join("data"), 1).await;
    let pos = node.import("a.db", "CREATE TABLE t (x)").await;
    let path = dir.path().join("made.db");
    make_database(&path, "CREATE TABLE t (x); INSERT INTO t VALUES (1); CREATE TABLE u (x);");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[4096..8192].fill(0xff);
    let mut damaged = tempfile::NamedTempFile::new().unwrap();
    damaged.write_all(&bytes).unwrap();
    let text = import(&node.client, damaged.path()).await.unwrap_err().to_string();
    assert!(text.starts_with("invalid response: code=400: database is damaged: "), "{text}");
    assert_eq!(node.pos("a.db"), pos);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_is_cut_off_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::primary(&dir.path().join("data"), 1).await;
    let mut socket = TcpStream::connect(node.client.address()).await.unwrap();
    let head = "POST /import?name=a.db HTTP/1.1\r\nHost: x\r\nContent-Length: 8192\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    socket.write_all(b"SQLite format 3\0").await.unwrap();
    socket.shutdown().await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert_eq!(node.pos("a.db"), Pos::ZERO);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_nothing_holds_no_lock() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::primary(dir.path(), 1).await;
    let large = "PRAGMA journal_mode = delete; CREATE TABLE t (x);
        INSERT INTO t VALUES (zeroblob(60000000));";
    node.import("a.db", large).await;
    let mut slow = TcpStream::connect(node.client.address()).await.unwrap();
    slow.write_all(b"GET /export?name=a.db HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    slow.readable().await.unwrap();
    // Waits for the disk to finish the export, and never for its reader.
    let pos = node.import("a.db", "CREATE TABLE t (x)").await;
    assert_eq!(pos.txid.0, 2);
    let mut line = [0; 15];
    slow.read_exact(&mut line).await.unwrap();
    assert_eq!(&line, b"HTTP/1.1 200 OK");
    node.stop().await;
}

/// What the node has sent on a connection, on which `sent` was sent, when it closes it; and after how
/// many seconds of a clock that jumps to whatever is waited for.
async fn until_closed(node: &Node, sent: &str) -> (String, u64) {
    let begin = Instant::now();
    let mut socket = TcpStream::connect(node.client.address()).await.unwrap();
    socket.write_all(sent.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A reset is an end too.
    let _ = socket.read_to_end(&mut answer).await;
    (String::from_utf8_lossy(&answer).into_owned(), begin.elapsed().as_secs())
}

/// Whether the kernel will ask, on the end of `socket` that the node has, for the host of this end.
fn is_kept_alive(socket: &TcpStream) -> bool {
    let hex = |address: std::net::SocketAddr| match address {
        std::net::SocketAddr::V4(v4) => {
            format!("{:08X}:{:04X}", u32::from_ne_bytes(v4.ip().octets()), v4.port())
        }
        std::net::SocketAddr::V6(v6) => panic!("{v6}"),
    };
    let ends =
        format!(": {} {} ", hex(socket.peer_addr().unwrap()), hex(socket.local_addr().unwrap()));
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let line = table.lines().find(|line| line.contains(&ends)).expect("the connection is open");
    // The timer that runs; 2 is that of TCP keep-alive (proc_net_tcp in the kernel's documentation).
    line.split_whitespace().nth(5).unwrap().starts_with("02:")
}

/// Who only listens to events is silent as long as nothing happens: no ping and no write would tell that it died.
#[tokio::test(flavor = "multi_thread")]
async fn a_listener_whose_host_vanished_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::primary(dir.path(), 1).await;
    let mut socket = TcpStream::connect(node.client.address()).await.unwrap();
    socket.write_all(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut line = [0; 15];
    socket.read_exact(&mut line).await.unwrap();
    assert_eq!(&line, b"HTTP/1.1 200 OK");
    wait_until(|| is_kept_alive(&socket), || "a keep-alive timer".to_owned()).await;
    node.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_asks_nothing_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::primary(dir.path(), 1).await;
    for sent in ["", "GET /in", "PRI * HTTP/2.0\r\n", "POST /import?name=x HTTP/1.1\r\nHost: x"] {
        let (answer, seconds) = until_closed(&node, sent).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408 "), "{answer}");
        assert!((29..=31).contains(&seconds), "{sent:?}: {seconds} s");
    }
    node.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_stands_still_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::primary(dir.path(), 1).await;
    let sent = "POST /import?name=x HTTP/1.1\r\nHost: x\r\nContent-Length: 8192\r\n\r\nSQLite";
    let (answer, seconds) = until_closed(&node, sent).await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(answer.ends_with("read upload: no data for too long\n"), "{answer}");
    assert!((299..=340).contains(&seconds), "{seconds} s");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_takes_no_import() {
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(&dir.path().join("a"), 1).await;
    let mut replica = Node::replica(&dir.path().join("b"), 2, &primary.url).await;
    replica.wait_ready().await;
    let path = dir.path().join("made.db");
    // More than any window, so that the answer comes before the end of the upload.
    make_database(&path, "CREATE TABLE t (x); INSERT INTO t VALUES (zeroblob(40000000));");
    let error = import(&replica.client, &path).await.unwrap_err();
    let text = error.to_string();
    let start =
        "invalid response: code=503: lease expired: this node is a replica, the primary is ";
    assert!(text.starts_with(start), "{text}");
    assert!(text.ends_with(&format!("({})", primary.url)), "{text}");
    replica.stop().await;
    primary.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_tell_commits_and_role_changes() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::primary(dir.path(), 1).await;
    let mut socket = TcpStream::connect(node.client.address()).await.unwrap();
    socket.write_all(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut lines = BufReader::new(socket).lines();
    let mut next = async || loop {
        let line = lines.next_line().await.unwrap().unwrap();
        if line.starts_with('{') {
            return line;
        }
    };
    assert_eq!(next().await, r#"{"type":"init","data":{"isPrimary":true}}"#);
    let pos = node.import("a.db", "CREATE TABLE t (x)").await;
    let line = next().await;
    let expected = format!(
        r#"{{"type":"tx","db":"a.db","data":{{"txID":"{}","postApplyChecksum":"{}","pageSize":4096,"commit":2,"timestamp":""#,
        pos.txid, pos.checksum
    );
    assert!(line.starts_with(&expected), "{line}");
    node.engine.set_role(litefs::engine::Role::Unknown);
    assert_eq!(next().await, r#"{"type":"primaryChange","data":{"isPrimary":false}}"#);
    node.stop().await;
}
