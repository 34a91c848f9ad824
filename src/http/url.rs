//! The URL of a server: of it only scheme, host and port count.

use std::net::Ipv6Addr;
use std::str::FromStr as _;

/// Why a text is no URL of a server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither `http://` nor `https://`.
    #[error("invalid URL scheme")]
    Scheme,
    /// A URL without a host.
    #[error("URL host required")]
    Host,
    /// A URL with brackets or colons that are not around and in an IPv6 address.
    #[error("invalid URL host")]
    Name,
    /// A URL with something else than a port after the host.
    #[error("invalid URL port")]
    Port,
}

/// Whether a server is spoken to in the clear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// `http://`
    Http,
    /// `https://`
    Https,
}

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    /// In the clear or not.
    pub scheme: Scheme,
    /// Name or address, without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl Scheme {
    /// As in a URL.
    pub fn as_str(self) -> &'static str {
        match self {
            Scheme::Http => "http",
            Scheme::Https => "https",
        }
    }
}

impl Url {
    /// The server of a URL such as `http://10.0.0.1:20202`.
    pub fn new(url: &str) -> Result<Url, Error> {
        let (scheme, default_port, rest) = match url.split_once("://") {
            Some(("http", rest)) => (Scheme::Http, 80, rest),
            Some(("https", rest)) => (Scheme::Https, 443, rest),
            _ => return Err(Error::Scheme),
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        let (host, port) = split_port(authority);
        if host.is_empty() {
            return Err(Error::Host);
        }
        if !is_host(host) {
            return Err(Error::Name);
        }
        let port = match port {
            None | Some("") => default_port,
            Some(port) => u16::from_str(port).map_err(|_| Error::Port)?,
        };
        Ok(Url { scheme, host: host.to_owned(), port })
    }

    /// Host and port.
    pub fn address(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }
}

impl std::fmt::Display for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), self.address())
    }
}

/// Whether it is a name, or an address, perhaps with a zone.
fn is_host(host: &str) -> bool {
    let address = host.split('%').next().unwrap_or_default();
    !host.contains(['[', ']']) && (!host.contains(':') || address.parse::<Ipv6Addr>().is_ok())
}

/// Host and port of `HOST:PORT`, `[V6]:PORT`, or either without a port.
fn split_port(authority: &str) -> (&str, Option<&str>) {
    if let Some((host, rest)) = authority.strip_prefix('[').and_then(|v6| v6.split_once(']'))
        && (rest.is_empty() || rest.starts_with(':'))
    {
        return (host, rest.strip_prefix(':'));
    }
    match authority.rsplit_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (authority, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(url: &str, expected: Result<&str, &str>) {
        let found = Url::new(url).map(|url| url.to_string()).map_err(|error| error.to_string());
        assert_eq!(found, expected.map(str::to_owned).map_err(str::to_owned), "{url}");
    }

    #[test]
    fn a_url_is_reduced_to_its_server() {
        check("http://10.0.0.1:20202", Ok("http://10.0.0.1:20202"));
        check("http://node:20202/path?query#part", Ok("http://node:20202"));
        check("https://user:password@node", Ok("https://node:443"));
        check("http://node", Ok("http://node:80"));
        check("http://[::1]:20202/", Ok("http://[::1]:20202"));
        check("http://[::1]", Ok("http://[::1]:80"));
        check("http://[fe80::1%eth0]:20202", Ok("http://[fe80::1%eth0]:20202"));
    }

    #[test]
    fn a_url_without_a_server_is_refused() {
        check("", Err("invalid URL scheme"));
        check("localhost:20202", Err("invalid URL scheme"));
        check("ftp://node", Err("invalid URL scheme"));
        check("http://", Err("URL host required"));
        check("http://:20202", Err("URL host required"));
        check("http://[::1", Err("invalid URL host"));
        check("http://[::1]x:20202", Err("invalid URL host"));
        check("http://node]:8500", Err("invalid URL host"));
        check("http://one:two:8500", Err("invalid URL host"));
        check("http://node:port", Err("invalid URL port"));
        check("http://node:70000", Err("invalid URL port"));
    }
}
