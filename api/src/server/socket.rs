//! The stream that a connection reads from and writes to.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

/// The longest that a write may stall. A caller that reads nothing for so long is gone or malicious.
pub(super) const TAKEN_WITHIN: Duration = Duration::from_secs(30);

/// A TCP connection, with some bytes to be read before those from the network.
pub(super) struct Socket {
    stream: TcpStream,
    first: Bytes,
    /// The timeout of a write that waits for the peer.
    stalled: Option<Pin<Box<Sleep>>>,
    stalls: Arc<AtomicBool>,
}

impl Socket {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, first: Bytes::new(), stalled: None, stalls: Arc::default() }
    }

    /// Adds `bytes` to be read before everything else. They are copied, because the buffer that they belong to may be large.
    pub(super) fn with_first(mut self, bytes: &[u8]) -> Self {
        self.first = [bytes, &self.first].concat().into();
        self
    }

    /// Whether a write waits for the peer. Remains readable after the socket has been given away.
    pub(super) fn stalls(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stalls)
    }

    /// Returns when the peer has hung up. Reads nothing. While unread bytes are waiting, a hang-up cannot be noticed.
    pub(super) async fn hung_up(&self) {
        if !self.first.is_empty() || matches!(self.stream.peek(&mut [0]).await, Ok(1..)) {
            std::future::pending::<()>().await;
        }
    }

    fn written(&mut self, context: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.stalls.store(written.is_pending(), Ordering::Relaxed);
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let patience = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(TAKEN_WITHIN)));
        patience.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.stream).poll_read(context, buffer);
        }
        let fits = self.first.len().min(buffer.remaining());
        buffer.put_slice(&self.first.split_to(fits));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.written(context, written)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
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
