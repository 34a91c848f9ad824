//! What a proxy takes out of a message's headers, and what it adds.
//!
//! Taken out: what is meant for one connection only. `Upgrade` stays for protocols that are tunnelled;
//! not for HTTP/2 (`h2c`), whose requests would go past the proxy, nor for TLS. Added: who the client
//! is (`X-Forwarded-*`, `Forwarded`), and between nodes which nodes a request has passed.
//!
//! A proxy in front has a better idea of host and protocol than we, so what it says of these stays.
//! A request that another node passes on is left as that node made it: the application sees the same
//! wherever its client connects. Nobody outside the cluster knows the cluster's id, so it is what
//! marks such a request.

use std::net::IpAddr;

use hyper::body::Body as _;
use hyper::header::{
    CONNECTION, CONTENT_LENGTH, FORWARDED, HOST, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE,
};
use hyper::{HeaderMap, Request};
use ltx::NodeId;

use crate::http::CLUSTER_ID;
use crate::http::body::Body;

/// The nodes that a request has passed, by their ids.
const PASSED: HeaderName = HeaderName::from_static("litefs-forwarded-by");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// What stands in no message beyond one connection.
const HOP_BY_HOP: [HeaderName; 8] = [
    CONNECTION,
    KEEP_ALIVE,
    PROXY_CONNECTION,
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TRANSFER_ENCODING,
    UPGRADE,
    HTTP2_SETTINGS,
];

/// The protocol that a message offers or takes up, if it is one that is tunnelled.
pub(super) fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    if !tokens(headers, CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade")) {
        return None;
    }
    let protocol = headers.get(UPGRADE)?;
    let text = protocol.to_str().ok()?.to_ascii_lowercase();
    let passes_by = ["h2c", "http/", "tls"].iter().any(|prefix| text.contains(prefix));
    (!passes_by).then(|| protocol.clone())
}

/// Removes what is meant for this connection only, all but the protocol to `upgrade` to.
pub(super) fn strip(headers: &mut HeaderMap, upgrade: Option<HeaderValue>) {
    let named: Vec<HeaderName> =
        tokens(headers, CONNECTION).filter_map(|token| token.parse().ok()).collect();
    let trailers = tokens(headers, TE).any(|token| token.eq_ignore_ascii_case("trailers"));
    // A peer cannot have the frame or the target of a message taken away.
    for name in named.iter().filter(|name| **name != HOST && **name != CONTENT_LENGTH) {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    headers.remove(TE);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if let Some(protocol) = upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, protocol);
    }
}

/// Says that a body of unknown length comes in chunks: a GET's would not be sent otherwise.
pub(super) fn frame(request: &mut Request<Body>) {
    let is_framed =
        request.body().is_end_stream() || request.headers().contains_key(CONTENT_LENGTH);
    if !is_framed {
        request.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
}

fn tokens(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    let lines = headers.get_all(name).into_iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim).filter(|token| !token.is_empty())
}

/// Takes out which nodes have passed the request on; none if no node of this cluster has.
pub(super) fn take_passed(headers: &mut HeaderMap, cluster_id: Option<&str>) -> Vec<NodeId> {
    let theirs = headers.remove(CLUSTER_ID);
    let ids = tokens(headers, PASSED).filter_map(|id| id.parse().ok()).collect();
    headers.remove(PASSED);
    let ours = cluster_id.is_some_and(|id| theirs.is_some_and(|theirs| theirs == id));
    if ours { ids } else { Vec::new() }
}

/// Says which nodes the request has passed.
pub(super) fn set_passed(headers: &mut HeaderMap, cluster_id: Option<&str>, nodes: &[NodeId]) {
    let ids: Vec<_> = nodes.iter().map(NodeId::to_string).collect();
    let mut set = |name: HeaderName, text: &str| {
        if let Ok(value) = HeaderValue::from_str(text) {
            headers.insert(name, value);
        }
    };
    set(PASSED, &ids.join(", "));
    set(HeaderName::from_static(CLUSTER_ID), cluster_id.unwrap_or_default());
}

/// Adds who the client is, as far as nobody in front has said it.
pub(super) fn add_client(headers: &mut HeaderMap, client: IpAddr) {
    let client = client.to_canonical();
    let names = [FORWARDED, X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO];
    let is_first = !names.iter().any(|name| headers.contains_key(name));
    let node = match client {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("\"[{address}]\""),
    };
    if is_first {
        let host = headers.get(HOST).cloned();
        let forwarded = match host.as_ref().and_then(|host| host.to_str().ok()) {
            Some(host) if !host.contains(['"', '\\']) => {
                format!("for={node};host=\"{host}\";proto=http")
            }
            _ => format!("for={node};proto=http"),
        };
        append(headers, FORWARDED, &forwarded);
        if let Some(host) = host {
            headers.insert(X_FORWARDED_HOST, host);
        }
        headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static("http"));
    }
    let says_forwarded = headers.contains_key(FORWARDED);
    if says_forwarded && !is_first {
        append(headers, FORWARDED, &format!("for={node}"));
    }
    if is_first || !says_forwarded || headers.contains_key(X_FORWARDED_FOR) {
        append(headers, X_FORWARDED_FOR, &client.to_string());
    }
}

/// Adds to the end of a list that may stand on several lines.
fn append(headers: &mut HeaderMap, name: HeaderName, text: &str) {
    let lines = headers.get_all(&name).into_iter().filter_map(|line| line.to_str().ok());
    let list: Vec<_> = lines.chain([text]).collect();
    if let Ok(value) = HeaderValue::from_str(&list.join(", ")) {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    fn lines(headers: &HeaderMap) -> Vec<String> {
        let line = |(name, value): (&HeaderName, &HeaderValue)| {
            format!("{name}: {}", value.to_str().unwrap())
        };
        let mut lines: Vec<_> = headers.iter().map(line).collect();
        lines.sort();
        lines
    }

    #[test]
    fn what_is_for_one_connection_goes() {
        let mut message = headers(&[
            ("connection", "keep-alive, X-Mine, host"),
            ("connection", "content-length"),
            ("keep-alive", "5"),
            ("x-mine", "1"),
            ("host", "a"),
            ("content-length", "3"),
            ("te", "gzip, trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("accept", "*/*"),
        ]);
        strip(&mut message, None);
        assert_eq!(
            lines(&message),
            ["accept: */*", "content-length: 3", "host: a", "te: trailers"]
        );
    }

    #[test]
    fn a_protocol_that_is_tunnelled_stays() {
        let mut message = headers(&[("connection", "upgrade"), ("upgrade", "websocket")]);
        let protocol = upgrade(&message);
        assert!(protocol.is_some());
        strip(&mut message, protocol);
        assert_eq!(lines(&message), ["connection: Upgrade", "upgrade: websocket"]);
        for other in ["h2c", "H2C, websocket", "HTTP/2.0", "TLS/1.0"] {
            assert_eq!(upgrade(&headers(&[("connection", "upgrade"), ("upgrade", other)])), None);
        }
        assert_eq!(upgrade(&headers(&[("upgrade", "websocket")])), None);
    }

    #[test]
    fn the_first_proxy_says_who_the_client_is() {
        let mut message = headers(&[("host", "app.test")]);
        add_client(&mut message, "::ffff:10.0.0.7".parse().unwrap());
        let expected = [
            "forwarded: for=10.0.0.7;host=\"app.test\";proto=http",
            "host: app.test",
            "x-forwarded-for: 10.0.0.7",
            "x-forwarded-host: app.test",
            "x-forwarded-proto: http",
        ];
        assert_eq!(lines(&message), expected);
    }

    #[test]
    fn a_proxy_in_front_is_believed() {
        let mut message =
            headers(&[("x-forwarded-for", "1.2.3.4"), ("x-forwarded-proto", "https")]);
        add_client(&mut message, "10.0.0.7".parse().unwrap());
        let expected = ["x-forwarded-for: 1.2.3.4, 10.0.0.7", "x-forwarded-proto: https"];
        assert_eq!(lines(&message), expected);
        let mut message = headers(&[("forwarded", "for=1.2.3.4"), ("forwarded", "for=x")]);
        add_client(&mut message, "::1".parse().unwrap());
        assert_eq!(lines(&message), ["forwarded: for=1.2.3.4, for=x, for=\"[::1]\""]);
    }

    #[test]
    fn only_a_node_of_the_cluster_is_believed() {
        let nodes = [NodeId(1), NodeId(0xab)];
        let mut message = HeaderMap::new();
        set_passed(&mut message, Some("LFSC0123456789ABCDEF"), &nodes);
        let mut foreign = message.clone();
        assert_eq!(take_passed(&mut message, Some("LFSC0123456789ABCDEF")), nodes);
        assert!(message.is_empty());
        assert_eq!(take_passed(&mut foreign, Some("LFSCFFFFFFFFFFFFFFFF")), []);
        assert!(foreign.is_empty());
        let mut guessed = headers(&[("litefs-forwarded-by", "1"), ("litefs-cluster-id", "")]);
        assert_eq!(take_passed(&mut guessed, None), []);
    }
}
