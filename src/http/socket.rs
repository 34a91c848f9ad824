//! A socket that gives up on a peer that takes nothing.
//!
//! HTTP/2 pings and the kernel ([`notice_death`]) find a dead host, and body queues a reader that stops; this
//! finds the rest: a peer whose host acknowledges, but whose window stays closed, on any response.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};

use super::wire::Wire;
use crate::limits;

/// Has the kernel find out when the host at the other end is gone: nothing else would, where this end only waits
/// for it, or has nothing to say.
pub(super) fn notice_death(socket: &TcpStream) -> io::Result<()> {
    let seconds = limits::DEAD_HOST_WAIT.as_secs() as u32;
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &(seconds / 2))?;
    setsockopt(socket, sockopt::TcpKeepInterval, &(seconds / 6))?;
    Ok(setsockopt(socket, sockopt::TcpKeepCount, &3)?)
}

/// A socket whose writes fail after [`limits::BODY_STALL_WAIT`] without progress.
pub(super) struct Socket {
    stream: Wire,
    /// When the write that waits now fails.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Socket {
    /// Guards `stream`.
    pub(super) fn new(stream: Wire) -> Socket {
        Socket { stream, deadline: None }
    }

    fn guard<T>(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.deadline = None;
            return written;
        }
        let deadline = self
            .deadline
            .get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + limits::BODY_STALL_WAIT)));
        ready!(deadline.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, data);
        self.guard(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, data);
        self.guard(context, written)
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

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_never_reads_ends_the_write() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut socket = Socket::new(Wire::Tcp(listener.accept().await.unwrap().0));
        let data = vec![0; 1 << 20];
        let error = loop {
            if let Err(error) = socket.write_all(&data).await {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
