//! A client's connection with the time limits of the configuration, which are those of Go's server.
//!
//! ```text
//! read-header-timeout   from the first byte of a request, or the start of the connection, to the
//!                       end of its head; without one, read-timeout
//! read-timeout          from there to the end of the request's body
//! write-timeout         from the end of its head to the end of the answer
//! idle-timeout          between an answer and the next request; without one, read-timeout
//! ```
//!
//! They count only while the client is waited for: what the application takes to answer, or to take
//! the body, is its own affair. Invariant: a tunnel has no limits.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::http::wire::Wire;

/// The limits; zero is none.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timeouts {
    /// `proxy.read-timeout`.
    pub read: Duration,
    /// `proxy.read-header-timeout`.
    pub read_header: Duration,
    /// `proxy.write-timeout`.
    pub write: Duration,
    /// `proxy.idle-timeout`.
    pub idle: Duration,
}

/// What a connection is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Between an answer and the next request.
    Idle,
    /// In the head of a request.
    Head,
    /// In the body of a request.
    Body,
    /// The request is here; the answer is being made or sent.
    Answer,
    /// No HTTP any more.
    Tunnel,
}

/// What a connection is at, and since when; shared with the requests on it.
pub(super) struct Pace {
    timeouts: Timeouts,
    state: Mutex<State>,
}

struct State {
    phase: Phase,
    /// The start of this request, or of the pause before it.
    since: Instant,
    /// The end of the last request's head.
    head_end: Option<Instant>,
    /// The number of the last request.
    number: u64,
}

/// Kept by the body of a request: dropped, the request is here.
pub(super) struct Reading(Arc<Pace>, u64);

/// Kept by the body of an answer: dropped, the next request may come.
pub(super) struct Answering(Arc<Pace>, u64);

impl Pace {
    /// A new connection.
    pub(super) fn new(timeouts: Timeouts) -> Arc<Pace> {
        let state = State { phase: Phase::Head, since: Instant::now(), head_end: None, number: 0 };
        Arc::new(Pace { timeouts, state: Mutex::new(state) })
    }

    /// The head of a request is here; what follows is its body.
    pub(super) fn begin(self: &Arc<Pace>) -> (Reading, Answering) {
        let mut state = self.state.lock().unwrap();
        state.number += 1;
        state.phase = Phase::Body;
        state.head_end = Some(Instant::now());
        let number = state.number;
        (Reading(self.clone(), number), Answering(self.clone(), number))
    }

    /// The connection becomes a tunnel.
    pub(super) fn tunnel(&self) {
        self.state.lock().unwrap().phase = Phase::Tunnel;
    }

    fn received(&self) {
        let mut state = self.state.lock().unwrap();
        if state.phase == Phase::Idle {
            (state.phase, state.since) = (Phase::Head, Instant::now());
        }
    }

    /// The last of an answer went out only now.
    fn sent(&self) {
        let mut state = self.state.lock().unwrap();
        if state.phase == Phase::Idle {
            state.since = Instant::now();
        }
    }

    /// Until when the client must have sent something; `is_blocked`: it has not taken the last answer
    /// yet, so the pause has not begun.
    fn read_deadline(&self, is_blocked: bool) -> Option<Instant> {
        let Timeouts { read, read_header, idle, .. } = self.timeouts;
        let or_read = |limit: Duration| if limit.is_zero() { read } else { limit };
        let state = self.state.lock().unwrap();
        let limit = match state.phase {
            Phase::Idle if is_blocked => return None,
            Phase::Idle => or_read(idle),
            Phase::Head => or_read(read_header),
            Phase::Body => read,
            Phase::Answer | Phase::Tunnel => return None,
        };
        after(state.since, limit)
    }

    fn write_deadline(&self) -> Option<Instant> {
        let state = self.state.lock().unwrap();
        let begin = state.head_end.filter(|_| state.phase != Phase::Tunnel)?;
        after(begin, self.timeouts.write)
    }
}

fn after(begin: Instant, limit: Duration) -> Option<Instant> {
    (!limit.is_zero()).then(|| begin + limit)
}

impl Drop for Reading {
    fn drop(&mut self) {
        let mut state = self.0.state.lock().unwrap();
        if state.number == self.1 && state.phase == Phase::Body {
            state.phase = Phase::Answer;
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        let mut state = self.0.state.lock().unwrap();
        if state.number == self.1 && state.phase != Phase::Tunnel {
            (state.phase, state.since) = (Phase::Idle, Instant::now());
        }
    }
}

/// A socket that fails with `TimedOut` when the client is too slow.
pub(super) struct PacedSocket {
    stream: Wire,
    pace: Arc<Pace>,
    read_timer: Timer,
    write_timer: Timer,
    /// The client's window is closed.
    is_blocked: bool,
}

impl PacedSocket {
    pub(super) fn new(stream: Wire, pace: Arc<Pace>) -> PacedSocket {
        let (read_timer, write_timer) = (Timer::default(), Timer::default());
        PacedSocket { stream, pace, read_timer, write_timer, is_blocked: false }
    }

    fn written<T>(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            if std::mem::take(&mut self.is_blocked) {
                self.pace.sent();
            }
            return written;
        }
        self.is_blocked = true;
        self.write_timer.check(context, self.pace.write_deadline()).map(Err)
    }
}

/// A timer for a deadline that moves.
#[derive(Default)]
struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    /// Ready, with an error, once the deadline has passed.
    fn check(&mut self, context: &mut Context<'_>, deadline: Option<Instant>) -> Poll<io::Error> {
        let Some(deadline) = deadline else { return Poll::Pending };
        let timer = self.0.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if timer.deadline() != deadline {
            timer.as_mut().reset(deadline);
        }
        timer.as_mut().poll(context).map(|()| io::ErrorKind::TimedOut.into())
    }
}

impl AsyncRead for PacedSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if read.is_ready() {
            self.pace.received();
            return read;
        }
        let deadline = self.pace.read_deadline(self.is_blocked);
        self.read_timer.check(context, deadline).map(Err)
    }
}

impl AsyncWrite for PacedSocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, data);
        self.written(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, data);
        self.written(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
