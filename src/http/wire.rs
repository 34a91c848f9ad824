//! A connected socket of one of the kinds that there are.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsStream;

/// A connected socket.
pub(super) enum Wire {
    /// In the clear.
    Tcp(TcpStream),
    /// Encrypted; the handshake is done.
    Tls(Box<TlsStream<TcpStream>>),
    /// A socket file.
    Unix(UnixStream),
}

macro_rules! on_each {
    ($wire:expr, $inner:ident => $call:expr) => {
        match $wire {
            Wire::Tcp($inner) => $call,
            Wire::Tls($inner) => $call,
            Wire::Unix($inner) => $call,
        }
    };
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        on_each!(&mut *self, socket => Pin::new(socket).poll_read(context, buffer))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        on_each!(&mut *self, socket => Pin::new(socket).poll_write(context, data))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        on_each!(&mut *self, socket => Pin::new(socket).poll_write_vectored(context, data))
    }

    fn is_write_vectored(&self) -> bool {
        on_each!(self, socket => socket.is_write_vectored())
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_each!(&mut *self, socket => Pin::new(socket).poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_each!(&mut *self, socket => Pin::new(socket).poll_shutdown(context))
    }
}
