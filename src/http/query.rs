//! Query strings: `name=a%20b&id=1`, and paths. Broken escapes stay as they are, unknown parameters
//! are ignored by never being asked for, and of several with one name the first counts.

use std::borrow::Cow;

/// The value of the parameter `name`; empty if it is absent.
pub(super) fn parameter(query: Option<&str>, name: &str) -> String {
    let pairs = query.unwrap_or_default().split('&');
    let mut pairs = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.find(|(key, _)| decode(key) == name).map(|(_, value)| decode(value)).unwrap_or_default()
}

/// A path without its escapes.
pub(super) fn decode_path(path: &str) -> Cow<'_, str> {
    if path.contains('%') { decode_with(path, b'+').into() } else { path.into() }
}

fn decode(text: &str) -> String {
    decode_with(text, b' ')
}

/// `text` without its escapes, with `plus` for each plus sign.
fn decode_with(text: &str, plus: u8) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let (byte, len) = match (first, tail) {
            (b'+', _) => (plus, 1),
            (b'%', [high, low, ..]) => match (hex(*high), hex(*low)) {
                (Some(high), Some(low)) => (high << 4 | low, 3),
                _ => (b'%', 1),
            },
            (byte, _) => (*byte, 1),
        };
        bytes.push(byte);
        rest = &rest[len..];
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8) // below 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(query: &str, expected: &str) {
        assert_eq!(parameter(Some(query), "name"), expected, "{query}");
    }

    #[test]
    fn parameters_are_found_and_decoded() {
        check("name=a.db", "a.db");
        check("id=1&name=a.db&name=b.db", "a.db");
        check("name=a%20b+c%26%3d", "a b c&=");
        check("n%61me=x", "x");
        check("name=%2e%2E%2f", "../");
    }

    #[test]
    fn broken_queries_are_empty_or_literal() {
        check("", "");
        check("name", "");
        check("nam=x", "");
        check("name=%", "%");
        check("name=%4", "%4");
        check("name=%zz", "%zz");
        check("name=%ff", "\u{fffd}");
        assert_eq!(parameter(None, "name"), "");
    }
}
