//! Bodies of requests and responses that are made while they are sent.
//!
//! [`channel`] gives a body and its writing end, with a short queue of pieces between them. The
//! invariant: a body ends cleanly only if its writer said so ([`Sender::finish`]). A writer that was
//! dropped before (an error, a lost lease) breaks the body off, which resets the HTTP/2 stream, or
//! leaves an HTTP/1.1 body without its end, so that no reader takes half a file for a whole one.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::body::{Frame, SizeHint};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::timeout;

use crate::engine::chain_text;
use crate::limits;

/// Any body that we send.
pub type Body = UnsyncBoxBody<Bytes, Aborted>;

/// The writer of the body gave up.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("body was not completed")]
pub struct Aborted;

/// The reader of the body went away, or took nothing for [`limits::BODY_STALL_WAIT`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The connection is closed or the request was cancelled.
    #[error("peer went away")]
    Gone,
    /// The connection is open but nothing moves.
    #[error("peer takes no data")]
    Stalled,
}

/// A body that is all there.
pub fn full(data: impl Into<Bytes>) -> Body {
    Full::new(data.into()).map_err(|never| match never {}).boxed_unsync()
}

/// No body.
pub fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// A body and the end that writes it.
pub fn channel() -> (Sender, Body) {
    let (pieces, queue) = mpsc::channel(limits::BODY_QUEUE_PIECES);
    let finished = Arc::new(AtomicBool::new(false));
    let body = ChannelBody { queue, finished: finished.clone(), ended: false };
    (Sender { pieces, finished }, body.boxed_unsync())
}

/// The writing end of a body.
#[derive(Debug)]
pub struct Sender {
    pieces: mpsc::Sender<Bytes>,
    finished: Arc<AtomicBool>,
}

impl Sender {
    /// Queues a piece, at best of [`limits::BODY_PIECE_BYTES`]; waits while the queue is full.
    pub async fn send(&self, piece: Bytes) -> Result<(), SendError> {
        let piece = match self.pieces.try_send(piece) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Closed(_)) => return Err(SendError::Gone),
            Err(TrySendError::Full(piece)) => piece,
        };
        match timeout(limits::BODY_STALL_WAIT, self.pieces.send(piece)).await {
            Ok(sent) => sent.map_err(|_| SendError::Gone),
            Err(_) => Err(SendError::Stalled),
        }
    }

    /// Waits until the reader is gone.
    pub async fn closed(&self) {
        self.pieces.closed().await;
    }

    /// Ends the body cleanly after what was queued.
    pub fn finish(self) {
        self.finished.store(true, Ordering::Release);
    }
}

/// The next data of a body that a peer sends; `None` at its end. In words, why there is none: it broke off,
/// or nothing came for [`limits::BODY_STALL_WAIT`].
pub(super) async fn next_data<B>(body: &mut B) -> Result<Option<Bytes>, String>
where
    B: hyper::body::Body<Data = Bytes, Error: std::error::Error> + Unpin,
{
    loop {
        let frame = timeout(limits::BODY_STALL_WAIT, body.frame()).await;
        match frame.map_err(|_| "no data for too long".to_owned())? {
            None => return Ok(None),
            Some(Err(error)) => return Err(chain_text(&error)),
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

/// A body that keeps a value until it is over or given up.
pub(super) struct Hold<B, T> {
    body: B,
    _held: T,
}

impl<B, T> Hold<B, T> {
    pub(super) fn new(body: B, held: T) -> Hold<B, T> {
        Hold { body, _held: held }
    }
}

impl<B: hyper::body::Body + Unpin, T: Unpin> hyper::body::Body for Hold<B, T> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

struct ChannelBody {
    queue: mpsc::Receiver<Bytes>,
    finished: Arc<AtomicBool>,
    /// Whether the end or the error has been given out.
    ended: bool,
}

impl hyper::body::Body for ChannelBody {
    type Data = Bytes;
    type Error = Aborted;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Aborted>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.queue.poll_recv(context).map(|piece| match piece {
            Some(piece) => Some(Ok(Frame::data(piece))),
            None => {
                self.ended = true;
                (!self.finished.load(Ordering::Acquire)).then_some(Err(Aborted))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_finished_body_has_all_its_pieces() {
        let (sender, body) = channel();
        sender.send(Bytes::from_static(b"one ")).await.unwrap();
        sender.send(Bytes::from_static(b"two")).await.unwrap();
        sender.finish();
        assert_eq!(body.collect().await.unwrap().to_bytes(), "one two");
    }

    #[tokio::test]
    async fn a_dropped_writer_breaks_the_body_off() {
        let (sender, mut body) = channel();
        sender.send(Bytes::from_static(b"half")).await.unwrap();
        drop(sender);
        assert!(body.frame().await.is_some_and(|frame| frame.is_ok()));
        assert!(body.frame().await.is_some_and(|frame| frame.is_err()));
        assert!(body.frame().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_takes_nothing_stalls_the_writer_for_a_limited_time() {
        let (sender, body) = channel();
        for _ in 0..limits::BODY_QUEUE_PIECES {
            sender.send(Bytes::from_static(b"x")).await.unwrap();
        }
        assert_eq!(sender.send(Bytes::from_static(b"x")).await, Err(SendError::Stalled));
        drop(body);
        assert_eq!(sender.send(Bytes::from_static(b"x")).await, Err(SendError::Gone));
    }
}
