//! One request on its way: where it goes, what it waits for, and its answer.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::{HOST, HeaderName, HeaderValue, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS};
use hyper::http::uri::PathAndQuery;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode, Uri, Version};
use hyper_util::rt::TokioIo;
use ltx::{NodeId, Txid};
use tokio::time::Instant;

use super::rules::Kind;
use super::state::{Place, State, Wake};
use super::upstream::{Repeat, SendError, Upstream};
use super::{Admission, Client, Outcome, Proxy, cookie, expect, headers, plain};
use crate::engine::chain_text;
use crate::http::body::{self, Aborted, Body, Hold};
use crate::http::{Stop, stopped};
use crate::limits;
use crate::telemetry::ProxyWait;

const FLY_REPLAY: HeaderName = HeaderName::from_static("fly-replay");

/// A request on its way.
pub(super) struct Exchange {
    pub(super) proxy: Arc<Proxy>,
    pub(super) client: Arc<Client>,
    /// What it is.
    pub(super) kind: Kind,
    /// The nodes that it has passed.
    pub(super) passed: Vec<NodeId>,
    /// The client's side of a tunnel that it asks for.
    pub(super) upgrade: Option<OnUpgrade>,
}

/// Which transaction the client is told to have seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cookie {
    /// None.
    Keep,
    /// The last one here, if the database exists.
    Set,
    /// The last one here, whatever the client says.
    Reset,
}

/// Where a read is to be answered.
enum Reader {
    Here(Cookie),
    Primary(Place),
}

/// What came of a request to the primary.
enum Sent {
    Outcome(Outcome),
    /// Nothing of it was sent: the request, and why.
    Back(Request<Body>, String),
}

impl Exchange {
    /// Gets the answer.
    pub(super) async fn run(mut self, request: Request<Body>) -> Result<Outcome, Refusal> {
        if self.kind == Kind::Health {
            return Ok(self.proxy.health());
        }
        if request.method() == Method::CONNECT {
            return Err(Refusal::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "CONNECT is not for a proxy of this kind",
            ));
        }
        if self.passed.contains(&self.proxy.state.node_id())
            || self.passed.len() > limits::PROXY_HOPS_MAX
        {
            return Err(Refusal::new(
                StatusCode::LOOP_DETECTED,
                "the request has been here before",
            ));
        }
        self.admit().await?;
        let seen = cookie::seen(request.headers());
        let request = self.prepare(request);
        match self.kind {
            Kind::Health | Kind::Passthrough => self.ask_application(request, Cookie::Keep).await,
            Kind::Read => self.read(request, seen).await,
            Kind::Write => self.write(request).await,
        }
    }

    /// Waits until the application may be there.
    async fn admit(&self) -> Result<(), Refusal> {
        let Proxy { options, state, .. } = &*self.proxy;
        if options.admission == Admission::AtOnce || state.is_ready() {
            return Ok(());
        }
        let deadline = Instant::now() + options.primary_wait;
        let waited = options.metrics.wait("ready");
        let wake = state.primary_changes(&self.client.stop).ready(deadline).await;
        waited.end(wake == Wake::Changed);
        match wake {
            Wake::Changed => Ok(()),
            Wake::Late => Err(Refusal::not_ready()),
            Wake::Stopping => Err(Refusal::stopping()),
        }
    }

    /// Makes of the request one of our own, with the same target, headers and body.
    fn prepare(&self, mut request: Request<Body>) -> Request<Body> {
        let uri = std::mem::take(request.uri_mut());
        let root = PathAndQuery::from_static("/");
        *request.uri_mut() = Uri::from(uri.path_and_query().cloned().unwrap_or(root));
        *request.version_mut() = Version::HTTP_11;
        let target = self.proxy.application.address().to_string();
        let host = match uri.authority() {
            // The whole URL in the request line is what counts.
            Some(authority) => HeaderValue::from_str(authority.as_str()).ok(),
            None if request.headers().contains_key(HOST) => None,
            None => HeaderValue::from_str(&target).ok(),
        };
        if let Some(host) = host {
            request.headers_mut().insert(HOST, host);
        }
        if self.passed.is_empty() {
            headers::add_client(request.headers_mut(), self.client.address);
        }
        request
    }

    async fn read(
        &mut self,
        mut request: Request<Body>,
        seen: Option<Txid>,
    ) -> Result<Outcome, Refusal> {
        let seen = seen.filter(|_| self.proxy.options.has_db);
        let Some(seen) = seen else { return self.ask_application(request, Cookie::Keep).await };
        // What another node has passed on is not passed on again.
        let mut may_pass = self.passed.is_empty();
        let deadline = Instant::now() + limits::TXID_WAIT;
        loop {
            let place = match self.wait_for(seen, may_pass, deadline).await? {
                Reader::Here(cookie) => return self.ask_application(request, cookie).await,
                Reader::Primary(place) => place,
            };
            request = match self.ask_primary(place, request).await? {
                Sent::Outcome(outcome) => return Ok(outcome),
                Sent::Back(request, _why) => request,
            };
            may_pass = false;
        }
    }

    /// Waits until the database is where the client has seen it.
    async fn wait_for(
        &self,
        seen: Txid,
        may_pass: bool,
        deadline: Instant,
    ) -> Result<Reader, Refusal> {
        let Proxy { state, options, .. } = &*self.proxy;
        let pass_at = deadline - limits::TXID_WAIT + limits::READ_HERE_WAIT;
        let mut waited = None;
        let reader = loop {
            let mut changes = state.changes(&self.client.stop);
            if state.txid().is_some_and(|txid| txid >= seen) {
                break Ok(Reader::Here(Cookie::Keep));
            }
            if state.leads() && state.received_txid().is_none_or(|txid| txid < seen) {
                // Nobody is ahead of the primary: that transaction was lost.
                break Ok(Reader::Here(Cookie::Reset));
            }
            let now = Instant::now();
            if may_pass && now >= pass_at {
                let place = state.primary(options.way, &self.passed);
                if let Place::Host(_) | Place::Proxy(_) = place {
                    break Ok(Reader::Primary(place));
                }
            }
            if now >= deadline {
                break Err(Refusal::timeout());
            }
            waited.get_or_insert_with(|| options.metrics.wait("txid"));
            let until = if now < pass_at { pass_at } else { deadline };
            if changes.next(until).await == Wake::Stopping {
                break Err(Refusal::stopping());
            }
        };
        if let Some(waited) = waited {
            waited.end(matches!(reader, Ok(Reader::Here(_))));
        }
        reader
    }

    async fn write(&mut self, mut request: Request<Body>) -> Result<Outcome, Refusal> {
        let proxy = self.proxy.clone();
        let Proxy { state, options, .. } = &*proxy;
        let deadline = Instant::now() + options.primary_wait;
        let mut waited = None;
        loop {
            let mut changes = state.primary_changes(&self.client.stop);
            let why = match state.primary(options.way, &self.passed) {
                Place::Here => {
                    end_wait(waited, true);
                    return self.ask_application(request, Cookie::Set).await;
                }
                Place::Never(why) => return Err(Refusal::unavailable(&why)),
                Place::Nowhere(why) => why,
                place => match self.ask_primary(place, request).await? {
                    Sent::Outcome(outcome) => {
                        end_wait(waited, true);
                        return Ok(outcome);
                    }
                    Sent::Back(back, why) => {
                        request = back;
                        why
                    }
                },
            };
            waited.get_or_insert_with(|| options.metrics.wait("primary"));
            match changes.next(deadline).await {
                Wake::Changed => {}
                Wake::Late => {
                    end_wait(waited, false);
                    return Err(Refusal::unavailable(&why));
                }
                Wake::Stopping => return Err(Refusal::stopping()),
            }
        }
    }

    /// Sends the request to where the primary is. It comes back if nothing of it was sent.
    async fn ask_primary(
        &mut self,
        place: Place,
        mut request: Request<Body>,
    ) -> Result<Sent, Refusal> {
        let url = match place {
            Place::Proxy(url) => url,
            Place::Host(host) => return replay(&host).map(Sent::Outcome),
            Place::Here | Place::Nowhere(_) | Place::Never(_) => {
                return Err(Refusal::unavailable("no primary available"));
            }
        };
        let (proxy, client) = (self.proxy.clone(), self.client.clone());
        let state = &proxy.state;
        let upstream = proxy.primary(&url).map_err(|error| {
            Refusal::unavailable(&format!("the primary's proxy URL {url}: {}", chain_text(&error)))
        })?;
        let passed = [&self.passed[..], &[state.node_id()]].concat();
        headers::set_passed(request.headers_mut(), state.cluster_id().as_deref(), &passed);
        let gone = gone(state, &client.stop, proxy.options.primary_wait);
        let dead = async {
            state.until_former(&url).await;
            upstream.until_dead().await;
        };
        let sent = tokio::select! {
            sent = self.send(&upstream, request) => sent,
            () = async { tokio::select! { () = gone => {}, () = dead => {} } } => {
                let text = format!(
                    "the primary went away before it answered: whether the request took effect is \
                     unknown ({})",
                    upstream.address()
                );
                return Err(Refusal::new(StatusCode::BAD_GATEWAY, &text));
            }
        };
        match sent {
            Ok(response) => Ok(Sent::Outcome(("forwarded", response))),
            Err(SendError::Connect { address, source, request }) => {
                let why = format!("connect to the primary's proxy at {address}: {source}");
                Ok(Sent::Back(*request, why))
            }
            Err(error) => Err(Refusal::broken(&error)),
        }
    }

    async fn ask_application(
        &mut self,
        request: Request<Body>,
        cookie: Cookie,
    ) -> Result<Outcome, Refusal> {
        let proxy = self.proxy.clone();
        let response = self.send(&proxy.application, request).await;
        let mut response = response.map_err(|error| Refusal::broken(&error))?;
        let txid = match cookie {
            Cookie::Keep => None,
            Cookie::Set => proxy.state.txid(),
            Cookie::Reset => Some(proxy.state.txid().unwrap_or_default()),
        };
        if let Some(txid) = txid {
            cookie::set(response.headers_mut(), txid, SystemTime::now());
        }
        Ok(("target", response))
    }

    async fn send(
        &mut self,
        upstream: &Arc<Upstream>,
        request: Request<Body>,
    ) -> Result<Response<Body>, SendError> {
        let (mut request, asker) = expect::hold_back(request);
        headers::frame(&mut request);
        let repeat = if self.kind == Kind::Write { Repeat::Never } else { Repeat::Once };
        let sent = upstream.send(request, repeat).await;
        if let (Err(SendError::Connect { .. }), Some(asker)) = (&sent, &asker) {
            // Where the request goes next its body is held back again.
            asker.ask();
        }
        let mut response = sent?;
        let status = response.status();
        let upgrades =
            matches!(status, StatusCode::SWITCHING_PROTOCOLS | StatusCode::UPGRADE_REQUIRED);
        let protocol = headers::upgrade(response.headers()).filter(|_| upgrades);
        headers::strip(response.headers_mut(), protocol);
        *response.version_mut() = Version::HTTP_11;
        if status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(self.tunnel(response));
        }
        Ok(response.map(|body| {
            let body = body.map_err(|error| {
                tracing::debug!(%error, "answer broken off");
                Aborted
            });
            Hold::new(body, asker).boxed_unsync()
        }))
    }

    /// Joins the two sides, once our answer has gone out, until either ends or the node stops.
    fn tunnel(&mut self, mut response: Response<Incoming>) -> Response<Body> {
        let Some(ours) = self.upgrade.take() else {
            let text = "the application switches protocols unasked";
            return Refusal::new(StatusCode::BAD_GATEWAY, text).into();
        };
        let theirs = hyper::upgrade::on(&mut response);
        self.client.pace.tunnel();
        let (mut stop, counted) = (self.client.stop.clone(), self.proxy.options.metrics.begin());
        // It stays one of the connections that there may be.
        let held = (counted, self.client.clone());
        tokio::spawn(async move {
            let _held = held;
            let (Ok(ours), Ok(theirs)) = tokio::join!(ours, theirs) else { return };
            let (mut ours, mut theirs) = (TokioIo::new(ours), TokioIo::new(theirs));
            tokio::select! {
                // Its error is that of a peer that left.
                _ = tokio::io::copy_bidirectional(&mut ours, &mut theirs) => {}
                () = stopped(&mut stop) => {}
            }
        });
        response.map(|_| body::empty())
    }
}

/// Waits until this node has been without a primary for `wait`. Where it has become the primary itself the former one
/// may still answer, and nothing tells that it is gone: it gets longer.
async fn gone(state: &State, stop: &Stop, wait: Duration) {
    let mut since = None;
    loop {
        let mut changes = state.primary_changes(stop);
        let patience = match state.is_linked() {
            true => None,
            false if state.is_primary() => Some(wait.max(limits::FORMER_PRIMARY_WAIT)),
            false => Some(wait),
        };
        since = patience.map(|_| since.unwrap_or_else(Instant::now));
        let deadline = since.zip(patience).map(|(since, patience)| since + patience);
        match changes.next(deadline).await {
            Wake::Changed => {}
            Wake::Late => return,
            // The request is cut off.
            Wake::Stopping => std::future::pending().await,
        }
    }
}

/// Has Fly.io play the request again where the primary is.
fn replay(host: &str) -> Result<Outcome, Refusal> {
    let instance = HeaderValue::from_str(&format!("instance={host}"));
    let instance =
        instance.map_err(|_| Refusal::unavailable("the primary's host name is not text"))?;
    let mut response = Response::new(body::empty());
    response.headers_mut().insert(FLY_REPLAY, instance);
    Ok(("replayed", response))
}

fn end_wait(wait: Option<ProxyWait>, is_over: bool) {
    if let Some(wait) = wait {
        wait.end(is_over);
    }
}

/// An answer of the proxy itself that says no.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) outcome: &'static str,
    pub(super) status: StatusCode,
    pub(super) text: String,
}

impl Refusal {
    fn new(status: StatusCode, text: &str) -> Refusal {
        Refusal { outcome: "refused", status, text: format!("Proxy error: {text}") }
    }

    fn unavailable(text: &str) -> Refusal {
        let refusal = Refusal::new(StatusCode::SERVICE_UNAVAILABLE, text);
        Refusal { outcome: "unavailable", ..refusal }
    }

    pub(super) fn not_ready() -> Refusal {
        Refusal::unavailable("the node is not ready")
    }

    fn stopping() -> Refusal {
        Refusal::unavailable("the node stops")
    }

    fn timeout() -> Refusal {
        let (status, text) = (StatusCode::GATEWAY_TIMEOUT, "Proxy timeout".to_owned());
        Refusal { outcome: "timeout", status, text }
    }

    fn broken(error: &SendError) -> Refusal {
        let refusal = Refusal::new(StatusCode::BAD_GATEWAY, &chain_text(error));
        Refusal { outcome: "failed", ..refusal }
    }
}

impl From<Refusal> for Response<Body> {
    fn from(refusal: Refusal) -> Response<Body> {
        let mut response = plain(refusal.status, refusal.text.replace('\n', " ") + "\n");
        let headers = response.headers_mut();
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        if refusal.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
