//! What peers may take up on the disk of a node, and how long they make others wait.

use std::path::Path;
use std::time::Duration;

use litefs::http::client::StreamRequest;
use litefs::http::frame::Event;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, timeout};

use super::node::{Node, identity, wait_until};
use crate::support::disk::Disk;

const MIB: u64 = 1 << 20;
/// Far below what a peer may wait for.
const SHORT: Duration = Duration::from_secs(100);

/// A primary whose data directory is on a disk of that size.
async fn node_on(dir: &Path, size: &str) -> (Node, Disk) {
    let data = dir.join("data");
    let disk = Disk::mount(&data, size);
    (Node::primary(&data, 1).await, disk)
}

/// Makes the database, of `mib` MiB.
async fn make(node: &Node, mib: u64) {
    let blob = mib * MIB - 100_000;
    let sql = format!(
        "PRAGMA journal_mode = delete; CREATE TABLE t (x); INSERT INTO t VALUES (zeroblob({blob}));"
    );
    node.import("a.db", &sql).await;
}

/// Asks for an export of which little fits into the sockets.
async fn ask_export(node: &Node) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(64 << 10).unwrap();
    let mut stream = socket.connect(node.client.address().parse().unwrap()).await.unwrap();
    stream.write_all(b"GET /export?name=a.db HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    stream
}

/// An export that has begun, and of which nothing is read.
async fn begin_export(node: &Node) -> TcpStream {
    let mut stream = ask_export(node).await;
    let mut line = [0; 15];
    stream.read_exact(&mut line).await.unwrap();
    assert_eq!(&line, b"HTTP/1.1 200 OK");
    stream
}

/// Reads the rest of an export; whether it is whole.
async fn is_whole(mut export: TcpStream) -> bool {
    let end = b"\r\n0\r\n\r\n";
    let mut last = Vec::new();
    let mut piece = vec![0; 64 << 10];
    loop {
        match export.read(&mut piece).await {
            Ok(0) | Err(_) => return false,
            Ok(len) => last.extend_from_slice(&piece[..len]),
        }
        if last.ends_with(end) {
            return true;
        }
        last.drain(..last.len().saturating_sub(end.len()));
    }
}

/// Imports `len` zeros, which are no database; what comes of it.
async fn import_zeros(node: &Node, len: u64) -> String {
    let error = node.client.import("b.db", tokio::io::repeat(0), Some(len)).await.unwrap_err();
    error.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_leaves_room_to_writers() {
    let dir = tempfile::tempdir().unwrap();
    let (node, disk) = node_on(dir.path(), "64m").await;
    let free = disk.free();
    let text = import_zeros(&node, free - 8 * MIB).await;
    let full = "code=507: store upload: what room is left on the disk is for writers";
    assert!(text.ends_with(full), "{text}");
    wait_until(|| disk.free() == free, || "the room of the upload".to_owned()).await;
    let text = import_zeros(&node, free - 20 * MIB).await;
    assert!(text.contains("code=400: read database header"), "{text}");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_made_for_a_slow_peer_leaves_room_to_writers() {
    let dir = tempfile::tempdir().unwrap();
    let (node, disk) = node_on(dir.path(), "64m").await;
    make(&node, 24).await;
    let filler = disk.fill(15 * MIB);
    let slow = begin_export(&node).await;
    // Waits for the end of the export.
    make(&node, 1).await;
    assert!(!is_whole(slow).await, "there was no room for it");
    std::fs::remove_file(filler).unwrap();
    make(&node, 24).await;
    let slow = begin_export(&node).await;
    make(&node, 1).await;
    assert!(is_whole(slow).await);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_a_slow_peer_gives_way_to_writers() {
    let dir = tempfile::tempdir().unwrap();
    let (node, disk) = node_on(dir.path(), "96m").await;
    make(&node, 24).await;
    let slow = begin_export(&node).await;
    // Waits for the end of the export.
    make(&node, 1).await;
    disk.fill(3 * MIB);
    assert!(node.engine.shared().is_full());
    assert!(!is_whole(slow).await, "writers have no room");
    wait_until(|| !node.engine.shared().is_full(), || "room for writers".to_owned()).await;
    node.stop().await;
}

/// As many exports as there may be, of a large database, of which nothing is read.
async fn slow_exports(node: &Node) -> Vec<TcpStream> {
    make(node, 48).await;
    let mut slow = Vec::new();
    for _ in 0..litefs::limits::SPOOLS_MAX {
        slow.push(begin_export(node).await);
    }
    slow
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_slow_peers_does_not_add_up() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::primary(dir.path(), 1).await;
    let mut slow = slow_exports(&node).await;
    let next = ask_export(&node).await;
    timeout(SHORT, next.readable()).await.expect_err("all are on the disk");
    slow.pop();
    timeout(SHORT, next.readable()).await.expect("there is one less").unwrap();
    node.stop().await;
}

/// All databases of a replica wait for a snapshot of one.
#[tokio::test(start_paused = true)]
async fn a_replica_does_not_wait_for_slow_exports() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::primary(dir.path(), 1).await;
    let _slow = slow_exports(&node).await;
    let request = StreamRequest { identity: &identity(99), positions: &[], filter: &[] };
    let mut stream = node.client.stream(request).await.unwrap();
    let begun = async {
        while !matches!(stream.next().await.unwrap().expect("endless"), Event::LtxData(_)) {}
    };
    timeout(SHORT, begun).await.expect("a snapshot");
    drop(stream);
    node.stop().await;
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_ever_for_slow_peers() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::primary(dir.path(), 1).await;
    let mut slow = slow_exports(&node).await;
    let begin = Instant::now();
    let next = ask_export(&node).await;
    // Each of them takes a little all the time.
    while timeout(SHORT, next.readable()).await.is_err() {
        for export in &mut slow {
            export.read_exact(&mut vec![0; 2 << 20]).await.unwrap();
        }
    }
    let seconds = begin.elapsed().as_secs();
    assert!((590..=610).contains(&seconds), "{seconds} s");
    node.stop().await;
}
