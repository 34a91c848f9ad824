//! Calls to the API of another node, or of this one from the command line.
//!
//! Always HTTP/2, in the clear with prior knowledge, one connection a call. What protects the calls
//! is [`Security`]'s.
//!
//! Invariants: no wait without a limit (connect, headers, silence), but for the answer to an export or an
//! import, which a node may work on for long: there pings find a dead host; a body is read no faster
//! than its reader takes it, within the HTTP/2 window.

use std::io::{self, Write};
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use ltx::{NodeId, Pos};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncSeekExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::body::{self, Body};
use super::frame::{self, Decoder, Event};
use super::query::decode_path;
use super::report::{HaltLock, Info, Status};
use super::security::Security;
use super::url::{self, Url};
use super::{
    CANDIDATE, CLUSTER_ID, CONTRADICTED, HOSTNAME, NODE_ID, OVERLAP, OVERLAP_ACCEPTED, PROXY_URL,
    TERM,
};
use crate::cluster::election::Force;
use crate::cluster::node::Candidacy;
use crate::cluster::peers::Identity;
use crate::engine::LtxBytes;
use crate::limits;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No URL of a server.
    #[error(transparent)]
    Url(#[from] url::Error),
    /// No connection.
    #[error("connect to {address}")]
    Connect {
        /// Host and port.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The peer took too long.
    #[error("no answer from {address} within {} s ({what})", .wait.as_secs())]
    Silence {
        /// Host and port.
        address: String,
        /// What was waited for.
        what: &'static str,
        /// For how long.
        wait: Duration,
    },
    /// The connection broke, or is not HTTP/2.
    #[error("{what} {address}")]
    Http {
        /// What was being done.
        what: &'static str,
        /// Host and port.
        address: String,
        /// Why.
        source: hyper::Error,
    },
    /// An answer that is not 200.
    #[error("invalid response: code={code}{}", detail(.text))]
    Response {
        /// The status code.
        code: u16,
        /// The first line of the answer.
        text: String,
    },
    /// The node does not have the database.
    #[error("database not found")]
    DatabaseNotFound,
    /// An answer larger than [`limits::DOCUMENT_BYTES_MAX`].
    #[error("answer of {address} is too large")]
    TooLarge {
        /// Host and port.
        address: String,
    },
    /// An answer that is not the JSON it should be.
    #[error("decode answer of {address}")]
    Decode {
        /// Host and port.
        address: String,
        /// Why.
        source: serde_json::Error,
    },
    /// A stream that breaks the protocol.
    #[error("read stream of {address}")]
    Frame {
        /// Host and port.
        address: String,
        /// Why.
        source: frame::Error,
    },
    /// A stream of events that ended.
    #[error("events of {address} have ended")]
    Ended {
        /// Host and port.
        address: String,
    },
    /// What was to be sent could not be read.
    #[error("read upload")]
    ReadUpload(#[source] io::Error),
    /// What was received could not be written.
    #[error("write download")]
    WriteDownload(#[source] io::Error),
}

fn detail(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

/// A node whose API can be called.
#[derive(Clone)]
pub struct Client {
    url: Url,
    security: Security,
}

/// What a replica asks for.
#[derive(Debug)]
pub struct StreamRequest<'a> {
    /// The replica.
    pub identity: &'a Identity,
    /// Where each of its databases stands.
    pub positions: &'a [(&'a str, Pos)],
    /// Only these databases; empty for all.
    pub filter: &'a [String],
}

/// What a HALT call is about.
#[derive(Debug, Clone, Copy)]
pub struct HaltCall<'a> {
    /// The database.
    pub db: &'a str,
    /// Which lock.
    pub id: i64,
    /// Who asks.
    pub node_id: NodeId,
}

impl HaltCall<'_> {
    fn path(&self, route: &str, id: &str) -> String {
        format!("{route}?name={}&{id}={}", encode_query(self.db), self.id)
    }
}

/// The way of forwarded transactions to a primary: one connection for one after the other.
pub struct Forwarding {
    client: Client,
    /// The open connection, if there is one.
    connection: Mutex<Option<Arc<Connection>>>,
}

impl Forwarding {
    /// To that node; nothing is connected yet.
    pub fn new(client: Client) -> Forwarding {
        Forwarding { client, connection: Mutex::default() }
    }

    /// `POST /tx`: sends an LTX file that leads to `pos`; returns when the primary has it. An error
    /// without a response leaves open whether it has. The caller limits the wait.
    pub async fn send(&self, call: HaltCall<'_>, pos: Pos, ltx: &LtxBytes) -> Result<(), Error> {
        let open = self.connection.lock().unwrap().take();
        let connection = match open {
            Some(connection) => connection,
            None => Arc::new(self.client.connect().await?),
        };
        let path = format!("{}&pos={pos}", call.path("/tx", "lockID"));
        self.send_on(&connection, &path, call.node_id, ltx).await?;
        *self.connection.lock().unwrap() = Some(connection);
        Ok(())
    }

    async fn send_on(
        &self,
        connection: &Arc<Connection>,
        path: &str,
        node_id: NodeId,
        ltx: &LtxBytes,
    ) -> Result<(), Error> {
        let client = &self.client;
        let (body, file) = match ltx {
            LtxBytes::Memory(bytes) => (body::full(Bytes::from_owner(bytes.clone())), None),
            LtxBytes::File(file, len) => {
                let mut file =
                    tokio::fs::File::from_std(file.try_clone().map_err(Error::ReadUpload)?);
                file.rewind().await.map_err(Error::ReadUpload)?;
                let (sender, body) = body::channel();
                (body, Some(upload(file.take(*len), sender)))
            }
        };
        let request = client.identified(Method::POST, path, node_id, body);
        let answer = connection.sender.clone().send_request(request);
        let answer = match file {
            None => answer.await,
            Some(upload) => {
                let (answer, uploaded) = tokio::join!(answer, upload);
                // One that is there already is taken without its body.
                if answer.is_err() {
                    uploaded?;
                }
                answer
            }
        };
        let response = answer.map_err(|source| client.http_error("send transaction to", source))?;
        client.check(Answer::new(response, connection.clone())).await.map(drop)
    }
}

impl Client {
    /// The node at `url`, such as `http://10.0.0.1:20202`.
    pub fn new(url: &str, security: &Security) -> Result<Client, Error> {
        Ok(Client { url: Url::new(url)?, security: security.clone() })
    }

    /// Host and port, as in the URL.
    pub fn address(&self) -> String {
        self.url.address()
    }

    /// `GET /info`.
    pub async fn info(&self) -> Result<Info, Error> {
        self.document("/info").await
    }

    /// `GET /status`.
    pub async fn status(&self) -> Result<Status, Error> {
        self.document("/status").await
    }

    /// `GET /export`: writes the database file to `out` and returns its length in bytes. Writing
    /// blocks the task: meant for the command line.
    pub async fn export(&self, name: &str, out: &mut dyn Write) -> Result<u64, Error> {
        let path = format!("/export?name={}", encode_query(name));
        // It begins after the exports before it, and after a transaction that is being written.
        let response = self.call_patiently(self.request(Method::GET, &path, body::empty())).await;
        let mut response = response.map_err(|error| match error {
            Error::Response { code: 404, .. } => Error::DatabaseNotFound,
            error => error,
        })?;
        let mut len = 0;
        while let Some(data) = self.next_data(&mut response.body, limits::BODY_STALL_WAIT).await? {
            out.write_all(&data).map_err(Error::WriteDownload)?;
            len += data.len() as u64;
        }
        Ok(len)
    }

    /// `POST /import`: sends `len` bytes of `file`, or all of it, as the database `name`.
    pub async fn import(
        &self,
        name: &str,
        file: impl AsyncRead + Send + Unpin,
        len: Option<u64>,
    ) -> Result<(), Error> {
        let path = format!("/import?name={}", encode_query(name));
        let (sender, body) = body::channel();
        let mut request = self.request(Method::POST, &path, body);
        if let Some(len) = len {
            request.headers_mut().insert(hyper::header::CONTENT_LENGTH, len.into());
        }
        let mut connection = self.connect().await?;
        // The upload is checked by SQLite before it is answered, so only its own progress counts.
        let mut answer = pin!(connection.sender.send_request(request));
        let upload = upload(file.take(len.unwrap_or(u64::MAX)), sender);
        let answer = tokio::select! {
            // What is refused is not read to its end, for which a pipe may let us wait.
            answer = &mut answer => answer,
            uploaded = upload => {
                uploaded?;
                answer.await
            }
        };
        let response = answer.map_err(|source| self.http_error("import to", source))?;
        self.check(Answer::new(response, Arc::new(connection))).await.map(|_| ())
    }

    /// `POST /halt`: asks for a HALT lock, or renews it.
    pub async fn halt(&self, call: HaltCall<'_>) -> Result<HaltLock, Error> {
        let path = call.path("/halt", "id");
        let request = self.identified(Method::POST, &path, call.node_id, body::empty());
        let mut answer = self.call(request).await?;
        let text = self.collect(&mut answer.body).await?;
        serde_json::from_slice(&text)
            .map_err(|source| Error::Decode { address: self.address(), source })
    }

    /// `DELETE /halt`: gives a HALT lock back.
    pub async fn unhalt(&self, call: HaltCall<'_>) -> Result<(), Error> {
        let path = call.path("/halt", "id");
        let request = self.identified(Method::DELETE, &path, call.node_id, body::empty());
        self.call(request).await.map(drop)
    }

    fn identified(&self, method: Method, path: &str, id: NodeId, body: Body) -> Request<Body> {
        let mut request = self.request(method, path, body);
        if let Ok(id) = id.to_string().parse() {
            request.headers_mut().insert(NODE_ID, id);
        }
        request
    }

    /// `POST /promote`: asks the node to become primary.
    pub async fn promote(&self, force: Force) -> Result<(), Error> {
        let path = match force {
            Force::Yes => "/promote?force=true",
            Force::No => "/promote",
        };
        let request = self.request(Method::POST, path, body::empty());
        self.call_within(limits::PROMOTE_WAIT, request).await.map(drop)
    }

    /// `POST /handoff`: asks the primary to hand its lease to the replica of that id.
    pub async fn hand_off(&self, to: NodeId) -> Result<(), Error> {
        let path = format!("/handoff?nodeID={to}");
        let request = self.request(Method::POST, &path, body::empty());
        self.call_within(limits::HANDOFF_ANSWER_WAIT, request).await.map(drop)
    }

    /// `GET /events`, of which only the node's role counts.
    pub async fn roles(&self) -> Result<Roles, Error> {
        let answer = self.call(self.request(Method::GET, "/events", body::empty())).await?;
        Ok(Roles { client: self.clone(), answer, lines: RoleLines::default() })
    }

    /// `POST /stream`.
    pub async fn stream(&self, request: StreamRequest<'_>) -> Result<Stream, Error> {
        let path = match request.filter {
            [] => "/stream".to_owned(),
            names => format!("/stream?filter={}", encode_query(&names.join(","))),
        };
        let positions = frame::encode_positions(request.positions.iter().copied());
        let mut call = self.request(Method::POST, &path, body::full(positions));
        identify(call.headers_mut(), request.identity);
        call.headers_mut().insert(OVERLAP, HeaderValue::from_static(OVERLAP_ACCEPTED));
        let answer = self.call(call).await?;
        Ok(Stream {
            client: self.clone(),
            node_id: answer.node_id,
            cluster_id: answer.cluster_id.clone(),
            proxy_url: answer.proxy_url.clone(),
            term: answer.term,
            contradicted: answer.contradicted.clone(),
            decoder: Decoder::new(),
            is_ready: false,
            answer,
        })
    }

    /// A text, such as `/metrics`.
    pub async fn text(&self, path: &str) -> Result<String, Error> {
        let text = self.get(path).await?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    async fn get(&self, path: &str) -> Result<BytesMut, Error> {
        let mut answer = self.call(self.request(Method::GET, path, body::empty())).await?;
        self.collect(&mut answer.body).await
    }

    async fn document<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        let text = self.get(path).await?;
        serde_json::from_slice(&text)
            .map_err(|source| Error::Decode { address: self.address(), source })
    }

    fn request(&self, method: Method, path: &str, body: Body) -> Request<Body> {
        let mut request = Request::new(body);
        *request.method_mut() = method;
        let uri = format!("{}{path}", self.url);
        // An address that is no URI authority fails in connect(), with the address in the error.
        *request.uri_mut() = uri.parse().unwrap_or_default();
        self.security.sign(request.headers_mut());
        request
    }

    async fn call(&self, request: Request<Body>) -> Result<Answer, Error> {
        self.call_within(limits::RESPONSE_WAIT, request).await
    }

    async fn call_within(&self, wait: Duration, request: Request<Body>) -> Result<Answer, Error> {
        let mut connection = self.connect().await?;
        let response = timeout(wait, connection.sender.send_request(request))
            .await
            .map_err(|_| self.silence("response", wait))?
            .map_err(|source| self.http_error("call", source))?;
        self.check(Answer::new(response, Arc::new(connection))).await
    }

    /// A call that the node may take any time to answer, as long as it answers pings.
    async fn call_patiently(&self, request: Request<Body>) -> Result<Answer, Error> {
        let mut connection = self.connect().await?;
        let response = connection.sender.send_request(request).await;
        let response = response.map_err(|source| self.http_error("call", source))?;
        self.check(Answer::new(response, Arc::new(connection))).await
    }

    async fn check(&self, mut answer: Answer) -> Result<Answer, Error> {
        if answer.status == StatusCode::OK {
            return Ok(answer);
        }
        let body = self.collect(&mut answer.body).await.unwrap_or_default();
        let text = String::from_utf8_lossy(&body);
        let text = text.lines().next().unwrap_or_default().to_owned();
        Err(Error::Response { code: answer.status.as_u16(), text })
    }

    async fn connect(&self) -> Result<Connection, Error> {
        let failed = |source| Error::Connect { address: self.address(), source };
        let connect = TcpStream::connect((self.url.host.as_str(), self.url.port));
        let socket = timeout(limits::CONNECT_WAIT, connect)
            .await
            .map_err(|_| self.silence("connect", limits::CONNECT_WAIT))?
            .and_then(|socket| socket.set_nodelay(true).map(|()| socket))
            .map_err(failed)?;
        let wire = self.security.dial(&self.url, socket).await.map_err(failed)?;
        let (sender, connection) = builder()
            .handshake(TokioIo::new(wire))
            .await
            .map_err(|source| self.http_error("open HTTP/2 to", source))?;
        // Its errors come out of the calls that they end.
        let task = tokio::spawn(async move { drop(connection.await) });
        Ok(Connection { sender, task })
    }

    /// The next data of a body; `None` at its clean end.
    async fn next_data(&self, body: &mut Incoming, wait: Duration) -> Result<Option<Bytes>, Error> {
        loop {
            let frame = timeout(wait, body.frame()).await;
            match frame.map_err(|_| self.silence("data", wait))? {
                None => return Ok(None),
                Some(Err(source)) => return Err(self.http_error("read from", source)),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) if data.is_empty() => {}
                    Ok(data) => return Ok(Some(data)),
                    Err(_trailers) => {}
                },
            }
        }
    }

    async fn collect(&self, body: &mut Incoming) -> Result<BytesMut, Error> {
        let mut text = BytesMut::new();
        while let Some(data) = self.next_data(body, limits::RESPONSE_WAIT).await? {
            if text.len() + data.len() > limits::DOCUMENT_BYTES_MAX {
                return Err(Error::TooLarge { address: self.address() });
            }
            text.extend_from_slice(&data);
        }
        Ok(text)
    }

    fn silence(&self, what: &'static str, wait: Duration) -> Error {
        Error::Silence { address: self.address(), what, wait }
    }

    fn http_error(&self, what: &'static str, source: hyper::Error) -> Error {
        Error::Http { what, address: self.address(), source }
    }
}

fn builder() -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(limits::STREAM_WINDOW)
        .initial_connection_window_size(limits::CONNECTION_WINDOW)
        .max_frame_size(limits::HTTP2_FRAME_BYTES_MAX)
        .max_header_list_size(limits::HEAD_BYTES_MAX)
        .keep_alive_interval(limits::PING_PERIOD)
        .keep_alive_timeout(limits::PING_WAIT);
    builder
}

/// Says who we are.
fn identify(headers: &mut HeaderMap, identity: &Identity) {
    let mut insert = |name, value: String| {
        // A host name that is no header value is not said.
        if let Ok(value) = value.parse() {
            headers.insert(HeaderName::from_static(name), value);
        }
    };
    insert(NODE_ID, identity.node_id.to_string());
    if !identity.hostname.is_empty() {
        insert(HOSTNAME, identity.hostname.clone());
    }
    if let Some(candidacy) = identity.candidacy {
        insert(CANDIDATE, (candidacy == Candidacy::Candidate).to_string());
    }
}

/// `text` as the value of a query parameter.
pub(crate) fn encode_query(text: &str) -> String {
    let mut query = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                query.push(char::from(byte));
            }
            byte => query.push_str(&format!("%{byte:02X}")),
        }
    }
    query
}

/// Sends all of `file` as a body.
pub(crate) async fn upload(
    mut file: impl AsyncRead + Unpin,
    sender: body::Sender,
) -> Result<(), Error> {
    loop {
        let mut piece = BytesMut::with_capacity(limits::BODY_PIECE_BYTES);
        while piece.len() < piece.capacity() {
            if file.read_buf(&mut piece).await.map_err(Error::ReadUpload)? == 0 {
                break;
            }
        }
        if piece.is_empty() {
            sender.finish();
            return Ok(());
        }
        if sender.send(piece.freeze()).await.is_err() {
            return Ok(()); // The server answers before the end of what it refuses.
        }
    }
}

/// A connection that ends with its value.
struct Connection {
    sender: http2::SendRequest<Body>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The head of a response, and the body to come.
struct Answer {
    status: StatusCode,
    node_id: Option<NodeId>,
    cluster_id: Option<String>,
    proxy_url: Option<String>,
    term: Option<u64>,
    contradicted: Option<String>,
    body: Incoming,
    _connection: Arc<Connection>,
}

impl Answer {
    fn new(response: Response<Incoming>, connection: Arc<Connection>) -> Answer {
        let header = |name: &str| response.headers().get(name).and_then(|id| id.to_str().ok());
        Answer {
            status: response.status(),
            node_id: header(NODE_ID).and_then(|id| id.parse().ok()),
            cluster_id: header(CLUSTER_ID).map(str::to_owned),
            proxy_url: header(PROXY_URL).map(str::to_owned),
            term: header(TERM).and_then(|term| term.parse().ok()),
            contradicted: header(CONTRADICTED).map(str::to_owned),
            body: response.into_body(),
            _connection: connection,
        }
    }
}

/// The role of a node, each time that it says it: first what it is, then each change.
pub struct Roles {
    client: Client,
    answer: Answer,
    lines: RoleLines,
}

impl Roles {
    /// Waits until the node says its role again; whether it is primary.
    pub async fn next_is_primary(&mut self) -> Result<bool, Error> {
        let address = || self.client.address();
        loop {
            let said = self.lines.next();
            if let Some(is_primary) =
                said.map_err(|source| Error::Decode { address: address(), source })?
            {
                return Ok(is_primary);
            }
            if self.lines.0.len() > limits::DOCUMENT_BYTES_MAX {
                return Err(Error::TooLarge { address: address() });
            }
            // A node has nothing to say for as long as nothing happens.
            let data = self.client.next_data(&mut self.answer.body, limits::EVENTS_WAIT).await?;
            self.lines.push(&data.ok_or_else(|| Error::Ended { address: address() })?);
        }
    }
}

/// Lines of events as they come.
#[derive(Debug, Default)]
pub(super) struct RoleLines(BytesMut);

impl RoleLines {
    /// The next bytes.
    pub(super) fn push(&mut self, data: &[u8]) {
        self.0.extend_from_slice(data);
    }

    /// Whether the node is primary, as the next line about that says; none if there is no such line yet.
    pub(super) fn next(&mut self) -> Result<Option<bool>, serde_json::Error> {
        while let Some(end) = self.0.iter().position(|byte| *byte == b'\n') {
            if let Some(is_primary) = said_role(&self.0.split_to(end + 1))? {
                return Ok(Some(is_primary));
            }
        }
        Ok(None)
    }
}

/// The role in a line of events, if it is of one.
fn said_role(line: &[u8]) -> Result<Option<bool>, serde_json::Error> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Data {
        #[serde(default)]
        is_primary: Option<bool>,
    }
    #[derive(serde::Deserialize)]
    struct Line {
        data: Data,
    }
    serde_json::from_slice(line).map(|line: Line| line.data.is_primary)
}

/// An open replication stream.
pub struct Stream {
    client: Client,
    /// The primary's id.
    pub node_id: Option<NodeId>,
    /// The primary's cluster id, unchecked.
    pub cluster_id: Option<String>,
    /// Where the primary's proxy takes writes of other nodes, if it has one.
    pub proxy_url: Option<String>,
    /// The number of its primaryship, if it counts them.
    pub term: Option<u64>,
    /// The header [`CONTRADICTED`].
    contradicted: Option<String>,
    decoder: Decoder,
    is_ready: bool,
    answer: Answer,
}

impl Stream {
    /// Whether the primary says that the replica's database has another history than its own.
    pub fn contradicts(&self, db: &str) -> bool {
        let mut names = self.contradicted.iter().flat_map(|names| names.split(','));
        names.any(|name| name == "*" || decode_path(name) == db)
    }

    /// The next event; `None` if the stream ended cleanly. Silence is an error: of five heartbeats on
    /// an idle stream, of a minute where LiteFS sends none.
    pub async fn next(&mut self) -> Result<Option<Event>, Error> {
        loop {
            if let Some(event) = self.decoder.next().map_err(|source| self.frame_error(source))? {
                self.is_ready |= event == Event::Frame(frame::Frame::Ready);
                return Ok(Some(event));
            }
            let idle = self.is_ready && !self.decoder.is_inside_ltx();
            let wait = if idle { limits::HEARTBEAT_WAIT } else { limits::SNAPSHOT_WAIT };
            match self.client.next_data(&mut self.answer.body, wait).await? {
                Some(data) => self.decoder.push(data),
                None => {
                    let end = self.decoder.finish();
                    return end.map(|()| None).map_err(|source| self.frame_error(source));
                }
            }
        }
    }

    fn frame_error(&self, source: frame::Error) -> Error {
        Error::Frame { address: self.client.address(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_about_the_role_say_it() {
        let role = |line: &str| said_role(line.as_bytes()).ok();
        let init = r#"{"type":"init","data":{"isPrimary":false,"hostname":"h1"}}"#;
        assert_eq!(role(init), Some(Some(false)));
        assert_eq!(role(r#"{"type":"primaryChange","data":{"isPrimary":true}}"#), Some(Some(true)));
        assert_eq!(role(r#"{"type":"tx","db":"a.db","data":{"txID":"1"}}"#), Some(None));
        assert_eq!(role("nonsense"), None);
    }

    #[test]
    fn a_name_cannot_leave_its_query_parameter() {
        assert_eq!(encode_query("a b&c=ü/.db"), "a%20b%26c%3D%C3%BC%2F.db");
    }
}
