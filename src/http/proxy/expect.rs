//! The body of a request that came with `Expect: 100-continue`.
//!
//! Its client sends nothing until it is told to, and our server tells it to when somebody reads the
//! body. So nobody does before the application has asked for it (100), or has said nothing for
//! [`limits::CONTINUE_WAIT`]. If it answers at once, the body is never asked for, and breaks off
//! when the answer is over.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Frame, SizeHint};
use hyper::header::EXPECT;
use hyper::{HeaderMap, Request, StatusCode};
use tokio::sync::oneshot;
use tokio::time::{Sleep, sleep};

use crate::http::body::{Aborted, Body};
use crate::limits;

/// Asks for the body. Dropped when the answer is over, it breaks off a body that was not asked for.
pub(super) struct Asker(Arc<Mutex<Option<oneshot::Sender<()>>>>);

impl Asker {
    /// Whoever wants the body may have it.
    pub(super) fn ask(&self) {
        ask(&self.0);
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.0.lock().unwrap().take();
    }
}

/// Holds back the body of a request whose client waits to be asked for it.
pub(super) fn hold_back(request: Request<Body>) -> (Request<Body>, Option<Asker>) {
    if !is_expected(request.headers()) || request.body().is_end_stream() {
        return (request, None);
    }
    let (sender, asked) = oneshot::channel();
    let asker = Arc::new(Mutex::new(Some(sender)));
    let patience = Box::pin(sleep(limits::CONTINUE_WAIT));
    let mut request = request
        .map(|body| Gate { body, asked: Some(asked), patience, is_broken: false }.boxed_unsync());
    let sender = asker.clone();
    hyper::ext::on_informational(&mut request, move |answer| {
        if answer.status() == StatusCode::CONTINUE {
            ask(&sender);
        }
    });
    (request, Some(Asker(asker)))
}

fn ask(sender: &Mutex<Option<oneshot::Sender<()>>>) {
    if let Some(sender) = sender.lock().unwrap().take() {
        // The body may be gone with its connection.
        let _ = sender.send(());
    }
}

fn is_expected(headers: &HeaderMap) -> bool {
    let value = headers.get(EXPECT).and_then(|value| value.to_str().ok());
    value.is_some_and(|value| value.eq_ignore_ascii_case("100-continue"))
}

struct Gate {
    body: Body,
    /// Resolves when the body is asked for, or never will be; none once it is open.
    asked: Option<oneshot::Receiver<()>>,
    patience: Pin<Box<Sleep>>,
    is_broken: bool,
}

impl Gate {
    /// Whether the body may be read; an error if it never will be.
    fn poll_open(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Aborted>> {
        let Some(asked) = &mut self.asked else { return Poll::Ready(Ok(())) };
        let open = match Pin::new(asked).poll(context) {
            Poll::Ready(open) => open.map_err(|_| Aborted),
            Poll::Pending if self.patience.as_mut().poll(context).is_ready() => Ok(()),
            Poll::Pending => return Poll::Pending,
        };
        self.asked = None;
        Poll::Ready(open)
    }
}

impl hyper::body::Body for Gate {
    type Data = Bytes;
    type Error = Aborted;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Aborted>>> {
        if self.is_broken {
            return Poll::Ready(None);
        }
        match self.poll_open(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Err(error)) => {
                self.is_broken = true;
                Poll::Ready(Some(Err(error)))
            }
            Poll::Ready(Ok(())) => Pin::new(&mut self.body).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.asked.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
