//! Consul's answers and the documents of a lease, whatever stands in them.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use hyper::StatusCode;
use ltx::{Checksum, Pos, Txid};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::address::Address;
use super::client::{Answer, Client, Entry, Outcome};
use super::{Holder, Timing, Value, encode, holder};
use crate::cluster::election::{Field, Force, Record, Rival, Standing, Verdict};
use crate::engine::DbName;
use crate::limits;

/// The bytes as Consul's answer to each kind of call, and as the value of each key.
pub fn consul(bytes: &[u8]) {
    let address = Address::new("", |_| None).expect("the default is one");
    let client = Client::new(address).expect("no certificates");
    let body = Bytes::copy_from_slice(bytes);
    for status in [StatusCode::OK, StatusCode::NOT_FOUND, StatusCode::CONFLICT] {
        let answer = || Answer { status, index: 7, body: body.clone() };
        if let Ok(entries) = client.entries("list keys", answer()) {
            assert!(entries.iter().map(|entry| entry.value.len()).sum::<usize>() <= bytes.len());
            entries.into_iter().for_each(key);
        }
        match client.outcome("change keys together", answer()) {
            Ok(Outcome::Done(_)) => assert_eq!(status, StatusCode::OK),
            Ok(Outcome::Refused(why)) => assert!(why.len() <= 2 * bytes.len()),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        let renewed = client.renewed("renew the session", answer());
        assert!(status != StatusCode::CONFLICT || renewed.is_err());
        let _ = client.session("create a session", answer());
        let _ = client.decode::<bool>("create a key", bytes);
    }
    let session = Some("a-session".to_owned());
    let text = serde_json::json!([{
        "Key": "k", "Value": BASE64.encode(bytes), "Session": session, "ModifyIndex": 9
    }]);
    let body = text.to_string().into();
    let entries = client.entries("read a key", Answer { status: StatusCode::OK, index: 9, body });
    let entry = Entry { key: "k".to_owned(), value: bytes.to_vec(), session, index: 9 };
    assert_eq!(entries.expect("an entry"), std::slice::from_ref(&entry));
    key(Entry { session: None, ..entry.clone() });
    key(entry);
}

/// The value of a key is whoever has the lease, the record of the last primary, or a candidate.
fn key(entry: Entry) {
    if let Some(value) = document::<Value>(&entry.value) {
        assert!(value.hostname.len() <= entry.value.len());
    }
    let record = document::<Record>(&entry.value);
    let rival = document::<Rival>(&entry.value);
    let is_locked = entry.session.is_some();
    match holder(Some(entry.clone())) {
        Holder::Somebody(held) => {
            assert!(is_locked && Some(held.session) == entry.session);
            let fence = held.fence.unwrap_or_default();
            assert!(Timing::until_fenced(fence) >= fence);
        }
        Holder::Released => assert!(!is_locked && entry.value.is_empty()),
        Holder::Nobody => assert!(!is_locked && !entry.value.is_empty()),
    }
    field(record.as_ref(), &rival.into_iter().collect::<Vec<_>>());
}

/// A node that has something, one that has nothing, and one that has what the record says meet a record
/// and a candidate. There is always a verdict, and a term that is not that of anybody before, while there
/// are any left.
fn field(record: Option<&Record>, rivals: &[Rival]) {
    let pos = Pos { txid: Txid(5), checksum: Checksum::flagged(1) };
    let positions = [(DbName::new("a.db").expect("a name"), pos)];
    let theirs = record.map(|record| record.standing.clone());
    for own in [Standing::of(1, &positions), Standing::default(), theirs.unwrap_or_default()] {
        for (waited, force) in [(Duration::ZERO, Force::No), (Duration::MAX, Force::No)]
            .into_iter()
            .chain([(Duration::ZERO, Force::Yes)])
        {
            let positions = &positions[..];
            let field = Field { own: &own, positions, record, rivals, waited, force };
            let known = rivals.iter().map(|rival| &rival.standing);
            let known = known.chain(record.map(|record| &record.standing)).chain([&own]);
            let newest = known.map(|standing| standing.term).max().unwrap_or_default();
            assert!(field.next_term() > newest || newest == u64::MAX);
            match field.verdict() {
                Verdict::Run => {}
                Verdict::RunBehind(why) | Verdict::Never(why) => {
                    assert!(force == Force::No && !why.is_empty());
                }
                Verdict::Wait(why) => {
                    assert!(force == Force::No && !why.is_empty());
                    let is_late = waited > limits::ELECTION_RIVAL_WAIT;
                    assert!(!is_late || own.is_empty(), "nobody waits for ever: {why}");
                }
            }
        }
        for rival in rivals {
            assert!(!(own.is_behind(&rival.standing) && rival.standing.is_behind(&own)));
        }
    }
}

/// What is read as a document is read so again when it was written.
fn document<T: DeserializeOwned + Serialize + PartialEq>(bytes: &[u8]) -> Option<T> {
    let read: T = serde_json::from_slice(bytes).ok()?;
    assert!(serde_json::from_slice(&encode(&read)).is_ok_and(|again: T| again == read));
    Some(read)
}
