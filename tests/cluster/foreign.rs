//! A HALT lock of a LiteFS primary: the exchange as its protocol says, behind a recorded stream.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use hyper::Request;
use litefs::http::frame::{Frame, encode_chunks, encode_chunks_end};
use ltx::{Decoder, Pos};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::spawn_blocking;

use super::halt::Halt;
use super::lease::{self, is_primary, primary_of};
use crate::http::peers::{Answer, Then, live, peer, script};
use crate::support::consul::{Consul, Link};
use crate::support::node::{Lease, Member, Node, Settings};
use crate::support::{sqlite, wait};

/// Everything that the recorded primary had.
const STREAM: &[u8] = include_bytes!("../fixtures/stream/lz4-from-zero.response");
const CLUSTER: &str = "LFSC0123456789ABCDEF";
const ID: &str = "D7448C36B5A5EB27";

/// What a LiteFS primary has heard, and where it sends its stream.
#[derive(Default)]
struct Heard {
    /// Method, path with query, and the id of who asks.
    calls: Vec<[String; 3]>,
    /// The LTX files that were sent to it.
    files: Vec<Bytes>,
    streams: Vec<UnboundedSender<Bytes>>,
}

fn with_ids(mut answer: Answer) -> Answer {
    answer.headers_mut().insert("litefs-id", ID.parse().unwrap());
    answer.headers_mut().insert("litefs-cluster-id", CLUSTER.parse().unwrap());
    answer
}

fn encoded(frame: &Frame) -> BytesMut {
    let mut bytes = BytesMut::new();
    frame.encode(&mut bytes);
    bytes
}

/// Answers as LiteFS does: a lock for 30 s, a file that is applied and sent to all, its author included.
fn answer(heard: &Mutex<Heard>, pos: Pos, request: &Request<Bytes>) -> Answer {
    let mut heard = heard.lock().unwrap();
    let path = request.uri().path_and_query().unwrap().to_string();
    if path.starts_with("/stream") {
        let (sender, receiver) = unbounded_channel();
        sender.send(Bytes::from_static(STREAM)).unwrap();
        heard.streams.push(sender);
        return with_ids(live(receiver));
    }
    let id = request.headers().get("litefs-id").map(|id| id.to_str().unwrap().to_owned());
    heard.calls.push([request.method().to_string(), path.clone(), id.unwrap_or_default()]);
    match (request.method().as_str(), path.split('?').next().unwrap()) {
        ("POST", "/halt") => {
            let id = path.rsplit_once("id=").unwrap().1;
            let (txid, sum) = (pos.txid, pos.checksum);
            let expires = "2026-11-23T06:41:28.552771732Z";
            let text = format!(
                "{{\"id\":{id},\"pos\":{{\"TXID\":\"{txid}\",\"PostApplyChecksum\":\"{sum}\"}},\
                 \"expires\":\"{expires}\"}}\n"
            );
            with_ids(script(text, Then::End))
        }
        ("POST", "/tx") => {
            let mut frame = encoded(&Frame::Ltx { name: "wal.db".to_owned() });
            encode_chunks(request.body(), &mut frame);
            encode_chunks_end(&mut frame);
            heard.streams.retain(|stream| stream.send(frame.clone().freeze()).is_ok());
            heard.files.push(request.body().clone());
            with_ids(script("", Then::End))
        }
        ("DELETE", "/halt") => with_ids(script("", Then::End)),
        _ => panic!("{path}"),
    }
}

/// A LiteFS primary that grants its locks at `pos`: where it answers, and what it has heard.
async fn litefs(pos: Pos) -> (String, Arc<Mutex<Heard>>) {
    let heard: Arc<Mutex<Heard>> = Arc::default();
    let of_peer = heard.clone();
    let primary = peer(move |request| answer(&of_peer, pos, &request)).await;
    let of_beats = heard.clone();
    tokio::spawn(async move {
        let mut beats = tokio::time::interval(Duration::from_millis(500));
        loop {
            beats.tick().await;
            let beat = encoded(&Frame::Heartbeat { timestamp_ms: 1_795_000_000_000 }).freeze();
            of_beats.lock().unwrap().streams.retain(|stream| stream.send(beat.clone()).is_ok());
        }
    });
    (primary.address().to_string(), heard)
}

/// A replica of such a primary, and what the primary has heard.
async fn follow(pos: Pos) -> (Node, Arc<Mutex<Heard>>) {
    let (address, heard) = litefs(pos).await;
    let url = format!("http://{address}");
    let node = spawn_blocking(move || {
        let mut node = Node::new(&Settings::default(), Member::Replica(&url));
        node.start();
        node
    });
    (node.await.unwrap(), heard)
}

/// Decision 0012: a LiteFS primary does not say how long it may still commit, so although its port is closed
/// its session is left to Consul, which ends it after its TTL.
#[tokio::test(flavor = "multi_thread")]
async fn the_lease_of_a_litefs_primary_is_left_to_its_ttl() {
    let (address, _heard) =
        litefs(Pos { txid: ltx::Txid(10), checksum: recorded_checksum() }).await;
    spawn_blocking(move || {
        const TTL: Duration = Duration::from_secs(6);
        let consul = Consul::start();
        let link = Link::to(&address);
        consul.put("test/lease/clusterid", CLUSTER);
        let url = format!("http://{}", link.address());
        let value = format!(r#"{{"hostname":"litefs","advertise-url":"{url}"}}"#);
        let session = consul.acquire("test/lease", &value, "6s");
        let lease = Lease {
            url: &consul.url(),
            hostname: "ours",
            advertise: "",
            candidate: true,
            ttl: "4s",
        };
        let mut node = Node::new(&Settings::default(), Member::Consul(lease));
        node.spawn();
        wait::until_true("our node to follow", || {
            assert!(consul.renew(&session), "the session of the primary is gone");
            node.log().contains("connected to cluster, ready")
        });
        assert_eq!(primary_of(&node), "litefs");
        assert!(consul.renew(&session));
        let renewed = Instant::now();
        drop(link);
        wait::until_true("our node to lead", || is_primary(&node));
        assert!(renewed.elapsed() >= TTL, "its lease was ended after {:?}", renewed.elapsed());
        assert!(!consul.renew(&session));
        sqlite::run(&node.file("wal.db"), "create table of_ours(x)");
        assert_eq!(node.pos("wal.db").txid.0, 11);
    })
    .await
    .unwrap();
}

/// A LiteFS primary that has offered its lease keeps the session and does nothing more with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_lease_of_litefs_that_is_not_taken_is_given_back() {
    let (address, heard) = litefs(Pos { txid: ltx::Txid(10), checksum: recorded_checksum() }).await;
    let check = move || {
        let consul = Consul::start();
        consul.put("test/lease/clusterid", CLUSTER);
        let value = format!(r#"{{"hostname":"litefs","advertise-url":"http://{address}"}}"#);
        let session = consul.acquire("test/lease", &value, "60s");
        let mut replica = lease::node(&consul.url(), "replica", false, lease::TTL);
        replica.start();
        let handoff = encoded(&Frame::Handoff { lease_id: session.clone() }).freeze();
        heard
            .lock()
            .unwrap()
            .streams
            .iter()
            .for_each(|stream| stream.send(handoff.clone()).unwrap());
        replica.wait_for_log("this node does not take it: it is no candidate");
        wait::until_true("the lease to be free", || {
            consul.value("test/lease").as_deref() == Some("")
        });
        wait::until_true("its session to end", || !consul.renew(&session));
    };
    spawn_blocking(check).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_writes_under_a_halt_lock_of_litefs() {
    let pos = Pos { txid: ltx::Txid(10), checksum: recorded_checksum() };
    let (node, heard) = follow(pos).await;
    spawn_blocking(move || check(&node, &heard, pos)).await.unwrap();
}

/// `docs/differences.md`, cluster 11.
#[tokio::test(flavor = "multi_thread")]
async fn a_granted_lock_that_is_of_no_use_is_given_back() {
    let pos = Pos { txid: ltx::Txid(9), checksum: recorded_checksum() };
    let (node, heard) = follow(pos).await;
    let check = move || {
        assert!(Halt::of(&node.file("wal.db-lock")).is_err(), "the primary is elsewhere");
        wait::until_true("the lock to be given back", || {
            heard.lock().unwrap().calls.last().is_some_and(|[method, ..]| method == "DELETE")
        });
        sqlite::refused(&node.file("wal.db"), ".timeout 0\ncreate table not_here(x)");
        assert_eq!(node.pos("wal.db").txid.0, 10);
        assert!(heard.lock().unwrap().files.is_empty());
    };
    spawn_blocking(check).await.unwrap();
}

/// The checksum of the last file of wal.db in the recording.
fn recorded_checksum() -> ltx::Checksum {
    let file = include_bytes!(
        "../fixtures/data-dir/lz4/dbs/wal.db/ltx/000000000000000a-000000000000000a.ltx"
    );
    let mut decoder = Decoder::new(&file[..]).unwrap();
    let mut page = vec![0; decoder.header().page_size.bytes()];
    while decoder.next_page(&mut page).unwrap().is_some() {}
    decoder.finish().unwrap().post_apply
}

fn check(node: &Node, heard: &Mutex<Heard>, pos: Pos) {
    let file = node.file("wal.db");
    assert_eq!(node.pos("wal.db"), pos);
    let halt = Halt::of(&node.file("wal.db-lock")).unwrap();
    sqlite::run(&file, "create table of_a_replica(x); insert into of_a_replica values (7)");
    let after = node.pos("wal.db");
    assert_eq!(after.txid.0, pos.txid.0 + 2);
    halt.release();
    wait::until_true("the lock to be given back", || {
        heard.lock().unwrap().calls.iter().any(|[method, ..]| method == "DELETE")
    });
    // What came back on the stream was left out: it is here.
    node.wait_for_pos("wal.db", after);
    assert_eq!(sqlite::run(&file, "select x from of_a_replica; pragma integrity_check"), "7\nok");
    sqlite::refused(&file, ".timeout 0\ninsert into of_a_replica values (8)");

    let heard = heard.lock().unwrap();
    assert_eq!(heard.streams.len(), 1, "it had to connect again");
    let calls: Vec<_> =
        heard.calls.iter().map(|[method, path, _]| (method.as_str(), path.as_str())).collect();
    let id = calls[0].1.strip_prefix("/halt?name=wal.db&id=").unwrap();
    assert!(id.parse::<i64>().unwrap() > 0, "{id}");
    let halt = format!("/halt?name=wal.db&id={id}");
    let tx = format!("/tx?name=wal.db&lockID={id}");
    assert_eq!(calls[0], ("POST", halt.as_str()));
    let sent: Vec<_> = calls.iter().filter(|(_, path)| path.starts_with("/tx")).collect();
    assert_eq!(sent.len(), 2);
    assert!(
        sent.iter().all(|(method, path)| *method == "POST" && path.starts_with(&tx)),
        "{sent:?}"
    );
    assert_eq!(calls.last().unwrap(), &("DELETE", halt.as_str()));
    let nodes: Vec<_> = heard.calls.iter().map(|[.., id]| id.as_str()).collect();
    assert!(nodes.iter().all(|id| id.len() == 16 && *id == nodes[0]), "{nodes:?}");
    // Each file is whole, follows on the one before, and says who made it.
    let mut pos = pos;
    for file in &heard.files {
        let mut decoder = Decoder::new(&file[..]).unwrap();
        let header = *decoder.header();
        assert_eq!(header.pre_pos(), pos);
        assert_eq!(header.min_txid, header.max_txid);
        assert_eq!(format!("{}", header.node_id), nodes[0]);
        let mut page = vec![0; header.page_size.bytes()];
        while decoder.next_page(&mut page).unwrap().is_some() {}
        pos = Pos { txid: header.max_txid, checksum: decoder.finish().unwrap().post_apply };
    }
    assert_eq!(pos, after);
}
