//! The cookie that tells which transaction a client has seen: `__txid=0000000000000002`.
//!
//! Set on the answer to a write, so that the next read, on whatever node, waits for what the client
//! has just done. It lives for [`limits::TXID_COOKIE_LIFE`]; replication takes less.

use std::time::SystemTime;

use hyper::HeaderMap;
use hyper::header::{COOKIE, HeaderValue, SET_COOKIE};
use ltx::Txid;

use crate::limits;

const NAME: &str = "__txid";

/// The transaction that the client has seen; none without a cookie that says one.
pub(super) fn seen(headers: &HeaderMap) -> Option<Txid> {
    let lines = headers.get_all(COOKIE).into_iter().filter_map(|line| line.to_str().ok());
    let pairs = lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.split_once('='));
    let mut values = pairs.filter(|(name, _)| name.trim() == NAME).map(|(_, value)| value.trim());
    let value = values.next()?;
    let bare = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
    bare.unwrap_or(value).parse().ok().filter(|txid: &Txid| !txid.is_zero())
}

/// Makes `txid` what the client has seen, before the cookies of the application.
pub(super) fn set(headers: &mut HeaderMap, txid: Txid, now: SystemTime) {
    let expires = httpdate::fmt_http_date(now + limits::TXID_COOKIE_LIFE);
    let text = format!("{NAME}={txid}; Path=/; Expires={expires}; HttpOnly");
    let ours = HeaderValue::from_str(&text).expect("hex digits and a date are plain text");
    let others: Vec<_> = headers.get_all(SET_COOKIE).iter().cloned().collect();
    headers.insert(SET_COOKIE, ours);
    for other in others {
        headers.append(SET_COOKIE, other);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[track_caller]
    fn check(lines: &[&'static str], expected: Option<u64>) {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(COOKIE, HeaderValue::from_static(line));
        }
        assert_eq!(seen(&headers), expected.map(Txid), "{lines:?}");
    }

    #[test]
    fn the_first_cookie_of_the_name_counts() {
        check(&["__txid=00000000000000ff"], Some(255));
        check(&["a=b; __txid=00000000000000FF; c=d"], Some(255));
        check(&["a=b", "__txid=\"0000000000000001\""], Some(1));
        check(&["__txid=0000000000000001; __txid=0000000000000002"], Some(1));
    }

    #[test]
    fn what_is_no_transaction_is_no_cookie() {
        check(&[], None);
        check(&["a=b"], None);
        check(&["__txid"], None);
        check(&["__txid=1"], None);
        check(&["__txid=0000000000000000"], None);
        check(&["__txid=000000000000000g"], None);
        check(&["x__txid=0000000000000001"], None);
    }

    #[test]
    fn ours_stands_before_those_of_the_application() {
        let mut headers = HeaderMap::new();
        headers.append(SET_COOKIE, HeaderValue::from_static("a=1"));
        headers.append(SET_COOKIE, HeaderValue::from_static("b=2"));
        set(&mut headers, Txid(2), UNIX_EPOCH + Duration::from_secs(784_111_477));
        let lines: Vec<_> = headers.get_all(SET_COOKIE).iter().collect();
        let ours =
            "__txid=0000000000000002; Path=/; Expires=Sun, 06 Nov 1994 08:49:37 GMT; HttpOnly";
        assert_eq!(lines, [ours, "a=1", "b=2"]);
    }
}
