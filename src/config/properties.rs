//! A configuration, whatever stands in it, is read or refused with a message.

use super::environment::Environment;
use super::{Expansion, duration, exec, expand, load_text};
use crate::cluster::consul::address::Address;
use crate::http::url::Url;

/// The bytes as the text of a file, and as each of the values that have a form of their own.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let environment = Environment::of_process("host");
    let expanded = expand::expand(text, &|name| (name.len() < 4).then(|| name.repeat(2)));
    if !text.contains('$') {
        assert_eq!(expanded, text, "without a variable nothing changes");
    }
    for expansion in [Expansion::On, Expansion::Off] {
        match load_text("litefs.yml".into(), text, expansion, &environment) {
            Ok(loaded) => assert!(!format!("{:?}", loaded.config).is_empty()),
            Err(error) => assert!(!error.to_string().trim().is_empty()),
        }
    }
    if let Ok(words) = exec::split_words(text) {
        assert!(words.iter().map(String::len).sum::<usize>() <= text.len());
    }
    let _ = duration::parse_nanos(text);
    if let Ok(url) = Url::new(text) {
        assert!(Url::new(&url.to_string()).is_ok_and(|again| again == url), "{text:?}");
    }
    let _ = Address::new(text, |name| (name.len() % 2 == 0).then(|| text.to_owned()));
}
