//! The client against peers that are not ours: LiteFS as recorded, and broken ones.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body, Frame as BodyFrame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use litefs::http::client::{Client, Error, Stream, StreamRequest};
use litefs::http::frame::{self, Decoder, Event, Frame};
use litefs::http::security::Security;
use ltx::NodeId;

use super::node::identity;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::mpsc::UnboundedReceiver;

const RAW_FROM_3: &[u8] = include_bytes!("../fixtures/stream/raw-from-3.response");
const LZ4_FROM_ZERO: &[u8] = include_bytes!("../fixtures/stream/lz4-from-zero.response");
const REQUEST_FROM_3: &[u8] = include_bytes!("../fixtures/stream/raw-from-3.request");

/// What comes after the bytes of an answer.
#[derive(Debug, Clone, Copy)]
pub enum Then {
    /// A clean end.
    End,
    /// The stream is reset.
    Reset,
    /// The stream stays open.
    Silence,
}

/// Bytes, then what comes after them.
struct Script {
    data: Option<Bytes>,
    then: Then,
}

impl Body for Script {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<BodyFrame<Bytes>, std::io::Error>>> {
        use std::task::Poll;
        match (self.data.take(), self.then) {
            (Some(data), _) => Poll::Ready(Some(Ok(BodyFrame::data(data)))),
            (None, Then::End) => Poll::Ready(None),
            (None, Then::Reset) => Poll::Ready(Some(Err(std::io::ErrorKind::Other.into()))),
            (None, Then::Silence) => Poll::Pending,
        }
    }
}

pub type Answer = Response<UnsyncBoxBody<Bytes, std::io::Error>>;

/// A peer that gives `answer` to every request; ends with the runtime.
pub async fn peer(
    answer: impl Fn(Request<Bytes>) -> Answer + Clone + Send + Sync + 'static,
) -> Client {
    peer_that_takes(Duration::ZERO, answer).await
}

/// The same, which works on each answer for that long.
async fn peer_that_takes(
    time: Duration,
    answer: impl Fn(Request<Bytes>) -> Answer + Clone + Send + Sync + 'static,
) -> Client {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            socket.set_nodelay(true).unwrap();
            let answer = answer.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let answer = answer.clone();
                async move {
                    let (head, body) = request.into_parts();
                    let body = body.collect().await.unwrap().to_bytes();
                    let _ = tokio::time::timeout(time, std::future::pending::<()>()).await;
                    Ok::<_, Infallible>(answer(Request::from_parts(head, body)))
                }
            });
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(builder.serve_connection(TokioIo::new(socket), service));
        }
    });
    client(address)
}

fn client(address: SocketAddr) -> Client {
    Client::new(&format!("http://{address}"), &Security::default()).unwrap()
}

pub fn script(data: impl Into<Bytes>, then: Then) -> Answer {
    let body = Script { data: Some(data.into()), then };
    Response::new(body.boxed_unsync())
}

/// What comes through a channel, until that ends.
struct Live(UnboundedReceiver<Bytes>);

impl Body for Live {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<BodyFrame<Bytes>, std::io::Error>>> {
        self.0.poll_recv(context).map(|data| data.map(|data| Ok(BodyFrame::data(data))))
    }
}

pub fn live(data: UnboundedReceiver<Bytes>) -> Answer {
    Response::new(Live(data).boxed_unsync())
}

/// Every event of a stream with no positions, or the error that ended it.
async fn events(client: &Client) -> Result<Vec<Event>, Error> {
    let mut stream = open(client).await?;
    let mut events = Vec::new();
    while let Some(event) = stream.next().await? {
        events.push(event);
    }
    Ok(events)
}

async fn open(client: &Client) -> Result<Stream, Error> {
    client.stream(StreamRequest { identity: &identity(1), positions: &[], filter: &[] }).await
}

/// The frames of a recording, without its data.
fn frames(events: &[Event]) -> Vec<&Frame> {
    let mut frames = Vec::new();
    for event in events {
        if let Event::Frame(frame) = event {
            frames.push(frame);
        }
    }
    frames
}

fn data(events: &[Event]) -> Vec<u8> {
    let data = events.iter().filter_map(|event| match event {
        Event::LtxData(data) => Some(&data[..]),
        _ => None,
    });
    data.collect::<Vec<_>>().concat()
}

#[tokio::test]
async fn a_recorded_stream_is_read_to_its_end() {
    let peer = peer(|_| script(RAW_FROM_3, Then::End)).await;
    let read = events(&peer).await.unwrap();
    let mut decoder = Decoder::new();
    decoder.push(Bytes::from_static(RAW_FROM_3));
    let mut expected = Vec::new();
    while let Some(event) = decoder.next().unwrap() {
        expected.push(event);
    }
    assert_eq!(frames(&read), frames(&expected));
    assert!(data(&read) == data(&expected));
}

#[tokio::test]
async fn the_request_is_the_one_that_litefs_sends() {
    let peer = peer(|request: Request<Bytes>| {
        assert_eq!(request.uri().path_and_query().unwrap(), "/stream?filter=wal.db%2Cdelete.db");
        assert_eq!(request.headers()["litefs-id"], "00000000000000AB");
        assert_eq!(request.body(), REQUEST_FROM_3);
        let mut answer = script(Bytes::new(), Then::End);
        answer.headers_mut().insert("litefs-id", "CD".parse().unwrap());
        answer.headers_mut().insert("litefs-cluster-id", "LFSC0123456789ABCDEF".parse().unwrap());
        answer
    })
    .await;
    let positions = frame::decode_positions(REQUEST_FROM_3).unwrap();
    let positions: Vec<_> = positions.iter().map(|(name, pos)| (name.as_str(), *pos)).collect();
    let filter = ["wal.db".to_owned(), "delete.db".to_owned()];
    let request =
        StreamRequest { identity: &identity(0xab), positions: &positions, filter: &filter };
    let mut stream = peer.stream(request).await.unwrap();
    assert_eq!(stream.node_id, Some(NodeId(0xcd)));
    assert_eq!(stream.cluster_id.as_deref(), Some("LFSC0123456789ABCDEF"));
    assert!(stream.next().await.unwrap().is_none());
}

#[tokio::test]
async fn a_stream_cut_at_any_byte_is_whole_frames_or_an_error() {
    let cut = |request: Request<Bytes>| {
        let end: usize =
            request.uri().query().unwrap().split_once("cut").unwrap().1.parse().unwrap();
        script(&LZ4_FROM_ZERO[..end], Then::End)
    };
    let peer = peer(cut).await;
    let mut whole = 0;
    for end in 0..LZ4_FROM_ZERO.len() {
        let filter = [format!("cut{end}")];
        let request = StreamRequest { identity: &identity(1), positions: &[], filter: &filter };
        let mut stream = peer.stream(request).await.unwrap();
        let error = loop {
            match stream.next().await {
                Ok(Some(_)) => {}
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        match error {
            None => whole += 1,
            Some(Error::Frame { source: frame::Error::UnexpectedEnd { .. }, .. }) => {}
            Some(error) => panic!("cut at {end}: {error}"),
        }
    }
    assert_eq!(whole, 7, "before each of three files, ready and three heartbeats");
}

#[tokio::test]
async fn a_reset_stream_is_an_error_even_between_frames() {
    let peer = peer(|_| script(LZ4_FROM_ZERO, Then::Reset)).await;
    assert!(matches!(events(&peer).await, Err(Error::Http { .. })));
}

#[track_caller]
fn text(result: Result<Vec<Event>, Error>) -> String {
    let error = result.unwrap_err();
    let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}

#[tokio::test]
async fn frames_that_nobody_may_send_end_the_stream() {
    let check = async |data: &'static [u8], expected: &str| {
        let peer = peer(move |_| script(data, Then::Silence)).await;
        let text = text(events(&peer).await);
        assert!(text.ends_with(expected), "{text}");
    };
    check(&[0, 0, 0, 9], ": invalid stream frame type: 0x9").await;
    check(
        b"stream error: db=x\n\0\0\0\x03",
        ": invalid stream frame type: 0x73747265 (\"stream error: db=x\")",
    )
    .await;
    check(
        &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0, 0, 0],
        ": database name of 4278190080 bytes exceeds 255",
    )
    .await;
    check(&[0, 0, 0, 5, 0, 0, 2, 0], ": lease id of 512 bytes exceeds 256").await;
}

#[tokio::test]
async fn a_silent_primary_is_dead_after_five_heartbeats() {
    let begin = Instant::now();
    let peer = peer(|_| script(LZ4_FROM_ZERO, Then::Silence)).await;
    let error = events(&peer).await.unwrap_err();
    assert!(matches!(error, Error::Silence { .. }), "{error}");
    assert!(begin.elapsed() >= Duration::from_secs(5));
}

#[tokio::test]
async fn a_refusal_carries_its_status_and_its_first_line() {
    let refuse = |_| {
        let text = Full::new(Bytes::from_static(b"lease expired\nmore\n"));
        let mut answer = Response::new(text.map_err(|never| match never {}).boxed_unsync());
        *answer.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        answer
    };
    let peer = peer(refuse).await;
    let text = text(events(&peer).await);
    assert_eq!(text, "invalid response: code=503: lease expired");
}

#[tokio::test]
async fn a_peer_that_is_not_there_is_named() {
    // Bound, so that nobody else gets the port, and not listening.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    let text = text(events(&client(address)).await);
    assert!(text.starts_with(&format!("connect to {address}: ")), "{text}");
}

/// As a node does that waits for a long transaction, or for the exports before this one. The clock jumps
/// to whatever is waited for.
#[tokio::test(start_paused = true)]
async fn an_export_is_waited_for_as_long_as_the_node_works_on_it() {
    let hour = Duration::from_secs(3600);
    let peer = peer_that_takes(hour, |_| script(&b"pages"[..], Then::End)).await;
    let mut exported = Vec::new();
    assert_eq!(peer.export("a.db", &mut exported).await.unwrap(), 5);
    assert_eq!(exported, b"pages");
    let error = peer.info().await.unwrap_err();
    assert!(matches!(error, Error::Silence { what: "response", .. }), "{error}");
}

#[tokio::test]
async fn an_export_of_a_dead_host_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let begin = Instant::now();
    // The kernel takes the connection, and nobody reads it.
    let dead = client(listener.local_addr().unwrap());
    let error = dead.export("a.db", &mut std::io::sink()).await.unwrap_err();
    assert!(matches!(error, Error::Http { what: "call", .. }), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn an_answer_without_end_is_not_collected() {
    let endless = |_| script(vec![b' '; 8 << 20], Then::Silence);
    let peer = peer(endless).await;
    let error = peer.info().await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
}
