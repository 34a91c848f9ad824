//! The calls to a server that keeps backups as LiteFS Cloud did.
//!
//! ```text
//! GET  /pos                    {"app.db":{"TXID":"...","PostApplyChecksum":"..."}}
//! POST /db/tx?db=NAME          an LTX file; answered with the header Litefs-Hwm
//! GET  /db/snapshot?db=NAME    an LTX snapshot
//! ```
//!
//! HTTP/1.1, with TLS for `https`; connections are kept. Invariants: each wait has a limit; an answer but
//! for a snapshot is bounded by [`limits::DOCUMENT_BYTES_MAX`]; no error and no log line shows the token.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::Mutex;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use ltx::{Pos, Txid};
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::Written;
use crate::engine::backup::Upload;
use crate::engine::{DbName, Receiver};
use crate::http::body::{self, Body};
use crate::http::client::{encode_query, upload as send};
use crate::http::report::HaltPos;
use crate::http::url::{self, Scheme, Url};
use crate::http::{CLUSTER_ID, client};
use crate::limits;
use crate::tls::{self, Trust};

/// The answer's header with the high-water mark.
const HWM: HeaderName = HeaderName::from_static("litefs-hwm");
/// The instance that answered, and the one that is to answer.
const INSTANCE: HeaderName = HeaderName::from_static("lfsc-instance-id");
const FORCE_INSTANCE: HeaderName = HeaderName::from_static("fly-force-instance-id");
/// The error of a file that does not go on from where the backup stands.
const POSITION_MISMATCH: &str = "EPOSMISMATCH";
/// So much of what a server says is shown.
const TEXT_CHARS_MAX: usize = 300;

#[cfg(any(test, fuzzing))]
pub(crate) mod properties;

/// Why a call failed, or why there can be none.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URL is none.
    #[error(transparent)]
    Url(#[from] url::Error),
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] tls::Error),
    /// The token is no header value.
    #[error("backup.auth-token must be printable ASCII")]
    Token,
    /// No connection, or it broke.
    #[error("{what} {url}")]
    Unreachable {
        /// What was being done.
        what: &'static str,
        /// The server.
        url: Url,
        /// Why.
        source: Cause,
    },
    /// No answer in time.
    #[error("no answer from {url} within {} s ({what})", wait.as_secs())]
    Silence {
        /// What was being done.
        what: &'static str,
        /// The server.
        url: Url,
        /// For how long.
        wait: Duration,
    },
    /// An answer that says no.
    #[error("{url} refused to {what}: {code} {text}")]
    Refused {
        /// What was being done.
        what: &'static str,
        /// The server.
        url: Url,
        /// The status code.
        code: u16,
        /// What it said.
        text: String,
    },
    /// An answer that is not what it should be.
    #[error("{url} gave an answer that makes no sense ({what}): {text}")]
    Answer {
        /// What was being done.
        what: &'static str,
        /// The server.
        url: Url,
        /// What is wrong.
        text: String,
    },
    /// The file could not be read, or the snapshot not be stored.
    #[error("spool for backup")]
    Spool(#[source] std::io::Error),
    /// The file could not be read.
    #[error(transparent)]
    Upload(#[from] client::Error),
    /// A thread died.
    #[error("backup thread failed")]
    Thread(#[from] tokio::task::JoinError),
}

/// Why something below a call failed.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Which server, and as whom.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its URL, of which scheme, host and port count.
    pub url: String,
    /// The name of the cluster there; empty for none.
    pub cluster: String,
    /// The value of `Authorization`; empty for none.
    pub auth_token: String,
}

/// The id of this node's cluster, once it has one.
pub type ClusterIdOf = Box<dyn Fn() -> Option<String> + Send + Sync>;

/// A server.
pub struct Cloud {
    url: Url,
    cluster: String,
    headers: HeaderMap,
    cluster_id: ClusterIdOf,
    /// The instance that answered last.
    instance: Mutex<Option<HeaderValue>>,
    pool: Pool<HttpsConnector<HttpConnector>, Body>,
}

impl Cloud {
    /// A client; no call is made.
    ///
    /// # Errors
    /// The URL or the token is none, or TLS cannot be set up.
    pub fn new(options: &Options, cluster_id: ClusterIdOf) -> Result<Cloud, Error> {
        let url = Url::new(&options.url)?;
        let trust = if url.scheme == Scheme::Https { Trust::Machine } else { Trust::Nobody };
        let config = tls::client(trust, None)?;
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_connect_timeout(Some(limits::CONNECT_WAIT));
        let connector = HttpsConnectorBuilder::new().with_tls_config(config).https_or_http();
        let connector = connector.enable_http1().wrap_connector(http);
        let mut builder = Pool::builder(TokioExecutor::new());
        builder.pool_timer(TokioTimer::new()).pool_idle_timeout(limits::CONSUL_IDLE);
        let mut headers = HeaderMap::new();
        if !options.auth_token.is_empty() {
            let mut token: HeaderValue = options.auth_token.parse().map_err(|_| Error::Token)?;
            token.set_sensitive(true);
            headers.insert(AUTHORIZATION, token);
        }
        Ok(Cloud {
            url,
            cluster: options.cluster.clone(),
            headers,
            cluster_id,
            instance: Mutex::default(),
            pool: builder.build(connector),
        })
    }

    /// Where it is.
    pub fn url(&self) -> &Url {
        &self.url
    }

    pub(super) async fn positions(&self) -> Result<BTreeMap<String, Pos>, Error> {
        let what = "ask for positions of";
        let request = self.request(Method::GET, "/pos", None, body::empty());
        let answer = self.expect_ok(what, self.call(what, request).await?).await?;
        let text = self.collect(what, answer).await?;
        positions_in(&text).map_err(|error| self.nonsense(what, &error))
    }

    pub(super) async fn write(&self, name: &DbName, upload: Upload) -> Result<Written, Error> {
        let what = "send transactions to";
        let (sender, body) = body::channel();
        let request = self.request(Method::POST, "/db/tx", Some(name), body);
        let mut file = tokio::fs::File::from_std(upload.file);
        file.rewind().await.map_err(Error::Spool)?;
        let answer = self.pool.request(request);
        let sent = send(file.take(upload.len), sender);
        tokio::pin!(answer, sent);
        let answer = tokio::select! {
            // What is refused is answered before its end.
            answer = &mut answer => answer,
            sent = &mut sent => {
                sent?;
                self.within(what, limits::BACKUP_ANSWER_WAIT, &mut answer).await?
            }
        };
        let answer = answer.map_err(|error| self.unreachable(what, error))?;
        self.note_instance(&answer);
        if answer.status().is_success() {
            let hwm = answer.headers().get(HWM).and_then(|hwm| hwm.to_str().ok());
            let hwm: Option<Txid> = hwm.and_then(|hwm| hwm.parse().ok());
            let hwm = hwm.ok_or_else(|| self.nonsense(what, &"it has no header Litefs-Hwm"))?;
            return Ok(Written::Taken { hwm });
        }
        match self.refusal(what, answer).await {
            Refusal::Mismatch(pos) => Ok(Written::Mismatch(pos)),
            Refusal::Other(error) => Err(error),
        }
    }

    /// Writes the snapshot of a database to `receiver`.
    pub(super) async fn snapshot(
        &self,
        name: &DbName,
        mut receiver: Receiver,
    ) -> Result<Receiver, Error> {
        let what = "fetch snapshot from";
        let request = self.request(Method::GET, "/db/snapshot", Some(name), body::empty());
        let answer = self.expect_ok(what, self.call(what, request).await?).await?;
        let mut body = answer.into_body();
        let mut block = BytesMut::new();
        loop {
            let frame = self.within(what, limits::BODY_STALL_WAIT, body.frame()).await?;
            let frame = frame.transpose().map_err(|error| self.unreachable(what, error))?;
            let is_end = frame.is_none();
            if let Some(Ok(data)) = frame.map(|frame| frame.into_data()) {
                block.extend_from_slice(&data);
            }
            if is_end || block.len() >= limits::BODY_PIECE_BYTES {
                let data = block.split();
                let write = move || receiver.write_all(&data).map(|()| receiver);
                receiver = spawn_blocking(write).await?.map_err(Error::Spool)?;
            }
            if is_end {
                return Ok(receiver);
            }
        }
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        db: Option<&DbName>,
        body: Body,
    ) -> Request<Body> {
        let mut query = Vec::new();
        query.extend(db.map(|db| format!("db={}", encode_query(db.as_str()))));
        if !self.cluster.is_empty() {
            query.push(format!("cluster={}", encode_query(&self.cluster)));
        }
        let mark = if query.is_empty() { "" } else { "?" };
        let mut request = Request::new(body);
        *request.method_mut() = method;
        let uri = format!("{}{path}{mark}{}", self.url, query.join("&"));
        // A host that is none fails in the call, with the URL in the error.
        *request.uri_mut() = uri.parse().unwrap_or_default();
        *request.headers_mut() = self.headers.clone();
        let id = (self.cluster_id)().and_then(|id| HeaderValue::from_str(&id).ok());
        if let Some(id) = id {
            request.headers_mut().insert(CLUSTER_ID, id);
        }
        if let Some(instance) = self.instance.lock().unwrap().clone() {
            request.headers_mut().insert(FORCE_INSTANCE, instance);
        }
        request
    }

    async fn call(
        &self,
        what: &'static str,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, Error> {
        let call = self.pool.request(request);
        let answer = self.within(what, limits::BACKUP_ANSWER_WAIT, call).await?;
        let answer = answer.map_err(|error| self.unreachable(what, error))?;
        self.note_instance(&answer);
        Ok(answer)
    }

    fn note_instance(&self, answer: &Response<Incoming>) {
        let mut instance = self.instance.lock().unwrap();
        if answer.status() == StatusCode::SERVICE_UNAVAILABLE {
            *instance = None;
        } else if let Some(said) = answer.headers().get(INSTANCE) {
            *instance = Some(said.clone());
        }
    }

    async fn expect_ok(
        &self,
        what: &'static str,
        answer: Response<Incoming>,
    ) -> Result<Response<Incoming>, Error> {
        if answer.status().is_success() {
            return Ok(answer);
        }
        match self.refusal(what, answer).await {
            Refusal::Other(error) => Err(error),
            Refusal::Mismatch(pos) => Err(self.nonsense(what, &format!("it stands at {pos}"))),
        }
    }

    async fn refusal(&self, what: &'static str, answer: Response<Incoming>) -> Refusal {
        let code = answer.status().as_u16();
        // The status counts, whatever comes of the text.
        let body = self.collect(what, answer).await.unwrap_or_default();
        match said_in(&body) {
            Said::Mismatch(pos) => Refusal::Mismatch(pos),
            Said::NoPosition => Refusal::Other(self.nonsense(what, &"its position is none")),
            Said::Text(text) => {
                Refusal::Other(Error::Refused { what, url: self.url.clone(), code, text })
            }
        }
    }

    async fn collect(
        &self,
        what: &'static str,
        answer: Response<Incoming>,
    ) -> Result<Bytes, Error> {
        let body = Limited::new(answer.into_body(), limits::DOCUMENT_BYTES_MAX).collect();
        let body = self.within(what, limits::BACKUP_ANSWER_WAIT, body).await?;
        Ok(body.map_err(|error| self.unreachable(what, error))?.to_bytes())
    }

    async fn within<T>(
        &self,
        what: &'static str,
        wait: Duration,
        call: impl Future<Output = T>,
    ) -> Result<T, Error> {
        let url = || self.url.clone();
        timeout(wait, call).await.map_err(|_| Error::Silence { what, url: url(), wait })
    }

    fn unreachable(&self, what: &'static str, source: impl Into<Cause>) -> Error {
        Error::Unreachable { what, url: self.url.clone(), source: source.into() }
    }

    fn nonsense(&self, what: &'static str, text: &dyn std::fmt::Display) -> Error {
        Error::Answer { what, url: self.url.clone(), text: text.to_string() }
    }
}

/// What a server says that does not do what it was asked.
enum Refusal {
    /// The backup stands elsewhere.
    Mismatch(Pos),
    Other(Error),
}

/// The text of a refusal.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    /// The backup stands there.
    Mismatch(Pos),
    /// The backup stands elsewhere, at what is no position.
    NoPosition,
    /// Something else, in one line.
    Text(String),
}

/// What the text of a refusal says.
fn said_in(text: &[u8]) -> Said {
    #[derive(Deserialize)]
    struct Document {
        #[serde(default)]
        code: String,
        #[serde(default)]
        error: String,
        pos: Option<HaltPos>,
    }
    let said: Option<Document> = serde_json::from_slice(text).ok();
    let text = match said {
        Some(Document { code, pos, .. }) if code == POSITION_MISMATCH => {
            let pos = pos.map_or(Some(Pos::ZERO), |pos| pos.pos());
            return pos.map_or(Said::NoPosition, Said::Mismatch);
        }
        Some(said) => format!("{} {}", said.code, said.error),
        None => String::from_utf8_lossy(text).into_owned(),
    };
    Said::Text(text.lines().next().unwrap_or_default().chars().take(TEXT_CHARS_MAX).collect())
}

/// The positions in a document; in words, why there are none.
fn positions_in(text: &[u8]) -> Result<BTreeMap<String, Pos>, String> {
    let raw: BTreeMap<String, Option<HaltPos>> =
        serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let pos = |(name, pos): (String, Option<HaltPos>)| {
        let pos = pos.map_or(Some(Pos::ZERO), |pos| pos.pos());
        Some((name, pos?))
    };
    let positions: Option<BTreeMap<_, _>> = raw.into_iter().map(pos).collect();
    positions.ok_or_else(|| "a position is none".to_owned())
}
