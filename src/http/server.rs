//! The API of a node: one listener, HTTP/1.1 and HTTP/2 with prior knowledge, and its routes.
//!
//! ```text
//! POST /stream    the replication stream (HTTP/2)      GET /info     who the node is (LiteFS's)
//! GET  /events    what happens here, line by line      GET /status   the same with all databases
//! GET  /export    a database file                      GET /metrics  for Prometheus
//! POST /import    a database file                      GET /         the status for a browser
//!                                                      POST /handoff  give the lease to a replica
//!                                                      POST /promote  become primary
//! POST, DELETE /halt, POST /tx                         a replica writes
//! ```
//!
//! An error is one line of text. Every answer but `/metrics` carries the node id, and the cluster id
//! if there is one. Invariants: what only a primary may do ends when this node stops being that
//! primary, even if it becomes one again; names from a request reach the engine only as
//! [`DbName`]; no request waits for its peer longer than `limits` say.

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::header::{
    ALLOW, CONTENT_TYPE, HeaderName, HeaderValue, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use hyper::service::service_fn;
use hyper::{HeaderMap, Method, Request, Response, StatusCode, Version};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use ltx::{NodeId, Pos};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{sleep, timeout};

use super::body::{self, Body};
use super::client::encode_query;
use super::peers::{Address, Peers};
use super::query::parameter;
use super::report::{Info, InfoPrimary, Status, StatusDatabase, StatusPrimary, StatusRole};
use super::security::Security;
use super::socket::{Socket, notice_death};
use super::{
    CANDIDATE, CLUSTER_ID, CONTRADICTED, CONTRADICTED_MAX, HOSTNAME, NODE_ID, OVERLAP,
    OVERLAP_ACCEPTED, PROXY_URL, Stop, TERM, connections_max, events, frame, gauges, halt, page,
    spool, stopped, stream, transfer,
};
use crate::cluster::control::{Control, HandoffError, PromoteError};
use crate::cluster::election::Force;
use crate::cluster::node::Candidacy;
use crate::cluster::peers::Identity;
use crate::engine::{
    self, Db, DbName, DbState, Engine, Event, EventWatch, InvalidName, Overlap, Role, chain_text,
};
use crate::limits;
use crate::sqlite::header::JournalMode;
use crate::telemetry::{Metrics, metrics};

pub(super) const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
const BINARY: &str = "application/octet-stream";
/// The API has as many connections as a sixth of the descriptors, one each: as many are left for
/// databases, also with a proxy.
const DESCRIPTORS: u64 = 6;

/// What the API needs to know of the configuration.
pub struct Options {
    /// Whether the application may be started, see [`Status::ready`].
    pub ready: watch::Receiver<bool>,
    /// Whether the node may become primary.
    pub candidate: bool,
    /// The node's own host name.
    pub hostname: String,
    /// How long a snapshot or an export may take to be made; `None` for as long as it takes.
    pub snapshot_timeout: Option<Duration>,
    /// Where this node's proxy takes writes of other nodes, if it has one.
    pub proxy_url: Option<String>,
    /// What `/metrics` tells.
    pub metrics: Metrics,
    /// The way to whoever decides the role of the node.
    pub control: Control,
    /// What callers must show.
    pub security: Security,
}

/// The API of one node.
pub struct Api {
    pub(super) engine: Arc<Engine>,
    pub(super) options: Options,
    pub(super) spool_dir: PathBuf,
    /// One for each snapshot or export being made.
    pub(super) spool_slots: Arc<Semaphore>,
    /// One for each export that is made or waits on the disk.
    pub(super) export_slots: Arc<Semaphore>,
    /// One for each upload that arrives, or waits for those before it.
    upload_slots: Semaphore,
    /// Imports go one by one.
    import_slot: Semaphore,
    /// One for each request that waits for a HALT lock.
    pub(super) halt_slots: Arc<Semaphore>,
    /// One for each forwarded transaction that is arriving.
    pub(super) forward_slots: Semaphore,
    /// The number of this primaryship; `None` while the node is not primary.
    primaryship: watch::Receiver<Option<u64>>,
    _role_watch: EventWatch,
    peers: Peers,
}

impl Api {
    /// The API of `engine`. Blocking: empties the spool directory.
    pub fn new(engine: Arc<Engine>, options: Options) -> io::Result<Arc<Api>> {
        let spool_dir = spool::prepare(engine.data_dir())?;
        let (role, primaryship) = watch::channel(None);
        let role = Arc::new(role);
        let changes = role.clone();
        let role_watch = engine.watch_events(Box::new(move |event| {
            if let Event::PrimaryChange { is_primary, .. } = event {
                set_primary(&changes, || *is_primary);
            }
        }));
        set_primary(&role, || matches!(engine.role(), Role::Primary));
        Ok(Arc::new(Api {
            engine,
            options,
            spool_dir,
            spool_slots: Arc::new(Semaphore::new(limits::SPOOLS_MAX)),
            export_slots: Arc::new(Semaphore::new(limits::SPOOLS_MAX)),
            upload_slots: Semaphore::new(limits::UPLOADS_MAX),
            import_slot: Semaphore::new(1),
            halt_slots: Arc::new(Semaphore::new(limits::HALT_WAITERS_MAX)),
            forward_slots: Semaphore::new(limits::FORWARDS_MAX),
            primaryship,
            _role_watch: role_watch,
            peers: Peers::default(),
        }))
    }

    /// How many replication streams are open.
    pub fn stream_count(&self) -> usize {
        self.peers.count()
    }

    /// Answers requests on `listener` until `stop`; then ends the streams and returns.
    pub async fn serve(self: Arc<Api>, listener: TcpListener, mut stop: Stop) {
        let slots = Arc::new(Semaphore::new(connections_max(DESCRIPTORS, limits::CONNECTIONS_MAX)));
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = stopped(&mut stop) => break,
            };
            while connections.try_join_next().is_some() {}
            match (accepted, slots.clone().try_acquire_owned()) {
                (Ok((socket, _)), Ok(slot)) => {
                    connections.spawn(self.clone().connection(socket, slot, stop.clone()));
                }
                (Ok((_, peer)), Err(_)) => tracing::warn!(%peer, "too many connections"),
                (Err(error), _) => {
                    // Most likely no descriptors: they come back as connections end.
                    tracing::warn!(%error, "accept connection");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
        drop(listener);
        let ended = async { while connections.join_next().await.is_some() {} };
        // What does not end in time is cut off by dropping the set.
        let _ = timeout(limits::HTTP_STOP_WAIT, ended).await;
    }

    async fn connection(
        self: Arc<Api>,
        socket: TcpStream,
        _slot: OwnedSemaphorePermit,
        mut stop: Stop,
    ) {
        // Without these, small frames come later, and a dead host is noticed later: by nobody, if it only reads events.
        let _ = socket.set_nodelay(true);
        let _ = notice_death(&socket);
        let address = socket.peer_addr().ok();
        let asked = Arc::new(AtomicBool::new(false));
        let security = self.options.security.clone();
        let service = {
            let (api, asked, stop) = (self, asked.clone(), stop.clone());
            service_fn(move |mut request: Request<Incoming>| {
                if let Some(address) = address {
                    request.extensions_mut().insert(Address(address));
                }
                asked.store(true, Ordering::Relaxed);
                let (api, stop) = (api.clone(), stop.clone());
                async move { Ok::<_, Infallible>(api.answer(request, stop).await) }
            })
        };
        let wire = match security.accept(socket).await {
            Ok(wire) => wire,
            Err(error) => return tracing::debug!(?address, %error, "connection refused"),
        };
        let builder = builder();
        let connection = builder.serve_connection(TokioIo::new(Socket::new(wire)), service);
        tokio::pin!(connection);
        // Errors here are the peer's: it left, or spoke something else.
        tokio::select! {
            _ = connection.as_mut() => return,
            () = stopped(&mut stop) => {}
            () = nothing_asked(&asked) => return,
        }
        connection.as_mut().graceful_shutdown();
        let _ = connection.await;
    }

    async fn answer(self: Arc<Api>, request: Request<Incoming>, stop: Stop) -> Response<Body> {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let mut response = match self.clone().route(request, stop).await {
            Ok(response) => response,
            Err(refusal) => {
                let status = refusal.status.as_u16();
                tracing::warn!(%method, path, status, error = refusal.text, "request refused");
                refusal.into()
            }
        };
        if path != "/metrics" {
            self.identify(response.headers_mut());
        }
        response
    }

    fn identify(&self, headers: &mut HeaderMap) {
        let mut insert = |name, id: String| {
            if let Ok(id) = HeaderValue::from_str(&id) {
                headers.insert(HeaderName::from_static(name), id);
            }
        };
        insert(NODE_ID, self.engine.node_id().to_string());
        if let Some(id) = self.engine.cluster_id() {
            insert(CLUSTER_ID, id.to_string());
        }
    }

    async fn route(self: Arc<Api>, request: Request<Incoming>, stop: Stop) -> Answer {
        if !self.options.security.admits(request.headers()) {
            return Err(Refusal::unauthorized());
        }
        let path = request.uri().path();
        let Some(allowed) = methods_of(path) else {
            return Err(Refusal::new(StatusCode::NOT_FOUND, "404 page not found"));
        };
        if allowed.split(", ").all(|allowed| request.method() != allowed) {
            return Err(Refusal { allowed: Some(allowed), ..METHOD_NOT_ALLOWED.into() });
        }
        match path {
            "/" => Ok(page::html()),
            "/page.css" => Ok(page::style()),
            "/page.js" => Ok(page::script()),
            "/events" => Ok(respond(JSON, events::serve(&self.engine, stop))),
            "/export" => self.export(request).await,
            "/handoff" => self.hand_off(request).await,
            "/import" => self.import(request, stop).await,
            "/halt" if request.method() == Method::DELETE => halt::take_back(self, request).await,
            "/halt" => halt::lend(self, request).await,
            "/info" => Ok(respond(TEXT, body::full(pretty_json(&self.info())))),
            "/metrics" => self.metrics().await,
            "/promote" => self.promote(request).await,
            "/status" => self.status().await,
            "/tx" => halt::take(self, request).await,
            _ => self.stream(request, stop).await,
        }
    }

    fn info(&self) -> Info {
        let role = self.engine.role();
        let hostname = match &role {
            Role::Primary => self.options.hostname.clone(),
            Role::Replica(primary) => primary.hostname.clone(),
            Role::Unknown => String::new(),
        };
        Info {
            cluster_id: self.engine.cluster_id().map(|id| id.to_string()),
            is_primary: matches!(role, Role::Primary),
            candidate: self.options.candidate,
            path: self.engine.data_dir().display().to_string(),
            primary: InfoPrimary { hostname },
        }
    }

    async fn status(self: Arc<Api>) -> Answer {
        let collect = spawn_blocking(move || pretty_json(&self.collect_status()));
        let json = collect.await.map_err(|error| Refusal::internal(&error))?;
        Ok(respond(JSON, body::full(json)))
    }

    async fn metrics(self: Arc<Api>) -> Answer {
        let collect = spawn_blocking(move || {
            gauges::collect(&self.engine, &self.options.metrics, self.stream_count());
            self.options.metrics.encode()
        });
        let text = collect.await.map_err(|error| Refusal::internal(&error))?;
        let text = text.map_err(|error| Refusal::internal(&error))?;
        Ok(respond(metrics::CONTENT_TYPE, body::full(text)))
    }

    /// Blocking: counts files.
    fn collect_status(&self) -> Status {
        let (role, primary) = match self.engine.role() {
            Role::Primary => (StatusRole::Primary, None),
            Role::Replica(info) => (
                StatusRole::Replica,
                Some(StatusPrimary { hostname: info.hostname, advertise_url: info.advertise_url }),
            ),
            Role::Unknown => (StatusRole::Unknown, None),
        };
        let databases = self.engine.databases();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node_id: self.engine.node_id().to_string(),
            cluster_id: self.engine.cluster_id().map(|id| id.to_string()),
            role,
            ready: *self.options.ready.borrow(),
            candidate: self.options.candidate,
            path: self.engine.data_dir().display().to_string(),
            primary,
            lag_ms: if role == StatusRole::Primary { None } else { self.engine.lag_ms() },
            peers: self.peers.list(),
            databases: databases
                .iter()
                .filter(|db| !was_never_written(db))
                .map(|db| self.database_status(db))
                .collect(),
        }
    }

    fn database_status(&self, db: &Db) -> StatusDatabase {
        let view = db.view();
        StatusDatabase {
            name: db.name().to_string(),
            position: view.pos.to_string(),
            mode: mode_text(view.mode).to_owned(),
            page_size: view.page_size.map_or(0, |size| size.get()),
            page_count: view.pages,
            failure: match db.state() {
                DbState::Ready => None,
                DbState::Failed(reason) => Some(reason),
            },
            passthrough: Some(self.engine.shared().is_passthrough()),
            hwm: db.hwm().0,
            backup_problem: db.backup_problem(),
            lost_found: db.lost_found_count() as u64,
        }
    }

    async fn export(self: Arc<Api>, request: Request<Incoming>) -> Answer {
        let name = required_name(&request)?;
        let db = self.engine.database(&name);
        let db = db.ok_or_else(|| Refusal::new(StatusCode::NOT_FOUND, "database not found"))?;
        let mut export = transfer::start(&self, db, transfer::Kind::Export);
        // The first piece decides whether this can be an error with a status.
        let first = export.next().await.map_err(|error| {
            if let transfer::Error::Engine(engine::Error::UnknownDatabase(_)) = error {
                return Refusal::new(StatusCode::NOT_FOUND, "database not found");
            }
            let text = format!("write snapshot: {}", chain_text(&error));
            Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, &text)
        })?;
        let (sender, body) = body::channel();
        tokio::spawn(async move {
            if let Err(error) = send_export(first, export, sender).await {
                tracing::warn!(db = name, error = chain_text(&*error), "export broken off");
            }
        });
        Ok(respond(BINARY, body))
    }

    async fn import(self: Arc<Api>, request: Request<Incoming>, mut stop: Stop) -> Answer {
        let name = required_name(&request)?;
        let bad_name =
            |error: InvalidName| Refusal::new(StatusCode::BAD_REQUEST, &error.to_string());
        let name = DbName::new(&name).map_err(bad_name)?;
        let primaryship = self.primaryship().map_err(|_| self.not_primary())?;
        let api = self.clone();
        tokio::select! {
            answer = api.take_import(name, request.into_body()) => answer,
            () = self.primary_lost(primaryship) => Err(lease_expired()),
            () = stopped(&mut stop) => Err(lease_expired()),
        }
    }

    async fn take_import(self: Arc<Api>, name: DbName, body: Incoming) -> Answer {
        let slot = timeout(limits::UPLOAD_WAIT, self.upload_slots.acquire()).await;
        let _upload_slot = slot.map_err(|_| TOO_MANY_UPLOADS)?;
        let upload = transfer::Upload::store(&self.spool_dir, body).await?;
        let _import_slot = self.import_slot.acquire().await;
        let (engine, db) = (self.engine.clone(), name.clone());
        let imported = spawn_blocking(move || {
            upload.check()?;
            engine.import(&db, upload.path()).map_err(transfer::Error::from)
        });
        let pos = imported.await.map_err(|error| Refusal::internal(&error))??;
        tracing::info!(db = %name, %pos, "imported");
        Ok(respond(TEXT, body::empty()))
    }

    /// Answers when the target is the primary, or when that has failed.
    async fn hand_off(self: Arc<Api>, request: Request<Incoming>) -> Answer {
        let id = parameter(request.uri().query(), "nodeID");
        let Ok(id) = id.parse::<NodeId>() else {
            return Err(Refusal::new(StatusCode::BAD_REQUEST, "invalid node id"));
        };
        match self.options.control.hand_off(id).await {
            Ok(()) => Ok(respond(TEXT, body::empty())),
            Err(error @ HandoffError::NotEligible) => {
                Err(Refusal::new(StatusCode::CONFLICT, &error.to_string()))
            }
            Err(error) => {
                let text = format!("cannot handoff: {error}");
                Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, &text))
            }
        }
    }

    /// Answers when this node is the primary, or when that has failed.
    async fn promote(self: Arc<Api>, request: Request<Incoming>) -> Answer {
        let force = match parameter(request.uri().query(), "force").as_str() {
            "true" => Force::Yes,
            _ => Force::No,
        };
        match self.options.control.promote(force).await {
            Ok(()) => Ok(respond(TEXT, body::empty())),
            Err(error @ PromoteError::NotEligible) => {
                Err(Refusal::new(StatusCode::CONFLICT, &error.to_string()))
            }
            Err(error) => Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string())),
        }
    }

    async fn stream(self: Arc<Api>, request: Request<Incoming>, stop: Stop) -> Answer {
        let refuse = |status, text: &str| Err(Refusal::new(status, text));
        if request.version() != Version::HTTP_2 {
            return refuse(StatusCode::UPGRADE_REQUIRED, "Upgrade to HTTP/2 required");
        }
        let peer = peer_id(request.headers());
        if peer == self.engine.node_id() {
            return refuse(StatusCode::BAD_REQUEST, "cannot connect to self");
        }
        let address = request.extensions().get::<Address>().copied();
        let primaryship = self.primaryship()?;
        let term = self.options.control.term();
        let overlap = accepted_overlap(request.headers());
        let identity = identity(peer, request.headers());
        let filter = parameter(request.uri().query(), "filter");
        let filter = filter.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
        let body = Limited::new(request.into_body(), limits::POSITION_MAP_BYTES_MAX);
        let body = match timeout(limits::SMALL_BODY_WAIT, body.collect()).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) => return refuse(StatusCode::BAD_REQUEST, &error.to_string()),
            Err(_) => return refuse(StatusCode::BAD_REQUEST, "position map took too long"),
        };
        let positions = match frame::decode_positions(&body) {
            Ok(positions) => positions,
            Err(error) => return refuse(StatusCode::BAD_REQUEST, &error.to_string()),
        };
        let (sender, body) = body::channel();
        let mut response = Response::new(body);
        let url = self.options.proxy_url.as_deref().and_then(|url| HeaderValue::from_str(url).ok());
        if let Some(url) = url {
            response.headers_mut().insert(PROXY_URL, url);
        }
        if let Some(term) = term {
            response.headers_mut().insert(TERM, term.into());
        }
        let (api, told) = (self.clone(), positions);
        let (positions, names) = spawn_blocking(move || {
            let names = api.contradicted(&told);
            (told, names)
        })
        .await
        .map_err(|_| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "compare positions"))?;
        if let Some(names) = names.and_then(|names| HeaderValue::from_str(&names).ok()) {
            response.headers_mut().insert(CONTRADICTED, names);
        }
        tokio::spawn(async move {
            let _open = self.peers.add(peer, address);
            tracing::info!(%peer, hostname = identity.hostname, "stream connected");
            let membership = self.options.control.peers().join(identity);
            let request = stream::Request { overlap, positions, filter, membership };
            let lost = self.primary_lost(primaryship);
            stream::serve(self.clone(), request, sender, stop, lost).await;
            tracing::info!(%peer, "stream disconnected");
        });
        Ok(response)
    }

    /// The header [`CONTRADICTED`] for a replica that stands there; blocking.
    fn contradicted(&self, positions: &[(String, Pos)]) -> Option<String> {
        let is = |name: &str, pos| self.engine.database(name).is_some_and(|db| db.contradicts(pos));
        let found = positions.iter().filter(|(name, pos)| is(name, *pos));
        let names: Vec<_> = found.map(|(name, _)| encode_query(name)).collect();
        let names = names.join(",");
        match names.len() {
            0 => None,
            len if len > CONTRADICTED_MAX => Some("*".to_owned()),
            _ => Some(names),
        }
    }

    /// Why there is no primaryship here, and who has it.
    fn not_primary(&self) -> Refusal {
        let refusal = lease_expired();
        let Role::Replica(primary) = self.engine.role() else { return refusal };
        let (text, name, url) = (refusal.text, primary.hostname, primary.advertise_url);
        let text = format!("{text}: this node is a replica, the primary is {name} ({url})");
        Refusal::new(refusal.status, &text)
    }

    /// The number of the present primaryship.
    pub(super) fn primaryship(&self) -> Result<u64, Refusal> {
        self.primaryship.borrow().ok_or_else(lease_expired)
    }

    /// Waits until the primaryship of that number is over.
    pub(super) async fn primary_lost(&self, number: u64) {
        let mut primaryship = self.primaryship.clone();
        // An error means that the sender is gone, and it lives as long as this value.
        let _ = primaryship.wait_for(|now| *now != Some(number)).await;
    }
}

/// Notes whether the node is primary; a new primaryship gets a new number. Asked when nobody else notes it, so that
/// the role of the start is not noted after that which has come since.
fn set_primary(role: &watch::Sender<Option<u64>>, is_primary: impl FnOnce() -> bool) {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    role.send_if_modified(|now| {
        let (was, is_primary) = (now.is_some(), is_primary());
        if was != is_primary {
            *now = is_primary.then(|| NEXT.fetch_add(1, Ordering::Relaxed));
        }
        was != is_primary
    });
}

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits::REQUEST_WAIT)
        .max_buf_size(limits::HTTP1_BUFFER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(limits::STREAM_WINDOW)
        .initial_connection_window_size(limits::CONNECTION_WINDOW)
        .max_frame_size(limits::HTTP2_FRAME_BYTES_MAX)
        .max_send_buf_size(limits::HTTP2_FRAME_BYTES_MAX as usize * 4)
        .max_header_list_size(limits::HEAD_BYTES_MAX)
        .max_concurrent_streams(limits::REQUESTS_PER_CONNECTION_MAX)
        .keep_alive_interval(limits::PING_PERIOD)
        .keep_alive_timeout(limits::PING_WAIT);
    builder
}

/// Whether it is a file that was made, and nothing more.
fn was_never_written(db: &Db) -> bool {
    let view = db.view();
    view.pos.is_zero()
        && view.pages == 0
        && db.state() == DbState::Ready
        && db.lost_found_count() == 0
}

fn mode_text(mode: JournalMode) -> &'static str {
    match mode {
        JournalMode::Wal => "wal",
        JournalMode::Rollback => "rollback",
    }
}

/// Ends [`limits::REQUEST_WAIT`] after the start of a connection on which nothing was asked yet.
async fn nothing_asked(asked: &AtomicBool) {
    sleep(limits::REQUEST_WAIT).await;
    if asked.load(Ordering::Relaxed) {
        std::future::pending().await
    }
}

/// The methods of a route; `None` if there is no such route.
fn methods_of(path: &str) -> Option<&'static str> {
    match path {
        "/stream" | "/import" | "/tx" | "/handoff" | "/promote" => Some("POST"),
        "/halt" => Some("POST, DELETE"),
        "/" | "/page.css" | "/page.js" | "/events" | "/export" | "/info" | "/metrics"
        | "/status" => Some("GET"),
        _ => None,
    }
}

pub(super) fn peer_id(headers: &HeaderMap) -> NodeId {
    let id = headers.get(NODE_ID).and_then(|id| id.to_str().ok());
    id.and_then(|id| id.parse().ok()).unwrap_or_default()
}

pub(super) fn identity(node_id: NodeId, headers: &HeaderMap) -> Identity {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    Identity {
        node_id,
        hostname: text(HOSTNAME).unwrap_or_default().to_owned(),
        candidacy: match text(CANDIDATE) {
            Some("true") => Some(Candidacy::Candidate),
            Some("false") => Some(Candidacy::ReplicaOnly),
            _ => None,
        },
    }
}

fn accepted_overlap(headers: &HeaderMap) -> Overlap {
    match headers.get(OVERLAP).is_some_and(|value| value == OVERLAP_ACCEPTED) {
        true => Overlap::Accepted,
        false => Overlap::Refused,
    }
}

pub(super) fn required_name<B>(request: &Request<B>) -> Result<String, Refusal> {
    let name = parameter(request.uri().query(), "name");
    if name.is_empty() {
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "name required"));
    }
    Ok(name)
}

async fn send_export(
    mut data: Option<bytes::Bytes>,
    mut export: transfer::Transfer,
    sender: body::Sender,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    while let Some(bytes) = data {
        sender.send(bytes).await?;
        data = export.next().await?;
    }
    export.finish().await?;
    sender.finish();
    Ok(())
}

fn pretty_json(document: &impl serde::Serialize) -> String {
    let json = serde_json::to_string_pretty(document);
    json.expect("plain structs of texts and numbers encode") + "\n"
}

pub(super) fn respond(content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

pub(super) type Answer = Result<Response<Body>, Refusal>;

/// An answer that says no.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    /// One line.
    text: String,
    /// The methods that would be right.
    allowed: Option<&'static str>,
}

/// Makes a browser ask for the token.
const ASK_FOR_TOKEN: HeaderValue = HeaderValue::from_static("Basic realm=\"litefs\"");

const TOO_MANY_UPLOADS: (StatusCode, &str) =
    (StatusCode::SERVICE_UNAVAILABLE, "other imports are being uploaded, try again later");

const METHOD_NOT_ALLOWED: (StatusCode, &str) =
    (StatusCode::METHOD_NOT_ALLOWED, "method not allowed");

pub(super) fn lease_expired() -> Refusal {
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "lease expired")
}

impl Refusal {
    pub(super) fn new(status: StatusCode, text: &str) -> Refusal {
        Refusal { status, text: text.replace('\n', " "), allowed: None }
    }

    fn unauthorized() -> Refusal {
        Refusal::new(
            StatusCode::UNAUTHORIZED,
            "token missing or wrong: http.auth-token must be the same on all nodes",
        )
    }

    pub(super) fn internal(error: &dyn std::error::Error) -> Refusal {
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, &chain_text(error))
    }
}

impl From<(StatusCode, &str)> for Refusal {
    fn from((status, text): (StatusCode, &str)) -> Refusal {
        Refusal::new(status, text)
    }
}

impl From<transfer::Error> for Refusal {
    fn from(error: transfer::Error) -> Refusal {
        use transfer::Error;
        let status = match &error {
            Error::Engine(engine::Error::NotPrimary) => return lease_expired(),
            Error::Upload(_) | Error::Unhealthy(_) => StatusCode::BAD_REQUEST,
            Error::Store(source) if source.kind() == io::ErrorKind::StorageFull => {
                StatusCode::INSUFFICIENT_STORAGE
            }
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Refusal::new(status, &chain_text(&error))
    }
}

impl From<Refusal> for Response<Body> {
    fn from(refusal: Refusal) -> Response<Body> {
        let mut response = respond(TEXT, body::full(refusal.text + "\n"));
        *response.status_mut() = refusal.status;
        let headers = response.headers_mut();
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        if let Some(method) = refusal.allowed {
            headers.insert(ALLOW, HeaderValue::from_static(method));
        }
        if refusal.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, ASK_FOR_TOKEN);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The node becomes primary while its API begins.
    #[test]
    fn the_role_of_the_start_is_not_noted_after_a_later_one() {
        let (role, primaryship) = watch::channel(None);
        let role = Arc::new(role);
        let of_thread = role.clone();
        let mut later = None;
        set_primary(&role, || {
            later = Some(std::thread::spawn(move || set_primary(&of_thread, || true)));
            false
        });
        later.expect("it was asked").join().expect("no panic");
        assert!(primaryship.borrow().is_some());
    }
}
