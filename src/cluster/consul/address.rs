//! Where Consul answers, and with which credentials: from `lease.consul.url` and the environment.
//!
//! Scheme and host address the agent; the password is the token; the path is a prefix of all keys.
//! What the URL leaves open comes from `CONSUL_HTTP_ADDR`, `CONSUL_HTTP_SSL`, `CONSUL_HTTP_TOKEN_FILE`
//! (which wins over every token), `CONSUL_HTTP_TOKEN`, `CONSUL_HTTP_AUTH` and `CONSUL_NAMESPACE`;
//! certificates from `CONSUL_CACERT`, `CONSUL_CLIENT_CERT` and `CONSUL_CLIENT_KEY`.
//!
//! Invariant: no secret is shown by `Debug` or in an error.

use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;

use crate::tls::Identity;

/// Where an agent listens unless somebody says otherwise.
const DEFAULT_AUTHORITY: &str = "127.0.0.1:8500";

/// Why there is no address.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something else than `http` or `https`.
    #[error("invalid consul URL scheme {0:?}, must be http or https")]
    Scheme(String),
    /// Not a host with or without a port.
    #[error("invalid consul address {0:?}")]
    Authority(String),
    /// The file of `CONSUL_HTTP_TOKEN_FILE` cannot be read.
    #[error("read CONSUL_HTTP_TOKEN_FILE {}", path.display())]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A token that is no header value.
    #[error("the consul token has characters that no token can have")]
    Token,
}

/// Something that must not be shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The secret itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Where Consul answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// `http` or `https`.
    pub scheme: &'static str,
    /// Host and port.
    pub authority: String,
    /// The prefix of all keys, without slashes at its ends; empty for none.
    pub prefix: String,
    /// The ACL token.
    pub token: Option<Secret>,
    /// `USER:PASSWORD` for basic authentication.
    pub login: Option<Secret>,
    /// The namespace (Consul Enterprise).
    pub namespace: Option<String>,
    /// Files in PEM.
    pub certificates: Certificates,
}

/// The files in PEM that a TLS connection needs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Certificates {
    /// Whom to trust; none for what the machine trusts.
    pub roots: Option<PathBuf>,
    /// Who we are, and our key.
    pub client: Option<Identity>,
}

/// The parts of a URL.
#[derive(Default)]
struct Url<'a> {
    scheme: &'a str,
    password: &'a str,
    authority: &'a str,
    path: &'a str,
}

impl Url<'_> {
    /// Takes `text` apart. A text without `://` is an authority only.
    fn parse(text: &str) -> Url<'_> {
        let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
        let rest = rest.split(['?', '#']).next().unwrap_or_default();
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (login, authority) = authority.rsplit_once('@').unwrap_or(("", authority));
        let password = login.split_once(':').map_or("", |(_, password)| password);
        Url { scheme, password, authority, path }
    }
}

impl Address {
    /// The address that `url` and the variables give.
    ///
    /// # Errors
    /// A scheme, a host or a token that cannot be one; an unreadable token file.
    pub fn new(url: &str, variable: impl Fn(&str) -> Option<String>) -> Result<Address, Error> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let url = Url::parse(url);
        let fallback = set("CONSUL_HTTP_ADDR").unwrap_or_default();
        let fallback = Url::parse(&fallback);
        let authority = [url.authority, fallback.authority, DEFAULT_AUTHORITY];
        let authority = authority.into_iter().find(|text| !text.is_empty()).unwrap_or_default();
        let by_variable = match set("CONSUL_HTTP_SSL").as_deref() {
            Some("1" | "t" | "T" | "true" | "TRUE" | "True") => "https",
            _ => "http",
        };
        // The scheme belongs to the host that was chosen.
        let scheme = if url.authority.is_empty() { fallback.scheme } else { "" };
        let scheme = [url.scheme, scheme, by_variable].into_iter().find(|text| !text.is_empty());
        let token = token(&percent_decode(url.password), &set)?;
        Ok(Address {
            scheme: match scheme {
                Some("http") => "http",
                Some("https") => "https",
                other => return Err(Error::Scheme(other.unwrap_or_default().to_owned())),
            },
            authority: checked_authority(authority)?,
            prefix: clean(&percent_decode(url.path)),
            token,
            login: set("CONSUL_HTTP_AUTH").map(Secret),
            namespace: set("CONSUL_NAMESPACE"),
            certificates: Certificates {
                roots: set("CONSUL_CACERT").map(PathBuf::from),
                client: set("CONSUL_CLIENT_CERT").zip(set("CONSUL_CLIENT_KEY")).map(
                    |(certificate, key)| Identity {
                        certificate: certificate.into(),
                        key: key.into(),
                    },
                ),
            },
        })
    }
}

impl fmt::Display for Address {
    /// The URL without its token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme, self.authority)?;
        if self.prefix.is_empty() { Ok(()) } else { write!(f, "/{}", self.prefix) }
    }
}

fn token(
    in_url: &str,
    variable: &impl Fn(&str) -> Option<String>,
) -> Result<Option<Secret>, Error> {
    let in_file = match variable("CONSUL_HTTP_TOKEN_FILE") {
        Some(path) => {
            let text = fs::read_to_string(&path)
                .map_err(|source| Error::TokenFile { path: path.into(), source })?;
            text.trim().to_owned()
        }
        None => String::new(),
    };
    let in_variable = variable("CONSUL_HTTP_TOKEN").unwrap_or_default();
    let token = [in_file, in_url.to_owned(), in_variable].into_iter().find(|text| !text.is_empty());
    match token {
        Some(token) if token.bytes().any(|byte| !byte.is_ascii_graphic()) => Err(Error::Token),
        token => Ok(token.map(Secret)),
    }
}

fn checked_authority(text: &str) -> Result<String, Error> {
    let host = text.rsplit_once(':').map_or(text, |(host, _)| host);
    let parsed = text.parse::<hyper::http::uri::Authority>();
    match parsed {
        Ok(_) if !host.is_empty() => Ok(text.to_owned()),
        _ => Err(Error::Authority(text.to_owned())),
    }
}

/// A key with doubled slashes made one and none at its ends.
pub fn clean(key: &str) -> String {
    let parts: Vec<&str> = key.split('/').filter(|part| !part.is_empty()).collect();
    parts.join("/")
}

fn percent_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = match tail {
            [high, low, ..] if *first == b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                digit(*high).zip(digit(*low)).map(|(high, low)| (high << 4 | low) as u8)
            }
            _ => None,
        };
        bytes.push(escaped.unwrap_or(*first));
        rest = &rest[if escaped.is_some() { 3 } else { 1 }..];
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn address(url: &str, variables: &[(&str, &str)]) -> Result<Address, Error> {
        let variables: BTreeMap<_, _> = variables.iter().copied().collect();
        Address::new(url, |name| variables.get(name).map(|value| value.to_string()))
    }

    #[track_caller]
    fn check(url: &str, variables: &[(&str, &str)], expected: &str) {
        let address = address(url, variables).unwrap();
        let token = address.token.as_ref().map_or("", Secret::reveal);
        assert_eq!(format!("{address} {token}"), expected, "{url}");
    }

    #[test]
    fn a_url_says_where_and_with_which_token() {
        check("http://consul:8500", &[], "http://consul:8500 ");
        check("https://:abc-1@host/my/prefix/", &[], "https://host/my/prefix abc-1");
        check("http://user:a%40b@[::1]:8500/a//b", &[], "http://[::1]:8500/a/b a@b");
    }

    #[test]
    fn what_the_url_leaves_open_comes_from_the_environment() {
        check("", &[], "http://127.0.0.1:8500 ");
        let host = ("CONSUL_HTTP_ADDR", "elsewhere:1");
        check("", &[host, ("CONSUL_HTTP_SSL", "true")], "https://elsewhere:1 ");
        check("", &[("CONSUL_HTTP_ADDR", "https://elsewhere:1")], "https://elsewhere:1 ");
        check("http://here", &[("CONSUL_HTTP_ADDR", "https://elsewhere:1")], "http://here ");
        let token = ("CONSUL_HTTP_TOKEN", "env");
        check("http://here", &[token], "http://here env");
        check("http://:url@here", &[token], "http://here url");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        crate::os::write_atomic("test", &path, b"file\n").unwrap();
        let file = ("CONSUL_HTTP_TOKEN_FILE", path.to_str().unwrap());
        check("http://:url@here", &[token, file], "http://here file");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        assert!(matches!(address("ftp://x", &[]), Err(Error::Scheme(_))));
        assert!(matches!(address("http://a b", &[]), Err(Error::Authority(_))));
        assert!(matches!(address("http://:1", &[]), Err(Error::Authority(_))));
        assert!(matches!(address("http://:a%0Ab@x", &[]), Err(Error::Token)));
        let missing = ("CONSUL_HTTP_TOKEN_FILE", "/nowhere/token");
        assert!(matches!(address("http://x", &[missing]), Err(Error::TokenFile { .. })));
    }

    #[test]
    fn a_secret_is_not_shown() {
        let address = address("http://:hidden@x", &[("CONSUL_HTTP_AUTH", "u:hidden")]).unwrap();
        assert!(!format!("{address} {address:?}").contains("hidden"));
    }
}
