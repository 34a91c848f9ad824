//! `GET /`, `/page.css` and `/page.js`: the status of the node for a browser.
//!
//! The page is plain HTML with one script, all in the program; it loads nothing from elsewhere, and
//! what it shows it asks of `/status`. No file of it says anything about the node.

use hyper::Response;
use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS,
};

use super::body::{self, Body};

const HTML: &str = include_str!("page/index.html");
const STYLE: &str = include_str!("page/page.css");
const SCRIPT: &str = include_str!("page/page.js");

/// What the page may load: its own files, and answers of this node.
const POLICY: &str = "default-src 'none'; img-src data:; script-src 'self'; connect-src 'self'; \
                      style-src 'self'; frame-ancestors 'none'; base-uri 'none'; \
                      form-action 'none'";

/// The page.
pub(super) fn html() -> Response<Body> {
    answer("text/html; charset=utf-8", HTML)
}

/// How it looks.
pub(super) fn style() -> Response<Body> {
    answer("text/css; charset=utf-8", STYLE)
}

/// Its script.
pub(super) fn script() -> Response<Body> {
    answer("text/javascript; charset=utf-8", SCRIPT)
}

fn answer(content_type: &'static str, text: &'static str) -> Response<Body> {
    let mut response = Response::new(body::full(text));
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_TYPE, content_type),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (CACHE_CONTROL, "no-cache"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}
