//! Which requests are reads and which are writes, by method and path alone.
//!
//! A pattern is literal text in which `*` stands for any run of characters, `/` and none included.
//! It covers the whole path, decoded and without the query: `/build/*` is `/build/` and
//! `/build/a/b`, not `/build`.

use hyper::Method;

use crate::http::query::decode_path;

/// Where the proxy itself answers.
const HEALTH_PATH: &str = "/litefs/health";

/// What a request is to the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// For the application as it is: no cookie, no waiting.
    Passthrough,
    /// For the proxy itself.
    Health,
    /// For the application here, once this node has what the client has seen.
    Read,
    /// For the application on the primary.
    Write,
}

impl Kind {
    /// The word for logs and metrics.
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Passthrough => "passthrough",
            Kind::Health => "health",
            Kind::Read => "read",
            Kind::Write => "write",
        }
    }
}

/// The patterns of the configuration.
pub(super) struct Rules {
    passthrough: Vec<Pattern>,
    always_forward: Vec<Pattern>,
}

impl Rules {
    pub(super) fn new(passthrough: &[String], always_forward: &[String]) -> Rules {
        let patterns = |texts: &[String]| texts.iter().map(|text| Pattern::new(text)).collect();
        Rules { passthrough: patterns(passthrough), always_forward: patterns(always_forward) }
    }

    /// What a request with this method and (undecoded) path is.
    pub(super) fn kind(&self, method: &Method, path: &str) -> Kind {
        let path = decode_path(path);
        let is_in = |patterns: &[Pattern]| patterns.iter().any(|pattern| pattern.matches(&path));
        let is_get = matches!(*method, Method::GET | Method::HEAD);
        if is_in(&self.passthrough) {
            Kind::Passthrough
        } else if is_get && path == HEALTH_PATH {
            Kind::Health
        } else if is_read(method) && !is_in(&self.always_forward) {
            Kind::Read
        } else {
            Kind::Write
        }
    }
}

/// Methods that by their definition change nothing; a CORS preflight is one of them.
fn is_read(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE)
}

/// The literal pieces between the stars; never empty.
struct Pattern(Vec<String>);

impl Pattern {
    fn new(text: &str) -> Pattern {
        Pattern(text.split('*').map(str::to_owned).collect())
    }

    fn matches(&self, path: &str) -> bool {
        let Some((first, rest)) = self.0.split_first() else { return false };
        let Some(mut path) = path.strip_prefix(first.as_str()) else { return false };
        let Some((last, middle)) = rest.split_last() else { return path.is_empty() };
        for piece in middle {
            let Some(at) = path.find(piece.as_str()) else { return false };
            path = &path[at + piece.len()..];
        }
        path.ends_with(last.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pattern: &str, path: &str, expected: bool) {
        assert_eq!(Pattern::new(pattern).matches(path), expected, "{pattern} {path}");
    }

    #[test]
    fn a_pattern_covers_the_whole_path() {
        check("/build/*", "/build/", true);
        check("/build/*", "/build/a/b", true);
        check("/build/*", "/build", false);
        check("/build/*", "/x/build/a", false);
        check("*.js", "/a/b.js", true);
        check("*.js", "/a/b.jsx", false);
        check("/a", "/a", true);
        check("/a", "/ab", false);
        check("*", "/", true);
        check("", "/", false);
    }

    #[test]
    fn stars_do_not_share_text() {
        check("/a*a", "/a", false);
        check("/a*a", "/aa", true);
        check("/*/x/*.css", "/1/x/2/x/3.css", true);
        check("/*x*x*", "/x", false);
        check("/*x*x*", "/xx", true);
        check("/**", "/a", true);
        check("/a.c", "/abc", false);
    }

    #[track_caller]
    fn check_kind(method: &str, path: &str, expected: Kind) {
        let rules = Rules::new(&["*.js".to_owned()], &["/login".to_owned(), "/a b".to_owned()]);
        assert_eq!(rules.kind(&method.parse().unwrap(), path), expected, "{method} {path}");
    }

    #[test]
    fn methods_and_paths_decide() {
        for method in ["GET", "HEAD", "OPTIONS", "TRACE"] {
            check_kind(method, "/", Kind::Read);
        }
        for method in ["POST", "PUT", "PATCH", "DELETE", "PROPFIND", "CUSTOM"] {
            check_kind(method, "/", Kind::Write);
            check_kind(method, "/x.js", Kind::Passthrough);
            check_kind(method, "/litefs/health", Kind::Write);
        }
        check_kind("GET", "/login", Kind::Write);
        check_kind("GET", "/%6cogin", Kind::Write);
        check_kind("GET", "/a%20b", Kind::Write);
        check_kind("GET", "/a+b", Kind::Read);
        check_kind("GET", "/litefs/health", Kind::Health);
        check_kind("HEAD", "/litefs/health", Kind::Health);
        check_kind("OPTIONS", "*", Kind::Read);
    }
}
