//! Replicas that are LiteFS, played by hand: they say nothing of themselves, take only files that start right
//! behind their position, and a lease with whatever session they were told.

use std::io::Read as _;
use std::net::TcpStream;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use litefs::http::frame::{Decoder, Event, Frame, encode_positions};
use ltx::{Header, NodeId, Pos, Txid};
use test_case::test_case;
use tokio::runtime::Runtime;
use tokio::time::timeout;

use super::forward::{LITEFS, call};
use super::halt;
use super::lease::{DB, TTL, ask_hand_off, create, insert, is_primary, node, primary_of, rows};
use super::lent::litefs_transaction;
use crate::support::consul::Consul;
use crate::support::node::Node;
use crate::support::wait;

/// What a LiteFS node writes to the lease's key.
const VALUE: &str = r#"{"hostname":"litefs","advertise-url":"http://127.0.0.1:1"}"#;
const KEY: &str = "test/lease";

/// The stream to such a replica.
struct Stream {
    runtime: Runtime,
    body: Incoming,
    decoder: Decoder,
    _sender: SendRequest<Full<Bytes>>,
}

impl Stream {
    /// Opens the stream of the replica `id` that stands there.
    fn open(node: &Node, id: NodeId, positions: &[(&str, Pos)]) -> Stream {
        let runtime = Runtime::new().unwrap();
        let positions = encode_positions(positions.iter().copied());
        let request = Request::post(format!("{}/stream", node.url()))
            .header("litefs-id", id.to_string())
            .body(Full::new(positions))
            .unwrap();
        let opened = async {
            let socket = tokio::net::TcpStream::connect(node.address()).await.unwrap();
            let shaken = http2::handshake(TokioExecutor::new(), TokioIo::new(socket)).await;
            let (mut sender, connection) = shaken.unwrap();
            tokio::spawn(connection);
            let response = sender.send_request(request).await.unwrap();
            assert_eq!(response.status(), 200);
            (response.into_body(), sender)
        };
        let (body, sender) = runtime.block_on(opened);
        Stream { runtime, body, decoder: Decoder::new(), _sender: sender }
    }

    /// What comes next.
    fn next(&mut self) -> Event {
        let Stream { runtime, body, decoder, .. } = self;
        loop {
            if let Some(event) = decoder.next().unwrap() {
                return event;
            }
            let frame = runtime.block_on(async { timeout(wait::DEADLINE, body.frame()).await });
            let frame = frame.expect("something comes in time").expect("the stream goes on");
            decoder.push(frame.unwrap().into_data().unwrap());
        }
    }

    /// The header of the first file that it needs, if it needs any.
    fn first_file(&mut self) -> Option<Header> {
        let mut bytes = Vec::new();
        loop {
            match self.next() {
                Event::LtxData(data) => bytes.extend_from_slice(&data),
                Event::LtxEnd => return Some(ltx::verify(&bytes[..]).unwrap().0),
                Event::Frame(Frame::Ready) => return None,
                Event::Frame(_) => {}
            }
        }
    }

    /// The session of the lease that it is offered.
    fn lease(&mut self) -> String {
        loop {
            if let Event::Frame(Frame::Handoff { lease_id }) = self.next() {
                return lease_id;
            }
        }
    }

    /// Everything up to where it has all that the primary had.
    fn until_ready(&mut self) {
        while !matches!(self.next(), Event::Frame(Frame::Ready)) {}
    }
}

/// A node that leads, and has one row.
fn primary(consul: &Consul) -> Node {
    let mut node = node(&consul.url(), "ours", true, TTL);
    node.start();
    create(&node, "wal");
    insert(&node, 1);
    node
}

/// Has the lease offered to a LiteFS replica: the session that it is told, and where the answer comes.
fn offer(node: &Node) -> (String, TcpStream) {
    let mut stream = Stream::open(node, LITEFS, &[]);
    stream.until_ready();
    let asked = ask_hand_off(node, &LITEFS.to_string());
    (stream.lease(), asked)
}

fn answer(mut asked: TcpStream) -> String {
    let mut answer = String::new();
    asked.read_to_string(&mut answer).unwrap();
    answer
}

/// SEMANTICS P15. It may have to wait for its readers before it gets to it, for as long as they like.
#[test]
fn a_lease_that_litefs_does_not_take_in_time_is_not_there_for_it_later() {
    let consul = Consul::start();
    let node = primary(&consul);
    let (session, asked) = offer(&node);
    let refused = answer(asked);
    assert!(refused.starts_with("HTTP/1.0 500"), "{refused}");
    assert!(is_primary(&node));
    insert(&node, 2);
    consul.renew(&session);
    assert!(!consul.take(KEY, VALUE, &session), "two nodes have the lease");
    insert(&node, 3);

    // The next offer is another one, and stands.
    let (session, asked) = offer(&node);
    assert!(consul.renew(&session) && consul.take(KEY, VALUE, &session));
    let done = answer(asked);
    assert!(done.starts_with("HTTP/1.0 200"), "{done}");
    assert_eq!((primary_of(&node).as_str(), rows(&node).as_str()), ("litefs", "1,2,3"));
}

/// SEMANTICS P15, where its primary dies in between and comes back.
#[test]
fn a_restarted_primary_leaves_nothing_of_the_lease_that_it_had_offered_to_litefs() {
    let consul = Consul::start();
    let mut node = primary(&consul);
    let (session, _asked) = offer(&node);
    node.kill();
    node.start();
    node.wait_for_log("took up the lease of before");
    consul.renew(&session);
    assert!(!consul.take(KEY, VALUE, &session), "two nodes have the lease");
    insert(&node, 2);
    node.kill();
    node.start();
    node.wait_for_log("took up the lease of before");
    insert(&node, 3);
    assert_eq!(rows(&node), "1,2,3");
}

/// `docs/differences.md`, cluster 2: LiteFS rolls a commit back whose answer is lost, and leaves out what comes with its
/// own id.
#[test_case("delete")]
#[test_case("wal")]
fn litefs_gets_what_it_has_rolled_back_as_a_snapshot(mode: &str) {
    let mut cluster = halt::cluster(mode, "auto");
    let primary = cluster.primary();
    let before = primary.pos(DB);
    let lock = "/halt?name=app.db&id=77";
    assert_eq!(call(primary, "POST", lock, b"").0, 200);
    let ltx = litefs_transaction(primary, "insert into t values (5, 'of litefs')");
    assert_eq!(call(primary, "POST", "/tx?name=app.db&lockID=77", &ltx).0, 200);
    // A snapshot would have it wait for its own lock for good.
    let file = Stream::open(primary, LITEFS, &[(DB, before)]).first_file().unwrap();
    assert_eq!((file.min_txid, file.node_id), (primary.pos(DB).txid, LITEFS));
    assert_eq!(call(primary, "DELETE", lock, b"").0, 200);
    let after = primary.pos(DB);
    assert_eq!(after.txid, before.txid.next());
    let first_of = |primary: &Node, id, pos| {
        let file = Stream::open(primary, id, &[(DB, pos)]).first_file();
        file.map(|header| (header.min_txid, header.max_txid))
    };
    let check = |primary: &Node| {
        assert_eq!(first_of(primary, LITEFS, before), Some((Txid(1), after.txid)));
        assert_eq!(first_of(primary, NodeId(0xcd), before), Some((after.txid, after.txid)));
        assert_eq!(first_of(primary, LITEFS, after), None);
    };
    check(primary);
    // Then the transaction is in a file.
    cluster.nodes[0].stop();
    cluster.nodes[0].start();
    check(cluster.primary());
    cluster.check();
}

/// What LiteFS commits while it follows it has.
#[test]
fn litefs_gets_what_it_commits_itself_as_a_file() {
    let cluster = halt::cluster("wal", "auto");
    let primary = cluster.primary();
    let mut stream = Stream::open(primary, LITEFS, &[(DB, primary.pos(DB))]);
    stream.until_ready();
    let lock = "/halt?name=app.db&id=77";
    assert_eq!(call(primary, "POST", lock, b"").0, 200);
    let ltx = litefs_transaction(primary, "insert into t values (5, 'of litefs')");
    assert_eq!(call(primary, "POST", "/tx?name=app.db&lockID=77", &ltx).0, 200);
    let file = stream.first_file().unwrap();
    assert_eq!((file.min_txid, file.node_id), (primary.pos(DB).txid, LITEFS));
    assert_eq!(call(primary, "DELETE", lock, b"").0, 200);
    cluster.check();
}
