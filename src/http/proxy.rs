//! The HTTP proxy in front of the application: writes go to the primary, and who has written reads
//! what was written, on every node.
//!
//! ```text
//! client -> pace -> rules -> state ---> application               reads, and writes on the primary
//!                                  \-> proxy of the primary       writes elsewhere, or fly-replay
//! ```
//!
//! HTTP/1.1 on all sides; bodies are passed on piece by piece, as they come, and never held. The
//! [`cookie`] carries the last transaction that a client has seen; it is set with the head of an
//! answer, so an application commits before it begins to answer. A read waits for that transaction.
//! If it does not come in [`limits::READ_HERE_WAIT`], the primary is asked instead, which alone can
//! tell a replica that lags from a transaction that is lost: then it answers, and sets the cookie to
//! what it has.
//!
//! Invariants: a request that changes something is sent at most once; it is answered here by the
//! application only on the primary; while no primary can be reached it waits, for
//! `primary-redirect-timeout`, and then gets an error, never an empty success. No request passes a
//! node twice.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use self::exchange::{Exchange, Refusal};
use self::pace::{Pace, PacedSocket};
use self::rules::{Kind, Rules};
use self::state::State;
use self::upstream::{Address, Peer, Upstream};
use super::body::{self, Aborted, Body, Hold};
use super::security::Security;
use super::socket::notice_death;
use super::{Stop, connections_max, stopped, url};
use crate::engine::Engine;
use crate::limits;
use crate::telemetry::ProxyMetrics;

mod cookie;
mod exchange;
mod expect;
mod headers;
mod pace;
#[cfg(any(test, fuzzing))]
pub(crate) mod properties;
mod rules;
mod state;
mod upstream;

pub use pace::Timeouts;
pub use state::{Link, Links, Way};

/// What a node says of its health until it has been primary or has had what its primary had.
const NOT_READY: &str = "not ready\n";
/// The proxy has as many connections as a third of the descriptors: two each, and some for the rest.
const DESCRIPTORS: u64 = 3;
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// What the proxy needs to know of the configuration.
pub struct Options {
    /// The application: `HOST:PORT`, `:PORT` or `unix:PATH`.
    pub target: String,
    /// The database whose transactions count.
    pub db: String,
    /// Whether the node has it, or may get it.
    pub has_db: bool,
    /// The lag above which the node is not healthy; zero: none.
    pub max_lag: Duration,
    /// Log each decision.
    pub debug: bool,
    /// Patterns of paths that go to the application as they are.
    pub passthrough: Vec<String>,
    /// Patterns of paths that count as writes.
    pub always_forward: Vec<String>,
    /// How long a request waits for a primary, and for this node to be ready.
    pub primary_wait: Duration,
    /// Limits for clients.
    pub timeouts: Timeouts,
    /// How writes get to the primary.
    pub way: Way,
    /// When the application is there.
    pub admission: Admission,
    /// What `/metrics` tells.
    pub metrics: ProxyMetrics,
    /// What protects requests on their way to the primary.
    pub security: Security,
}

/// From when on requests go to the application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Once the node is ready: only then the application is started.
    WhenReady,
    /// At once (`skip-sync`).
    AtOnce,
}

/// The proxy of one node.
pub struct Proxy {
    options: Options,
    rules: Rules,
    state: State,
    application: Arc<Upstream>,
    security: Security,
    /// The proxy of the last primary that a request was passed on to, by its URL.
    primary: Mutex<Option<(String, Arc<Upstream>)>>,
}

/// A client's connection, for as long as anything of it is used: a tunnel outlives its HTTP.
struct Client {
    address: IpAddr,
    pace: Arc<Pace>,
    stop: Stop,
    /// Its part of how many there may be.
    _slot: OwnedSemaphorePermit,
}

/// An answer and the word for it in logs and metrics.
type Outcome = (&'static str, Response<Body>);

impl Proxy {
    /// The proxy of the node with this `engine`; `links` and `ready` are those of its role.
    pub fn new(
        engine: Arc<Engine>,
        links: Links,
        ready: watch::Receiver<bool>,
        options: Options,
    ) -> Arc<Proxy> {
        let security = options.security.for_proxy();
        Arc::new(Proxy {
            rules: Rules::new(&options.passthrough, &options.always_forward),
            state: State::new(engine, options.db.clone(), links, ready),
            application: Upstream::new(
                Address::of_target(&options.target),
                Peer::Application,
                &security,
            ),
            security,
            primary: Mutex::default(),
            options,
        })
    }

    /// Answers requests on `listener` until `stop`.
    pub async fn serve(self: Arc<Proxy>, listener: TcpListener, mut stop: Stop) {
        let slots =
            Arc::new(Semaphore::new(connections_max(DESCRIPTORS, limits::PROXY_CONNECTIONS_MAX)));
        let mut connections = JoinSet::new();
        loop {
            // While all slots are taken, clients wait in the port's queue.
            let next = async {
                let slot = slots.clone().acquire_owned().await;
                (slot, listener.accept().await)
            };
            let accepted = tokio::select! {
                accepted = next => accepted,
                () = stopped(&mut stop) => break,
            };
            while connections.try_join_next().is_some() {}
            match accepted {
                (Ok(slot), Ok((socket, address))) => {
                    let connection = self.clone().connection(socket, address, slot, stop.clone());
                    connections.spawn(connection);
                }
                (_, Err(error)) => {
                    // Most likely no descriptors: they come back as connections end.
                    tracing::warn!(%error, "accept connection of proxy");
                    sleep(limits::ACCEPT_PAUSE).await;
                }
                (Err(_closed), _) => break, // never: nobody closes it
            }
        }
        drop(listener);
        let ended = async { while connections.join_next().await.is_some() {} };
        // What does not end in time is cut off by dropping the set.
        let _ = timeout(limits::HTTP_STOP_WAIT, ended).await;
    }

    async fn connection(
        self: Arc<Proxy>,
        socket: TcpStream,
        address: SocketAddr,
        slot: OwnedSemaphorePermit,
        mut stop: Stop,
    ) {
        // Without these, small answers come later, and a dead client is noticed later.
        let _ = socket.set_nodelay(true);
        let _ = notice_death(&socket);
        let pace = Pace::new(self.options.timeouts);
        let wire = match self.security.accept(socket).await {
            Ok(wire) => wire,
            Err(error) => return tracing::debug!(%address, %error, "connection to proxy refused"),
        };
        let io = TokioIo::new(PacedSocket::new(wire, pace.clone()));
        let (address, stopping) = (address.ip(), stop.clone());
        let client = Arc::new(Client { address, pace, stop: stopping, _slot: slot });
        let service = service_fn(move |request| {
            let answer = self.clone().answer(request, client.clone());
            async move { Ok::<_, Infallible>(answer.await) }
        });
        let connection = http1::Builder::new()
            .preserve_header_case(true)
            .header_read_timeout(None) // `pace` limits it.
            .max_headers(limits::PROXY_HEADERS_MAX)
            .max_header_size(limits::PROXY_HEAD_BYTES_MAX)
            .max_buf_size(limits::PROXY_BUFFER_BYTES)
            .serve_connection(io, service)
            .with_upgrades();
        tokio::pin!(connection);
        // Errors here are the client's: it left, was too slow, or spoke something else.
        tokio::select! {
            _ = connection.as_mut() => return,
            () = stopped(&mut stop) => {}
        }
        connection.as_mut().graceful_shutdown();
        let _ = connection.await;
    }

    async fn answer(
        self: Arc<Proxy>,
        mut request: Request<Incoming>,
        client: Arc<Client>,
    ) -> Response<Body> {
        let (reading, answering) = client.pace.begin();
        let in_flight = self.options.metrics.begin();
        let kind = self.rules.kind(request.method(), request.uri().path());
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let offered = headers::upgrade(request.headers());
        let cluster_id = self.state.cluster_id();
        let exchange = Exchange {
            passed: headers::take_passed(request.headers_mut(), cluster_id.as_deref()),
            upgrade: offered.is_some().then(|| hyper::upgrade::on(&mut request)),
            proxy: self.clone(),
            client,
            kind,
        };
        headers::strip(request.headers_mut(), offered);
        let request = request.map(|body| match body.is_end_stream() {
            true => body::empty(),
            false => Hold::new(body.map_err(|_| Aborted), reading).boxed_unsync(),
        });
        let (outcome, response) = match exchange.run(request).await {
            Ok(outcome) => outcome,
            Err(refusal) => {
                let (status, error) = (refusal.status.as_u16(), &refusal.text);
                tracing::warn!(%method, path, status, error, "proxy request failed");
                (refusal.outcome, refusal.into())
            }
        };
        self.options.metrics.count(kind.name(), outcome);
        if self.options.debug {
            let status = response.status().as_u16();
            tracing::info!(%method, path, kind = kind.name(), outcome, status, "proxy");
        }
        response.map(|body| Hold::new(body, (answering, in_flight)).boxed_unsync())
    }

    fn health(&self) -> Outcome {
        let (status, text) = self.judge_health();
        let outcome = if status == StatusCode::OK { "healthy" } else { "unhealthy" };
        (outcome, plain(status, text.to_owned()))
    }

    fn judge_health(&self) -> (StatusCode, &'static str) {
        if !self.state.is_ready() {
            return (StatusCode::SERVICE_UNAVAILABLE, NOT_READY);
        }
        let max_ms = i64::try_from(self.options.max_lag.as_millis()).unwrap_or(i64::MAX);
        match self.state.lag_ms() {
            Some(lag_ms) if max_ms > 0 && lag_ms > max_ms => {
                (StatusCode::SERVICE_UNAVAILABLE, "Replication lag exceeded\n")
            }
            _ => (StatusCode::OK, "OK\n"),
        }
    }

    /// The connections to the primary's proxy.
    fn primary(&self, url: &str) -> Result<Arc<Upstream>, url::Error> {
        let mut primary = self.primary.lock().unwrap();
        match &*primary {
            Some((known, upstream)) if known == url => Ok(upstream.clone()),
            _ => {
                let upstream = Upstream::new(Address::of_url(url)?, Peer::Node, &self.security);
                *primary = Some((url.to_owned(), upstream.clone()));
                Ok(upstream)
            }
        }
    }
}

/// Answers that the node is not ready, for as long as this is polled.
pub async fn refuse_all(listener: &TcpListener) -> Infallible {
    let refuse = |request: Request<Incoming>| async move {
        let mut response = match Rules::new(&[], &[]).kind(request.method(), request.uri().path()) {
            Kind::Health => plain(StatusCode::SERVICE_UNAVAILABLE, NOT_READY.to_owned()),
            _ => Refusal::not_ready().into(),
        };
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        Ok::<_, Infallible>(response)
    };
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                let connection = http1::Builder::new()
                    .serve_connection(TokioIo::new(socket), service_fn(refuse));
                tokio::spawn(async move {
                    // Errors are the client's, or that it said nothing.
                    let _ = timeout(limits::REQUEST_WAIT, connection).await;
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept connection of proxy");
                sleep(limits::ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A line of text.
fn plain(status: StatusCode, text: String) -> Response<Body> {
    let mut response = Response::new(body::full(text));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, TEXT);
    response
}
