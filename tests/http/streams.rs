//! A primary and replicas, all ours.

use std::time::Instant;

use litefs::engine::Role;
use litefs::http::client::{Error, StreamRequest};
use litefs::http::frame::{Event, Frame};
use ltx::{NodeId, Pos};

use super::node::{DEADLINE, Node, identity, wait_until};

const ROWS: &str = "CREATE TABLE t (x);
    WITH RECURSIVE n (v) AS (SELECT 1 UNION ALL SELECT v + 1 FROM n WHERE v < 5000)
    INSERT INTO t SELECT printf('row %d', v) FROM n;";

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_has_what_the_primary_has_and_what_comes_later() {
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(&dir.path().join("a"), 1).await;
    let first = primary.import("a.db", ROWS).await;
    let mut replica = Node::replica(&dir.path().join("b"), 2, &primary.url).await;
    replica.wait_ready().await;
    assert_eq!(replica.pos("a.db"), first, "ready means that it is applied");
    assert!(replica.export("a.db").await == primary.export("a.db").await);
    for round in 0..5 {
        let sql = format!("CREATE TABLE t (x); INSERT INTO t VALUES ({round});");
        let pos = primary.import("a.db", &sql).await;
        let other = primary.import("b.db", &sql).await;
        replica.wait_for_pos("a.db", pos).await;
        replica.wait_for_pos("b.db", other).await;
    }
    assert!(replica.export("a.db").await == primary.export("a.db").await);
    assert_eq!(replica.engine.cluster_id(), primary.engine.cluster_id());
    assert!(
        matches!(replica.engine.role(), Role::Replica(info) if info.hostname == "primary-host")
    );
    replica.stop().await;
    primary.stop().await;
}

/// Random rows of about `kib` KiB together, which do not compress.
fn random_rows(kib: usize) -> String {
    format!(
        "CREATE TABLE t (x);
         WITH RECURSIVE n (v) AS (SELECT 1 UNION ALL SELECT v + 1 FROM n WHERE v < {kib})
         INSERT INTO t SELECT randomblob(1000) FROM n;"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_of_every_size_arrive_whole() {
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(&dir.path().join("a"), 1).await;
    let mut replica = Node::replica(&dir.path().join("b"), 2, &primary.url).await;
    replica.wait_ready().await;
    primary.import("a.db", "CREATE TABLE t (x)").await;
    // Less than a chunk, than a piece, than what is kept in memory, and more.
    for kib in [10, 60, 70, 200, 300, 1500, 6000] {
        let pos = primary.import("a.db", &random_rows(kib)).await;
        replica.wait_for_pos("a.db", pos).await;
        assert!(replica.export("a.db").await == primary.export("a.db").await, "{kib} KiB");
    }
    replica.stop().await;
    primary.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_far_behind_catches_up_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut primary = Node::primary(&dir.path().join("a"), 1).await;
    primary.import("a.db", "CREATE TABLE t (x)").await;
    let mut replica = Node::replica(&dir.path().join("b"), 2, &primary.url).await;
    replica.wait_ready().await;
    primary.stop_api().await;
    let mut pos = Pos::ZERO;
    for kib in 0..40 {
        pos = primary.import("a.db", &random_rows(kib)).await;
    }
    primary.start_api().await;
    replica.wait_for_pos("a.db", pos).await;
    let text = primary.client.text("/metrics").await.unwrap();
    let line = "litefs_http_frame_send_count{db=\"a.db\",type=\"ltx:snapshot\"} 0\n";
    assert!(text.contains(line), "{text}");
    assert!(replica.export("a.db").await == primary.export("a.db").await);
    replica.stop().await;
    primary.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_primary_sends_its_files_and_no_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(&dir.path().join("a"), 1).await;
    let address = primary.client.address();
    primary.import("a.db", "CREATE TABLE t (x)").await;
    let mut replica = Node::replica(&dir.path().join("b"), 2, &primary.url).await;
    replica.wait_ready().await;
    replica.stop().await;
    for kib in [1, 300, 1, 6000, 1] {
        primary.import("a.db", &random_rows(kib)).await;
    }
    primary.stop().await;
    let primary = Node::primary_at(&dir.path().join("a"), 3, &address).await;
    let mut replica = Node::replica(&dir.path().join("b"), 4, &primary.url).await;
    replica.wait_ready().await;
    assert_eq!(replica.pos("a.db"), primary.pos("a.db"));
    let text = primary.client.text("/metrics").await.unwrap();
    for line in ["type=\"ltx\"} 5\n", "type=\"ltx:snapshot\"} 0\n"] {
        assert!(text.contains(line), "{line} is missing in:\n{text}");
    }
    assert!(replica.export("a.db").await == primary.export("a.db").await);
    replica.stop().await;
    primary.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_committed_before_a_stop_is_sent() {
    // The larger one does not fit into the window, and is on its way when the stop comes.
    for kib in [1, 10_000] {
        let dir = tempfile::tempdir().unwrap();
        let primary = Node::primary(&dir.path().join("a"), 1).await;
        let mut replica = Node::replica(&dir.path().join("b"), 2, &primary.url).await;
        replica.wait_ready().await;
        primary.import("a.db", &random_rows(kib)).await;
        let pos = primary.import("b.db", ROWS).await;
        primary.stop().await;
        replica.wait_for_pos("b.db", pos).await;
        replica.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_was_cut_off_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let mut primary = Node::primary(&dir.path().join("a"), 1).await;
    primary.import("a.db", ROWS).await;
    let mut replica = Node::replica(&dir.path().join("b"), 2, &primary.url).await;
    replica.wait_ready().await;
    primary.stop_api().await;
    primary.start_api().await;
    let pos = primary.import("a.db", "CREATE TABLE u (x)").await;
    replica.wait_for_pos("a.db", pos).await;
    let text = primary.client.text("/metrics").await.unwrap();
    let sent = |kind| format!("litefs_http_frame_send_count{{db=\"a.db\",type=\"{kind}\"}} ");
    assert!(text.contains(&(sent("ltx") + "1\n")), "{text}");
    assert!(text.contains(&(sent("ltx:snapshot") + "0\n")), "{text}");
    replica.stop().await;
    primary.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filtered_replica_has_only_what_it_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(&dir.path().join("a"), 1).await;
    primary.import("unwanted.db", ROWS).await;
    let wanted = primary.import("wanted.db", ROWS).await;
    let home = dir.path().join("b");
    let mut replica = Node::replica_of(&home, 2, &primary.url, &["wanted.db"]).await;
    replica.wait_ready().await;
    assert_eq!(replica.pos("wanted.db"), wanted);
    primary.import("unwanted.db", "CREATE TABLE u (x)").await;
    let wanted = primary.import("wanted.db", "CREATE TABLE u (x)").await;
    replica.wait_for_pos("wanted.db", wanted).await;
    assert!(replica.engine.database("unwanted.db").is_none());
    replica.stop().await;
    primary.stop().await;
}

/// Reads the stream of a replica with `positions` up to its first heartbeat.
async fn first_round(node: &Node, positions: &[(&str, Pos)]) -> Result<Vec<String>, Error> {
    let request = StreamRequest { identity: &identity(99), positions, filter: &[] };
    let mut stream = node.client.stream(request).await?;
    let mut events = Vec::new();
    loop {
        match stream.next().await?.expect("endless") {
            Event::Frame(Frame::Heartbeat { .. }) => return Ok(events),
            Event::Frame(frame) => events.push(format!("{frame:?}")),
            Event::LtxData(_) => {}
            Event::LtxEnd => events.push("end of ltx".to_owned()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_begins_as_the_protocol_says() {
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(&dir.path().join("a"), 1).await;
    assert_eq!(first_round(&primary, &[]).await.unwrap(), ["Ready"]);
    let first = primary.import("a.db", ROWS).await;
    let second = primary.import("a.db", "CREATE TABLE u (x)").await;
    let ltx = ["Ltx { name: \"a.db\" }", "end of ltx"];
    let hwm = "Hwm { name: \"a.db\", txid: Txid(0) }";
    let snapshot = [ltx[0], ltx[1], "Ready"];
    let increment = [ltx[0], ltx[1], hwm, "Ready"];
    let check = async |pos: Pos, expected: &[&str]| {
        assert_eq!(first_round(&primary, &[("a.db", pos)]).await.unwrap(), expected, "{pos}");
    };
    check(Pos::ZERO, &snapshot).await;
    check(first, &increment).await;
    check(second, &["Ready"]).await;
    let diverged = Pos { txid: second.txid, checksum: first.checksum };
    check(diverged, &snapshot).await;
    check(Pos { txid: second.txid.next(), ..second }, &snapshot).await;
    check(Pos { txid: first.txid, ..second }, &snapshot).await;
    let unknown = first_round(&primary, &[("../x", first), ("a.db", second)]).await.unwrap();
    assert_eq!(unknown, ["DropDb { name: \"../x\" }", "Ready"]);
    primary.stop().await;
}

/// A snapshot takes long, or finds no room.
#[tokio::test(flavor = "multi_thread")]
async fn no_database_waits_for_the_snapshot_of_another_one() {
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(&dir.path().join("a"), 1).await;
    primary.import("a.db", ROWS).await;
    let first = primary.import("b.db", ROWS).await;
    primary.import("b.db", "CREATE TABLE u (x)").await;
    primary.import("c.db", ROWS).await;
    let events = first_round(&primary, &[("b.db", first)]).await.unwrap();
    let names = events.iter().filter_map(|event| event.strip_prefix("Ltx { name: \""));
    let names: Vec<_> = names.map(|name| &name[..1]).collect();
    assert_eq!(names, ["b", "a", "c"]);
    assert_eq!(events.last().map(String::as_str), Some("Ready"));
    primary.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_stream_beats_every_second_and_ends_with_its_node() {
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(&dir.path().join("a"), 1).await;
    let request = StreamRequest { identity: &identity(2), positions: &[], filter: &[] };
    let mut stream = primary.client.stream(request).await.unwrap();
    assert_eq!(stream.node_id, Some(NodeId(1)));
    let mut last_ms = None;
    // One may come late, where the machine has other things to do.
    let (begin, mut in_time) = (Instant::now(), 0);
    while in_time < 2 {
        assert!(begin.elapsed() < DEADLINE, "{in_time} heartbeats in time");
        if let Event::Frame(Frame::Heartbeat { timestamp_ms }) =
            stream.next().await.unwrap().unwrap()
        {
            if let Some(last_ms) = last_ms {
                let gap_ms = timestamp_ms - last_ms;
                assert!(gap_ms >= 900, "{gap_ms} ms between two heartbeats");
                in_time += i32::from(gap_ms < 3000);
            }
            last_ms = Some(timestamp_ms);
        }
    }
    primary.stop().await;
    let mut last = None;
    while let Some(event) = stream.next().await.unwrap() {
        last = Some(event);
    }
    assert_eq!(last, Some(Event::Frame(Frame::End)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_refuses_streams_and_nobody_follows_itself() {
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(&dir.path().join("a"), 1).await;
    let mut replica = Node::replica(&dir.path().join("b"), 2, &primary.url).await;
    replica.wait_ready().await;
    let error = first_round(&replica, &[]).await.unwrap_err();
    assert_eq!(error.to_string(), "invalid response: code=503: lease expired");
    let myself = StreamRequest { identity: &identity(1), positions: &[], filter: &[] };
    let error = primary.client.stream(myself).await.err().unwrap();
    assert_eq!(error.to_string(), "invalid response: code=400: cannot connect to self");
    replica.stop().await;
    primary.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_when_its_primary_is_deposed() {
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(&dir.path().join("a"), 1).await;
    let request = StreamRequest { identity: &identity(2), positions: &[], filter: &[] };
    let mut stream = primary.client.stream(request).await.unwrap();
    assert_eq!(stream.next().await.unwrap(), Some(Event::Frame(Frame::Ready)));
    primary.engine.set_role(Role::Unknown);
    primary.engine.set_role(Role::Primary);
    let mut last = None;
    while let Some(event) = stream.next().await.unwrap() {
        last = Some(event);
    }
    assert_eq!(last, Some(Event::Frame(Frame::End)), "even though it is primary again");
    primary.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lag_follows_the_heartbeats() {
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::primary(&dir.path().join("a"), 1).await;
    let replica = Node::replica(&dir.path().join("b"), 2, &primary.url).await;
    let synced = || replica.engine.lag_ms().is_some_and(|lag_ms| lag_ms < 5000);
    wait_until(synced, || format!("a lag; it is {:?}", replica.engine.lag_ms())).await;
    replica.stop().await;
    primary.stop().await;
}
