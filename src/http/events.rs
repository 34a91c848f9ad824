//! `GET /events`: what happens on this node, one JSON object a line, without end.
//!
//! Each reader has a queue of [`limits::EVENT_QUEUE_MAX`] events; one that falls further behind is
//! cut off, and sees so by the missing end of the body.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::mpsc;

use super::body::{self, Body};
use super::rfc3339::rfc3339;
use super::{Stop, stopped};
use crate::engine::{Engine, Event, EventWatch, Role};
use crate::limits;

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "camelCase")]
enum Line<'a> {
    Init { data: Primary<'a> },
    Tx { db: &'a str, data: Tx },
    PrimaryChange { data: Primary<'a> },
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Primary<'a> {
    is_primary: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    hostname: Option<&'a str>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Tx {
    #[serde(rename = "txID")]
    txid: String,
    post_apply_checksum: String,
    page_size: u32,
    commit: u32,
    timestamp: String,
}

/// The body of one reader, fed by a task until the reader goes or the node stops.
pub(super) fn serve(engine: &Engine, stop: Stop) -> Body {
    let (queue, events) = mpsc::channel(limits::EVENT_QUEUE_MAX);
    let overflow = Arc::new(AtomicBool::new(false));
    let full = overflow.clone();
    let watch = engine.watch_events(Box::new(move |event| {
        if matches!(event, Event::WritesResumed) {
            // Nothing that clients of LiteFS know.
        } else if queue.try_send(event.clone()).is_err() {
            full.store(true, Ordering::Relaxed);
        }
    }));
    let (sender, body) = body::channel();
    let first = init(&engine.role());
    tokio::spawn(Reader { _watch: watch, events, overflow, sender, stop }.run(first));
    body
}

struct Reader {
    /// Fills `events` as long as it lives.
    _watch: EventWatch,
    events: mpsc::Receiver<Event>,
    /// Events were lost.
    overflow: Arc<AtomicBool>,
    sender: body::Sender,
    stop: Stop,
}

impl Reader {
    async fn run(mut self, first: Bytes) {
        let mut lines = first;
        let mut batch = Vec::new();
        while self.sender.send(lines).await.is_ok() {
            // Commits may come quickly: one wake-up a pause, not one a commit.
            tokio::time::sleep(limits::STREAM_PAUSE).await;
            tokio::select! {
                _ = self.events.recv_many(&mut batch, limits::EVENT_QUEUE_MAX) => {}
                () = self.sender.closed() => return,
                () = stopped(&mut self.stop) => return self.sender.finish(),
            }
            if self.overflow.load(Ordering::Relaxed) {
                return;
            }
            lines = batch.drain(..).flat_map(|event| line(&event)).collect();
        }
    }
}

fn init(role: &Role) -> Bytes {
    let data = match role {
        Role::Primary => Primary { is_primary: true, hostname: None },
        Role::Replica(info) => Primary { is_primary: false, hostname: Some(&info.hostname) },
        Role::Unknown => Primary { is_primary: false, hostname: None },
    };
    encode(&Line::Init { data }).into()
}

pub(super) fn line(event: &Event) -> Vec<u8> {
    match event {
        Event::Tx { db, pos, page_size, commit, timestamp_ms } => encode(&Line::Tx {
            db: db.as_str(),
            data: Tx {
                txid: pos.txid.to_string(),
                post_apply_checksum: pos.checksum.to_string(),
                page_size: page_size.get(),
                commit: *commit,
                timestamp: rfc3339(*timestamp_ms),
            },
        }),
        Event::PrimaryChange { is_primary, hostname } => encode(&Line::PrimaryChange {
            data: Primary { is_primary: *is_primary, hostname: hostname.as_deref() },
        }),
        Event::WritesResumed => Vec::new(),
    }
}

fn encode(line: &Line<'_>) -> Vec<u8> {
    let mut json = serde_json::to_vec(line).expect("plain structs of texts and numbers encode");
    json.push(b'\n');
    json
}

#[cfg(test)]
mod tests {
    use ltx::{Checksum, PageSize, Pos, Txid};

    use super::*;
    use crate::engine::{DbName, PrimaryInfo};

    #[test]
    fn events_have_the_shape_of_litefs() {
        let tx = Event::Tx {
            db: DbName::new("a.db").unwrap(),
            pos: Pos { txid: Txid(3), checksum: Checksum::flagged(0x1695_1701_e069_8edb) },
            page_size: PageSize::new(4096).unwrap(),
            commit: 2,
            timestamp_ms: 1_795_416_790_135,
        };
        let expected = concat!(
            r#"{"type":"tx","db":"a.db","data":{"txID":"0000000000000003","#,
            r#""postApplyChecksum":"96951701e0698edb","pageSize":4096,"commit":2,"#,
            r#""timestamp":"2026-11-23T06:53:10.135Z"}}"#,
            "\n"
        );
        assert_eq!(String::from_utf8(line(&tx)).unwrap(), expected);
        let change = Event::PrimaryChange { is_primary: true, hostname: None };
        let expected = "{\"type\":\"primaryChange\",\"data\":{\"isPrimary\":true}}\n";
        assert_eq!(String::from_utf8(line(&change)).unwrap(), expected);
        let primary = PrimaryInfo { hostname: "h1".into(), advertise_url: "http://h1".into() };
        let expected = "{\"type\":\"init\",\"data\":{\"isPrimary\":false,\"hostname\":\"h1\"}}\n";
        assert_eq!(init(&Role::Replica(primary)), expected);
    }
}
