//! The replica against primaries that are recorded or broken.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use hyper::Request;
use litefs::engine::ClusterId;
use litefs::http::frame;
use ltx::Pos;

use super::node::{Node, open_engine, wait_until};
use super::peers::{Answer, Then, peer, script};

const RAW: &[u8] = include_bytes!("../fixtures/stream/raw-from-zero.response");
const LZ4: &[u8] = include_bytes!("../fixtures/stream/lz4-from-zero.response");
/// What the recorded primary exported.
const RAW_DELETE: &[u8] = include_bytes!("../fixtures/stream/raw-delete.export.db");
const RAW_WAL: &[u8] = include_bytes!("../fixtures/stream/raw-wal.export.db");
const LZ4_DELETE: &[u8] = include_bytes!("../fixtures/stream/lz4-delete.export.db");
const LZ4_WAL: &[u8] = include_bytes!("../fixtures/stream/lz4-wal.export.db");

const CLUSTER: &str = "LFSC0123456789ABCDEF";

/// `data` as the answer of a LiteFS primary.
fn answer(data: impl Into<Bytes>, then: Then) -> Answer {
    let mut answer = script(data, then);
    answer.headers_mut().insert("litefs-id", "D7448C36B5A5EB27".parse().unwrap());
    answer.headers_mut().insert("litefs-cluster-id", CLUSTER.parse().unwrap());
    answer
}

async fn check_recording(recording: &'static [u8], delete: &[u8], wal: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let primary = peer(move |_| answer(recording, Then::Silence)).await;
    let url = format!("http://{}", primary.address());
    let mut replica = Node::replica(dir.path(), 2, &url).await;
    replica.wait_ready().await;
    assert_eq!(replica.pos("delete.db").txid.0, 9);
    assert_eq!(replica.pos("wal.db").txid.0, 10);
    assert_eq!(replica.pos("gone.db").txid.0, 2, "a deleted database is one without pages");
    assert!(replica.export("delete.db").await == delete);
    assert!(replica.export("wal.db").await == wal);
    assert_eq!(replica.engine.cluster_id().unwrap().as_str(), CLUSTER);
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_primary_is_followed() {
    check_recording(RAW, RAW_DELETE, RAW_WAL).await;
    check_recording(LZ4, LZ4_DELETE, LZ4_WAL).await;
}

/// Where a database stood in a replica's request.
fn requested(request: &Request<Bytes>, name: &str) -> Option<Pos> {
    let positions = frame::decode_positions(request.body()).unwrap();
    positions.into_iter().find(|(found, _)| found == name).map(|(_, pos)| pos)
}

/// A primary whose first answer is `broken`; the replica must come back, having kept nothing of the
/// broken file, and be well after the second answer.
async fn check_recovery(broken: Vec<u8>, then: Then) {
    let dir = tempfile::tempdir().unwrap();
    let calls = Arc::new(AtomicUsize::new(0));
    let primary = {
        let (calls, broken) = (calls.clone(), Bytes::from(broken));
        peer(move |request: Request<Bytes>| {
            if calls.fetch_add(1, Ordering::SeqCst) == 0 {
                return answer(broken.clone(), then);
            }
            assert!(requested(&request, "delete.db").is_none_or(Pos::is_zero));
            answer(RAW, Then::Silence)
        })
        .await
    };
    let mut replica = Node::replica(dir.path(), 2, &format!("http://{}", primary.address())).await;
    replica.wait_ready().await;
    assert_eq!(calls.load(Ordering::SeqCst), 2);
    assert!(replica.export("delete.db").await == RAW_DELETE);
    assert!(replica.export("wal.db").await == RAW_WAL);
    replica.stop().await;
}

/// Somewhere in the first file of the recording, which is of delete.db.
const INSIDE_FIRST_FILE: usize = 5000;

#[tokio::test(flavor = "multi_thread")]
async fn a_file_with_a_flipped_bit_is_asked_for_again() {
    let mut flipped = RAW.to_vec();
    flipped[INSIDE_FIRST_FILE] ^= 1;
    check_recovery(flipped, Then::Silence).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_ends_inside_a_file_is_opened_again() {
    check_recovery(RAW[..INSIDE_FIRST_FILE].to_vec(), Then::End).await;
    check_recovery(RAW[..INSIDE_FIRST_FILE].to_vec(), Then::Reset).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_text_in_the_stream_is_survived() {
    check_recovery(b"stream error: no such thing\n\0\0\0\x03".to_vec(), Then::End).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_file_is_survived() {
    let header = 4 + 8 + 4 + "delete.db".len();
    let empty = [&RAW[..header], &[0, 0], RAW].concat();
    check_recovery(empty, Then::Silence).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_no_database_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let at = 4 + 8 + 4;
    let mut renamed = RAW.to_vec();
    assert_eq!(&renamed[at..at + 9], b"delete.db");
    renamed[at..at + 9].copy_from_slice(b"../escape");
    let primary = peer(move |_| answer(renamed.clone(), Then::Silence)).await;
    let data = dir.path().join("data");
    let mut replica = Node::replica(&data, 2, &format!("http://{}", primary.address())).await;
    replica.wait_ready().await;
    assert!(replica.export("wal.db").await == RAW_WAL);
    let escaped = walk(dir.path()).into_iter().find(|path| path.contains("escape"));
    assert_eq!(escaped, None);
    replica.stop().await;
}

fn walk(dir: &Path) -> Vec<String> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            paths.extend(walk(&path));
        }
        paths.push(path.display().to_string());
    }
    paths
}

/// Lets a replica try three times, to a primary that says the cluster id `theirs`, and checks that it
/// took nothing.
async fn check_refused(dir: &Path, theirs: &'static str) {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let primary = peer(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        let mut answer = answer(RAW, Then::Silence);
        answer.headers_mut().insert("litefs-cluster-id", theirs.parse().unwrap());
        answer
    })
    .await;
    let replica = Node::replica(dir, 2, &format!("http://{}", primary.address())).await;
    let before = replica.engine.cluster_id();
    let tried = || calls.load(Ordering::SeqCst) >= 3;
    wait_until(tried, || "three attempts".to_owned()).await;
    assert!(replica.engine.databases().is_empty());
    assert!(!*replica.ready.borrow());
    assert_eq!(replica.engine.cluster_id(), before);
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_with_a_strange_cluster_id_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    check_refused(dir.path(), "hello").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_of_another_cluster_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open_engine(dir.path(), 1);
    engine.set_cluster_id(&ClusterId::new(CLUSTER).unwrap()).unwrap();
    engine.close().unwrap();
    check_refused(dir.path(), "LFSCFFFFFFFFFFFFFFFF").await;
    check_refused(dir.path(), "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_is_news_of_the_primary_once_the_replica_is_ready() {
    let ready = [0, 0, 0, 2];
    let files = RAW.windows(ready.len()).rposition(|bytes| bytes == ready).unwrap();
    let timestamp_ms = {
        let last = RAW[..files].windows(4).rposition(|bytes| bytes == b"LTX1").unwrap();
        i64::from_be_bytes(RAW[last + 32..last + 40].try_into().unwrap())
    };
    let check = async |stream: Vec<u8>, expected: Option<i64>| {
        let dir = tempfile::tempdir().unwrap();
        let primary = peer(move |_| answer(stream.clone(), Then::Silence)).await;
        let url = format!("http://{}", primary.address());
        let mut replica = Node::replica(dir.path(), 2, &url).await;
        replica.wait_ready().await;
        let applied = || replica.pos("wal.db").txid.0 == 10;
        wait_until(applied, || "wal.db".to_owned()).await;
        let told = || replica.engine.lag_timestamp_ms() == expected;
        wait_until(told, || format!("{expected:?}")).await;
        replica.stop().await;
    };
    check([&RAW[..files], &ready].concat(), None).await;
    check([&ready, &RAW[..files]].concat(), Some(timestamp_ms)).await;
}
