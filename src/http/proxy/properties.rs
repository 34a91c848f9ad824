//! The head of a request or an answer, whatever stands in it, and the small JSON documents of peers.

use hyper::header::{CONNECTION, HeaderName, HeaderValue, TE, TRANSFER_ENCODING, UPGRADE};
use hyper::{HeaderMap, Method, Request};
use ltx::{NodeId, Pos, Txid};

use super::rules::{Kind, Rules};
use super::{cookie, headers};
use crate::http::halt::Call;
use crate::http::report::{HaltLock, Info, Status};
use crate::http::{HOSTNAME, query, server};

/// The bytes as lines: a path with a query, then headers; and as a document.
pub fn head(bytes: &[u8]) {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let first = String::from_utf8_lossy(lines.next().unwrap_or_default()).into_owned();
    let (path, asked) = first.split_once('?').unwrap_or((&first, ""));
    assert!(query::parameter(Some(asked), "name").len() <= 3 * asked.len());
    assert!(query::decode_path(path).len() <= 3 * path.len());
    let rules = Rules::new(&[path.to_owned()], &[asked.to_owned()]);
    if let Ok(uri) = path.parse::<hyper::Uri>() {
        for method in [Method::GET, Method::POST] {
            let _: Kind = rules.kind(&method, uri.path());
        }
    }
    let mut map: HeaderMap = lines.filter_map(header).collect();
    calls(asked, &map);
    let upgrade = headers::upgrade(&map);
    headers::strip(&mut map, upgrade.clone());
    assert!(!map.contains_key(TRANSFER_ENCODING));
    assert_eq!(map.get(UPGRADE), upgrade.as_ref());
    assert_eq!(map.contains_key(CONNECTION), upgrade.is_some());
    assert!(map.get(TE).is_none_or(|te| te == "trailers"));
    headers::take_passed(&mut map, Some("LFSC0000000000000000"));
    headers::add_client(&mut map, std::net::IpAddr::from([10, 0, 0, 1]));
    let before = cookie::seen(&map);
    cookie::set(&mut map, Txid(7), std::time::SystemTime::UNIX_EPOCH);
    assert_eq!(cookie::seen(&map), before, "an answer's cookie is not a request's");
    document::<Info>(bytes);
    document::<Status>(bytes);
    document::<HaltLock>(bytes);
}

/// Calls of other nodes that say everything in their query and headers.
fn calls(asked: &str, headers: &HeaderMap) {
    let identity = server::identity(server::peer_id(headers), headers);
    assert!(headers.contains_key(HOSTNAME) || identity.hostname.is_empty());
    let Ok(uri) = format!("/halt?{asked}").parse::<hyper::Uri>() else { return };
    let mut request = Request::new(());
    *request.uri_mut() = uri;
    *request.headers_mut() = headers.clone();
    for id in ["id", "lockID"] {
        if let Ok(call) = Call::of(NodeId(5), &request, id) {
            assert!(!call.name.is_empty() && identity.node_id != NodeId(5));
            assert_eq!(query::parameter(Some(asked), id).parse(), Ok(call.id.0));
        }
    }
    if let Ok(pos) = query::parameter(Some(asked), "pos").parse::<Pos>() {
        assert_eq!(pos.to_string().parse(), Ok(pos));
    }
    if let Ok(node) = query::parameter(Some(asked), "nodeID").parse::<NodeId>() {
        assert_eq!(node.to_string().parse(), Ok(node));
    }
}

fn header(line: &[u8]) -> Option<(HeaderName, HeaderValue)> {
    let at = line.iter().position(|byte| *byte == b':')?;
    let name = HeaderName::from_bytes(&line[..at]).ok()?;
    Some((name, HeaderValue::from_bytes(line[at + 1..].trim_ascii()).ok()?))
}

/// What is read as a document is read so again when it was written.
fn document<T: serde::de::DeserializeOwned + serde::Serialize>(bytes: &[u8]) {
    if let Ok(read) = serde_json::from_slice::<T>(bytes) {
        let text = serde_json::to_string(&read).expect("what was read can be written");
        let again: T = serde_json::from_str(&text).expect("what was written can be read");
        assert_eq!(serde_json::to_string(&again).ok(), Some(text));
    }
}
