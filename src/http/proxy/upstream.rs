//! Connections to one server, the application or the primary's proxy, and one request on one of them.
//!
//! HTTP/1.1. A connection that is done with its answer is kept for the next request. Connections go
//! straight to the address: proxies of the environment do not count. Invariants: a request is sent
//! again only if not a byte of it was sent before, or once, on a new connection, if it has no body, a
//! method that changes nothing and is no write by the configuration; a request that could not be sent
//! comes back with the error.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep, timeout_at};

use crate::http::body::{self, Body};
use crate::http::security::Security;
use crate::http::socket::notice_death;
use crate::http::url::{self, Url};
use crate::http::wire::Wire;
use crate::limits;

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Address {
    /// `HOST:PORT`.
    Tcp(String),
    /// A socket file.
    Unix(PathBuf),
    /// Another node's proxy.
    Node(Url),
}

impl Address {
    /// The application's address as in the configuration: `HOST:PORT`, `:PORT` or `unix:PATH`.
    pub(super) fn of_target(target: &str) -> Address {
        match (target.strip_prefix("unix:"), target.strip_prefix(':')) {
            (Some(path), _) => Address::Unix(path.into()),
            (None, Some(port)) => Address::Tcp(format!("localhost:{port}")),
            (None, None) => Address::Tcp(target.to_owned()),
        }
    }

    /// The address in a URL of another node.
    pub(super) fn of_url(url: &str) -> Result<Address, url::Error> {
        Url::new(url).map(Address::Node)
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Tcp(address) => address.fmt(f),
            Address::Unix(path) => path.display().fmt(f),
            Address::Node(url) => url.address().fmt(f),
        }
    }
}

/// Whose server it is, which says how to treat it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    /// The application beside us. It may not be up yet: a refused connection is tried again.
    Application,
    /// Another node. It may vanish without a word.
    Node,
}

/// Whether a request may be sent again when a connection breaks that had been used before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeat {
    /// It may change something, whatever its method.
    Never,
    /// If its method changes nothing.
    Once,
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum SendError {
    /// Nothing was sent.
    #[error("connect to {address}")]
    Connect {
        address: Address,
        source: io::Error,
        /// The request, for another attempt.
        request: Box<Request<Body>>,
    },
    /// It was sent, in part or as a whole; what came of it is unknown.
    #[error("no answer from {address}")]
    Broken { address: Address, source: hyper::Error },
}

/// The connections to one server.
pub(super) struct Upstream {
    address: Address,
    peer: Peer,
    security: Security,
    /// Without a request now; the last one used last.
    idle: Mutex<VecDeque<Idle>>,
}

struct Idle {
    sender: SendRequest<Body>,
    since: Instant,
}

/// A connection, new or used before.
struct Connection {
    sender: SendRequest<Body>,
    is_new: bool,
}

impl Upstream {
    pub(super) fn new(address: Address, peer: Peer, security: &Security) -> Arc<Upstream> {
        let security = security.clone();
        Arc::new(Upstream { address, peer, security, idle: Mutex::default() })
    }

    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// Waits until this server's host is dead: see [`until_dead`].
    pub(super) async fn until_dead(&self) {
        until_dead(&self.address.to_string()).await;
    }

    /// Sends a request and waits for the head of its answer.
    pub(super) async fn send(
        self: &Arc<Self>,
        mut request: Request<Body>,
        repeat: Repeat,
    ) -> Result<Response<Incoming>, SendError> {
        let (mut unused, mut is_repeated) = (0, false);
        loop {
            // The other kept connections may be as dead as the one that broke.
            let idle = if is_repeated { None } else { self.take_idle() };
            let mut connection = match self.connection(idle).await {
                Ok(connection) => connection,
                Err(source) => return Err(self.connect_error(source, request)),
            };
            let may_repeat = !connection.is_new && repeat == Repeat::Once;
            let copy = if may_repeat { repeatable(&request) } else { None };
            let mut error = match connection.sender.try_send_request(request).await {
                Ok(response) => {
                    self.clone().keep(connection.sender);
                    return Ok(response);
                }
                Err(error) => error,
            };
            unused += u32::from(connection.is_new);
            let may_retry = unused < limits::PROXY_SEND_ATTEMPTS;
            request = match (error.take_message(), copy) {
                (Some(request), _) if may_retry => request,
                (Some(request), _) => {
                    return Err(self.connect_error(io::Error::other(error.into_error()), request));
                }
                // An idle connection that the server closed just now.
                (None, Some(copy)) if is_closed(error.error()) => {
                    is_repeated = true;
                    Request::from_parts(copy, body::empty())
                }
                (None, _) => {
                    let address = self.address.clone();
                    return Err(SendError::Broken { address, source: error.into_error() });
                }
            };
        }
    }

    fn connect_error(&self, source: io::Error, request: Request<Body>) -> SendError {
        SendError::Connect { address: self.address.clone(), source, request: Box::new(request) }
    }

    /// The `idle` connection, or a new one.
    async fn connection(&self, idle: Option<SendRequest<Body>>) -> io::Result<Connection> {
        match idle {
            Some(sender) => Ok(Connection { sender, is_new: false }),
            None => Ok(Connection { sender: self.connect().await?, is_new: true }),
        }
    }

    fn take_idle(&self) -> Option<SendRequest<Body>> {
        let mut idle = self.idle.lock().unwrap();
        let mut taken = std::iter::from_fn(|| idle.pop_back());
        taken.find(Idle::is_good).map(|idle| idle.sender)
    }

    /// Keeps a connection, once it is done with its present answer, for the next request.
    fn keep(self: Arc<Self>, mut sender: SendRequest<Body>) {
        if sender.is_ready() {
            return self.put_idle(sender);
        }
        tokio::spawn(async move {
            // An error means that the connection ended, or serves another protocol now.
            if sender.ready().await.is_ok() {
                self.put_idle(sender);
            }
        });
    }

    fn put_idle(&self, sender: SendRequest<Body>) {
        let mut idle = self.idle.lock().unwrap();
        while idle.front().is_some_and(|oldest| !oldest.is_good())
            || idle.len() >= limits::PROXY_IDLE_CONNECTIONS_MAX
        {
            idle.pop_front();
        }
        idle.push_back(Idle { sender, since: Instant::now() });
    }

    async fn connect(&self) -> io::Result<SendRequest<Body>> {
        let wait = match self.peer {
            Peer::Application => limits::APPLICATION_WAIT,
            Peer::Node => limits::CONNECT_WAIT,
        };
        let deadline = Instant::now() + wait;
        let socket = loop {
            let connected = timeout_at(deadline, self.open()).await;
            match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Err(error) if self.is_early(&error) && Instant::now() < deadline => {
                    sleep(limits::APPLICATION_RETRY).await;
                }
                connected => break connected?,
            }
        };
        let (sender, connection) = http1::Builder::new()
            .preserve_header_case(true)
            .max_headers(limits::PROXY_HEADERS_MAX)
            .max_header_size(limits::PROXY_HEAD_BYTES_MAX)
            .max_buf_size(limits::PROXY_BUFFER_BYTES)
            .handshake(TokioIo::new(socket))
            .await
            .map_err(io::Error::other)?;
        // Its errors come out of the requests that they end.
        tokio::spawn(async move { drop(connection.with_upgrades().await) });
        Ok(sender)
    }

    /// Whether the application may just not be listening yet.
    fn is_early(&self, error: &io::Error) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotFound};
        self.peer == Peer::Application && matches!(error.kind(), ConnectionRefused | NotFound)
    }

    async fn open(&self) -> io::Result<Wire> {
        match &self.address {
            Address::Unix(path) => UnixStream::connect(path).await.map(Wire::Unix),
            Address::Tcp(address) => self.connect_to(address).await.map(Wire::Tcp),
            Address::Node(url) => {
                let socket = self.connect_to(&url.address()).await?;
                self.security.dial(url, socket).await
            }
        }
    }

    async fn connect_to(&self, address: &str) -> io::Result<TcpStream> {
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        if self.peer == Peer::Node {
            notice_death(&socket)?;
        }
        Ok(socket)
    }
}

impl Idle {
    fn is_good(&self) -> bool {
        !self.sender.is_closed() && self.since.elapsed() < limits::PROXY_IDLE_LIFE
    }
}

/// Waits until the host at `address` (`HOST:PORT`) has taken or refused no new connection for [`limits::DEAD_HOST_WAIT`].
/// Of an old connection, with something on it that was not acknowledged, TCP says so only after a quarter of an hour.
async fn until_dead(address: &str) {
    use io::ErrorKind::{
        ConnectionRefused, ConnectionReset, HostUnreachable, InvalidInput, NetworkUnreachable,
    };
    let mut silent_since = None;
    loop {
        let since = *silent_since.get_or_insert_with(Instant::now);
        match timeout_at(since + limits::DEAD_HOST_WAIT, TcpStream::connect(address)).await {
            Err(_) => return,
            Ok(Err(error)) if matches!(error.kind(), ConnectionRefused | ConnectionReset) => {
                silent_since = None;
            }
            // Said at once, so the time that is over does not count.
            Ok(Err(error))
                if matches!(error.kind(), HostUnreachable | NetworkUnreachable | InvalidInput) =>
            {
                if since.elapsed() >= limits::DEAD_HOST_WAIT {
                    return;
                }
            }
            Ok(Err(_)) => {}
            Ok(Ok(_)) => silent_since = None,
        }
        sleep(limits::DEAD_HOST_PERIOD).await;
    }
}

/// The head of a request that may be sent twice.
fn repeatable(request: &Request<Body>) -> Option<Parts> {
    let is_safe = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    (is_safe && request.body().is_end_stream()).then(|| {
        let mut copy = Request::new(());
        *copy.method_mut() = request.method().clone();
        *copy.uri_mut() = request.uri().clone();
        *copy.headers_mut() = request.headers().clone();
        *copy.extensions_mut() = request.extensions().clone();
        copy.into_parts().0
    })
}

/// Whether the server closed the connection instead of answering.
fn is_closed(error: &hyper::Error) -> bool {
    use std::error::Error as _;
    let source = error.source().and_then(|source| source.downcast_ref::<io::Error>());
    let reset = source.is_some_and(|source| {
        matches!(source.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
    });
    error.is_incomplete_message() || error.is_canceled() || reset
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;
    use std::thread::{JoinHandle, spawn};

    use tokio::net::TcpSocket;

    use super::*;

    const SHORT: std::time::Duration = std::time::Duration::from_millis(100);
    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

    /// Reads the head of a request, if one comes.
    fn read_head(stream: &mut impl io::Read) -> bool {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            if !matches!(stream.read(&mut byte), Ok(1)) {
                return false;
            }
            head.push(byte[0]);
        }
        true
    }

    /// An address that refuses connections, as long as the socket is there: nobody else gets its port.
    fn nobody() -> (TcpSocket, String) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = socket.local_addr().unwrap().to_string();
        (socket, address)
    }

    /// Neither taken nor refused, as by a host that is gone: more connections wait already than the listener has room
    /// for.
    #[tokio::test(start_paused = true)]
    async fn a_host_that_answers_no_connection_is_dead() {
        let listener = TcpSocket::new_v4().unwrap();
        listener.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = listener.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let mut waiting = Vec::new();
        while let Ok(stream) = std::net::TcpStream::connect_timeout(&address, SHORT) {
            waiting.push(stream);
        }
        let begun = Instant::now();
        until_dead(&address.to_string()).await;
        assert_eq!(begun.elapsed(), limits::DEAD_HOST_WAIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_refuses_connections_is_alive() {
        let (_bound, address) = nobody();
        let dead = timeout_at(Instant::now() + 9 * limits::DEAD_HOST_WAIT, until_dead(&address));
        assert!(dead.await.is_err());
    }

    /// A server that answers on each connection as often as its place in `answers` says, reads one
    /// more request and closes; how many requests it has read.
    fn server(answers: &'static [usize]) -> (Address, JoinHandle<usize>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp(listener.local_addr().unwrap().to_string());
        let serve = move || {
            let mut read = 0;
            for count in answers {
                let (mut stream, _) = listener.accept().unwrap();
                for _ in 0..*count {
                    read += usize::from(read_head(&mut stream));
                    stream.write_all(ANSWER).unwrap();
                }
                read += usize::from(read_head(&mut stream));
            }
            read
        };
        (address, spawn(serve))
    }

    async fn ask(upstream: &Arc<Upstream>, method: Method) -> Result<String, String> {
        ask_with(upstream, method, Repeat::Once).await
    }

    async fn ask_with(
        upstream: &Arc<Upstream>,
        method: Method,
        repeat: Repeat,
    ) -> Result<String, String> {
        let mut request = Request::new(body::empty());
        *request.method_mut() = method;
        request.headers_mut().insert("host", hyper::header::HeaderValue::from_static("a"));
        match upstream.send(request, repeat).await {
            Ok(response) => {
                use http_body_util::BodyExt as _;
                let bytes = response.into_body().collect().await.unwrap().to_bytes();
                Ok(String::from_utf8(bytes.to_vec()).unwrap())
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// Waits for a server; meanwhile connections end.
    async fn join<T: Send + 'static>(server: JoinHandle<T>) -> T {
        tokio::task::spawn_blocking(|| server.join().unwrap()).await.unwrap()
    }

    /// Waits until the connection of the last answer is kept.
    async fn wait_idle(upstream: &Upstream) {
        wait_idle_count(upstream, 1).await;
    }

    async fn wait_idle_count(upstream: &Upstream, count: usize) {
        while upstream.idle.lock().unwrap().len() < count {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_changes_nothing_is_sent_again_on_another_connection() {
        let (address, server) = server(&[1, 1]);
        let upstream = Upstream::new(address, Peer::Application, &Security::default());
        assert_eq!(ask(&upstream, Method::GET).await, Ok("ok".to_owned()));
        wait_idle(&upstream).await;
        // The first connection is closed after its second request.
        assert_eq!(ask(&upstream, Method::GET).await, Ok("ok".to_owned()));
        drop(upstream);
        assert_eq!(join(server).await, 3);
    }

    #[tokio::test]
    async fn what_changes_something_is_sent_once() {
        let (address, server) = server(&[1]);
        let upstream = Upstream::new(address.clone(), Peer::Application, &Security::default());
        assert_eq!(ask(&upstream, Method::POST).await, Ok("ok".to_owned()));
        wait_idle(&upstream).await;
        let error = format!("no answer from {address}");
        assert_eq!(ask(&upstream, Method::POST).await, Err(error));
        assert_eq!(join(server).await, 2);
    }

    #[tokio::test]
    async fn what_counts_as_a_write_is_sent_once_whatever_its_method() {
        let (address, server) = server(&[1]);
        let upstream = Upstream::new(address.clone(), Peer::Application, &Security::default());
        assert_eq!(ask(&upstream, Method::GET).await, Ok("ok".to_owned()));
        wait_idle(&upstream).await;
        let error = format!("no answer from {address}");
        assert_eq!(ask_with(&upstream, Method::GET, Repeat::Never).await, Err(error));
        assert_eq!(join(server).await, 2);
    }

    #[tokio::test]
    async fn what_changes_nothing_is_sent_twice_at_most() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp(listener.local_addr().unwrap().to_string());
        let server = spawn(move || {
            // Two answers at a time, so that two connections are kept. All end with their next request.
            let mut kept = [(); 2].map(|()| listener.accept().unwrap().0);
            kept.iter_mut().for_each(|stream| assert!(read_head(stream)));
            kept.iter_mut().for_each(|stream| stream.write_all(ANSWER).unwrap());
            let last = spawn(move || read_head(&mut listener.accept().unwrap().0));
            let kept = kept.map(|mut stream| spawn(move || read_head(&mut stream)));
            let read = kept.into_iter().chain([last]).map(|thread| thread.join().unwrap());
            read.filter(|is_read| *is_read).count()
        });
        let upstream = Upstream::new(address.clone(), Peer::Application, &Security::default());
        let both = tokio::join!(ask(&upstream, Method::GET), ask(&upstream, Method::GET));
        assert_eq!(both, (Ok("ok".to_owned()), Ok("ok".to_owned())));
        wait_idle_count(&upstream, 2).await;
        let error = format!("no answer from {address}");
        assert_eq!(ask(&upstream, Method::GET).await, Err(error));
        drop(upstream);
        assert_eq!(join(server).await, 2);
    }

    #[tokio::test]
    async fn what_was_never_sent_comes_back() {
        let (_bound, address) = nobody();
        let upstream = Upstream::new(Address::Tcp(address), Peer::Node, &Security::default());
        let request = Request::post("/x").body(body::full("text")).unwrap();
        match upstream.send(request, Repeat::Never).await {
            Err(SendError::Connect { request, .. }) => assert_eq!(request.uri(), "/x"),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn an_application_may_listen_on_a_socket_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app.sock");
        let target = format!("unix:{}", path.display());
        let upstream =
            Upstream::new(Address::of_target(&target), Peer::Application, &Security::default());
        // It comes a little later than the first request.
        let asked = tokio::spawn(async move { ask(&upstream, Method::GET).await });
        tokio::task::yield_now().await;
        let listener = UnixListener::bind(&path).unwrap();
        let server = spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            assert!(read_head(&mut stream));
            stream.write_all(ANSWER).unwrap();
            stream.read_to_end(&mut Vec::new()).unwrap();
        });
        assert_eq!(asked.await.unwrap(), Ok("ok".to_owned()));
        join(server).await;
    }

    #[test]
    fn a_target_is_an_address() {
        let tcp = |address: &str| Address::Tcp(address.to_owned());
        assert_eq!(Address::of_target(":8081"), tcp("localhost:8081"));
        assert_eq!(Address::of_target("10.0.0.1:80"), tcp("10.0.0.1:80"));
        assert_eq!(Address::of_target("unix:/run/a"), Address::Unix("/run/a".into()));
        assert_eq!(Address::of_url("http://[::1]:8080/x").unwrap().to_string(), "[::1]:8080");
    }
}
