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
        if queue.try_send(event.clone()).is_err() {
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

fn line(event: &Event) -> Vec<u8> {
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
    }
}

fn encode(line: &Line<'_>) -> Vec<u8> {
    let mut json = serde_json::to_vec(line).expect("plain structs of texts and numbers encode");
    json.push(b'\n');
    json
}

/// UTC with the milliseconds' trailing zeros dropped: `2026-11-23T06:53:10.13Z`.
fn rfc3339(timestamp_ms: i64) -> String {
    let (seconds, ms) = (timestamp_ms.div_euclid(1000), timestamp_ms.rem_euclid(1000));
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let fraction = format!(".{ms:03}");
    let fraction = fraction.trim_end_matches('0').trim_end_matches('.');
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z")
}

/// Year, month and day of the day `days` after 1970-01-01, by the Gregorian rules. Counted in years
/// that begin in March, so that a leap day is the last of its year.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468; // since 0000-03-01
    let era = days.div_euclid(146_097); // of 400 years
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use ltx::{Checksum, PageSize, Pos, Txid};

    use super::*;
    use crate::engine::{DbName, PrimaryInfo};

    #[test]
    fn timestamps_drop_the_zeros_of_their_fraction() {
        let check = |ms, expected: &str| assert_eq!(rfc3339(ms), expected);
        check(0, "1970-01-01T00:00:00Z");
        check(-1, "1969-12-31T23:59:59.999Z");
        check(951_782_400_000, "2000-02-29T00:00:00Z");
        check(1_795_416_790_135, "2026-11-23T06:53:10.135Z");
        check(1_795_416_790_130, "2026-11-23T06:53:10.13Z");
        check(1_795_416_790_100, "2026-11-23T06:53:10.1Z");
        check(4_102_444_799_000, "2099-12-31T23:59:59Z");
    }

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
