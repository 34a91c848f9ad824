//! What protects the calls between the nodes of a cluster: a token that they share, and TLS.
//!
//! ```text
//! Authorization: Bearer TOKEN          nodes, the command line, Prometheus
//! Authorization: Basic NAME:TOKEN      a browser, which asks a person for it; the name is free
//! ```
//!
//! TLS follows the scheme of a URL; a listener tells it from the first byte of a connection, which is
//! that of a TLS handshake record (RFC 8446, section 5.1) or that of a method's name. Invariants: with a
//! token nothing is answered without it, and with TLS nothing in the clear, unless both kinds of caller
//! are let in (`http.allow-insecure`, for the time of a change-over); the token appears in no log.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, sink};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::url::{Scheme, Url};
use super::wire::Wire;
use crate::config::{Http, HttpTls};
use crate::limits;
use crate::tls::{self, Trust};

/// The first byte of a TLS connection: a handshake record.
const TLS_HANDSHAKE: u8 = 22;

/// What a caller gets who speaks HTTP/1.1 where only TLS is spoken.
const TLS_ONLY: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\n\
      connection: close\r\n\r\nthis node answers https:// only\n";

/// What is spoken over TLS (RFC 7301), the best first.
type Protocols = &'static [&'static [u8]];
const API: Protocols = &[b"h2", b"http/1.1"];
const PROXY: Protocols = &[b"http/1.1"];

/// The token and the certificates of a cluster; none by default.
#[derive(Clone)]
pub struct Security {
    token: Option<Token>,
    allow_insecure: bool,
    protocols: Protocols,
    /// None: this node answers in the clear.
    server: Option<Arc<ServerConfig>>,
    /// None: set up when an `https://` is called.
    client: Option<Arc<ClientConfig>>,
}

/// The token, and how it is sent.
#[derive(Clone)]
struct Token {
    text: Arc<str>,
    header: HeaderValue,
}

/// Why there is no security as configured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A token that cannot stand in a header.
    #[error("http.auth-token must be printable ASCII")]
    Token,
    /// Certificates that cannot be used.
    #[error("http.tls")]
    Tls(#[from] tls::Error),
}

impl Security {
    /// What a configuration asks for. Blocking: reads certificates.
    pub fn new(config: &Http) -> Result<Security, Error> {
        let (server, client) = match config.tls.identity() {
            None => (None, None),
            Some(identity) => {
                let HttpTls { ca, verify_client, .. } = &config.tls;
                let server = tls::server(&identity, verify_client.then_some(ca))?;
                let client = tls::client(Trust::File(ca), Some(&identity))?;
                (Some(Arc::new(server)), Some(Arc::new(client)))
            }
        };
        let token = match config.auth_token.as_str() {
            "" => None,
            text => Some(Token::new(text).ok_or(Error::Token)?),
        };
        let security = Security { token, server, client, ..Security::default() };
        Ok(Security { allow_insecure: config.allow_insecure, ..security.speaking(API) })
    }

    /// The same certificates for the proxy, which is open to everybody in the clear as well.
    pub(super) fn for_proxy(&self) -> Security {
        Security { token: None, allow_insecure: true, ..self.clone().speaking(PROXY) }
    }

    fn speaking(mut self, protocols: Protocols) -> Security {
        if let Some(server) = &mut self.server {
            Arc::make_mut(server).alpn_protocols = listed(protocols);
        }
        if let Some(client) = &mut self.client {
            Arc::make_mut(client).alpn_protocols = listed(protocols);
        }
        Security { protocols, ..self }
    }

    /// Whether this node answers TLS.
    pub fn has_tls(&self) -> bool {
        self.server.is_some()
    }

    /// Puts the token on a request to a node.
    pub(super) fn sign(&self, headers: &mut HeaderMap) {
        if let Some(token) = &self.token {
            headers.insert(AUTHORIZATION, token.header.clone());
        }
    }

    /// Whether a request may be answered.
    pub(super) fn admits(&self, headers: &HeaderMap) -> bool {
        match &self.token {
            Some(token) if !self.allow_insecure => token.is_in(headers),
            _ => true,
        }
    }

    /// The connection of a caller, after the handshake if there is one.
    pub(super) async fn accept(&self, socket: TcpStream) -> io::Result<Wire> {
        let Some(config) = &self.server else { return Ok(Wire::Tcp(socket)) };
        within(limits::REQUEST_WAIT, async {
            match first_byte(&socket).await? {
                TLS_HANDSHAKE => {
                    let stream = TlsAcceptor::from(config.clone()).accept(socket).await?;
                    Ok(Wire::Tls(Box::new(stream.into())))
                }
                _ if self.allow_insecure => Ok(Wire::Tcp(socket)),
                _ => refuse(socket).await,
            }
        })
        .await
    }

    /// A connection to the server of a URL, after the handshake if there is one.
    pub(super) async fn dial(&self, url: &Url, socket: TcpStream) -> io::Result<Wire> {
        if url.scheme == Scheme::Http {
            return Ok(Wire::Tcp(socket));
        }
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidInput, error);
        let name = ServerName::try_from(url.host.clone()).map_err(invalid)?;
        let config = match &self.client {
            Some(config) => config.clone(),
            None => {
                let mut config = tls::client(Trust::Machine, None).map_err(io::Error::other)?;
                config.alpn_protocols = listed(self.protocols);
                Arc::new(config)
            }
        };
        within(limits::CONNECT_WAIT, async {
            let stream = TlsConnector::from(config).connect(name, socket).await?;
            Ok(Wire::Tls(Box::new(stream.into())))
        })
        .await
    }
}

impl std::fmt::Debug for Security {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Security { token, server, allow_insecure, .. } = self;
        f.debug_struct("Security")
            .field("token", &token.is_some())
            .field("tls", &server.is_some())
            .field("allow_insecure", allow_insecure)
            .finish_non_exhaustive()
    }
}

impl Default for Security {
    /// No token, and everything in the clear.
    fn default() -> Self {
        Security { token: None, allow_insecure: false, protocols: API, server: None, client: None }
    }
}

impl Token {
    fn new(text: &str) -> Option<Token> {
        let mut header = HeaderValue::from_str(&format!("Bearer {text}")).ok()?;
        header.set_sensitive(true);
        header.to_str().ok()?;
        Some(Token { text: text.into(), header })
    }

    fn is_in(&self, headers: &HeaderMap) -> bool {
        let value = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let (scheme, credentials) =
            value.and_then(|value| value.split_once(' ')).unwrap_or_default();
        if scheme.eq_ignore_ascii_case("bearer") {
            return self.is(credentials.trim().as_bytes());
        }
        if scheme.eq_ignore_ascii_case("basic") {
            let decoded = BASE64.decode(credentials.trim()).unwrap_or_default();
            let password = decoded.iter().position(|byte| *byte == b':');
            return password.is_some_and(|colon| self.is(&decoded[colon + 1..]));
        }
        false
    }

    /// Compares in a time that does not tell how much of it is right.
    fn is(&self, shown: &[u8]) -> bool {
        let own = self.text.as_bytes();
        let differences = own.iter().zip(shown).fold(0, |found, (a, b)| found | (a ^ b));
        own.len() == shown.len() && std::hint::black_box(differences) == 0
    }
}

/// The first byte of a connection, which stays in it.
async fn first_byte(socket: &TcpStream) -> io::Result<u8> {
    let mut byte = [0];
    match socket.peek(&mut byte).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(byte[0]),
    }
}

async fn refuse(mut socket: TcpStream) -> io::Result<Wire> {
    socket.write_all(TLS_ONLY).await?;
    socket.shutdown().await?;
    // What is left unread would reset the connection, and the answer with it.
    tokio::io::copy(&mut socket.take(u64::from(limits::HEAD_BYTES_MAX)), &mut sink()).await?;
    Err(io::Error::new(io::ErrorKind::ConnectionRefused, "not TLS"))
}

async fn within<T>(wait: Duration, step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(wait, step).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

fn listed(protocols: Protocols) -> Vec<Vec<u8>> {
    protocols.iter().map(|protocol| protocol.to_vec()).collect()
}
