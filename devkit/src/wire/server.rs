//! A server that owns the task of each connection, and that can close its listener and reopen it on the same port.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context as Poller, Poll};

use anyhow::{Context, Result, anyhow};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, JoinSet};

use super::{Handler, Reply};

/// A running server. Dropping it closes the listener and every connection.
#[derive(Debug)]
pub(crate) struct Server {
    addr: SocketAddr,
    commands: mpsc::UnboundedSender<Command>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
enum Command {
    /// Open or close the listener.
    Listen(bool, oneshot::Sender<io::Result<()>>),
    /// Close every open connection.
    Cut(oneshot::Sender<io::Result<()>>),
}

impl Server {
    /// Listens on the address (port 0: any free port) and serves requests with the handler.
    pub(crate) async fn start<H: Handler>(listen: SocketAddr, handler: Arc<H>) -> Result<Self> {
        let listener = TcpListener::bind(listen).await.with_context(|| format!("listening on {listen}"))?;
        let addr = listener.local_addr().with_context(|| format!("listening on {listen}"))?;
        let (commands, inbox) = mpsc::unbounded_channel();
        let task = tokio::spawn(run(listener, addr, handler, inbox));
        Ok(Self { addr, commands, task })
    }

    /// The address that it listens on.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// A handle that opens and closes the listener.
    pub(crate) fn gate(&self) -> Gate {
        Gate { commands: self.commands.clone() }
    }

    /// Closes the listener and every connection, and waits until they are closed.
    pub(crate) async fn stop(mut self) {
        self.task.abort();
        // The task ends only by being aborted.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Opens and closes a server's listener.
#[derive(Clone, Debug)]
pub(crate) struct Gate {
    commands: mpsc::UnboundedSender<Command>,
}

impl Gate {
    /// Opens or closes the listener, and waits until that is done. Open connections stay open.
    pub(crate) async fn listen(&self, listening: bool) -> Result<()> {
        self.ask(|done| Command::Listen(listening, done)).await
    }

    /// Closes every open connection, and waits until that is done.
    pub(crate) async fn cut(&self) -> Result<()> {
        self.ask(Command::Cut).await
    }

    async fn ask(&self, command: impl FnOnce(oneshot::Sender<io::Result<()>>) -> Command) -> Result<()> {
        let (done, outcome) = oneshot::channel();
        self.commands.send(command(done)).context("the server was stopped")?;
        outcome.await.context("the server was stopped")?.context("listening again")
    }
}

async fn run<H: Handler>(listener: TcpListener, addr: SocketAddr, handler: Arc<H>, mut inbox: mpsc::UnboundedReceiver<Command>) {
    let mut listener = Some(listener);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            command = inbox.recv() => {
                let (outcome, done) = match command {
                    Some(Command::Listen(true, done)) if listener.is_none() => {
                        (TcpListener::bind(addr).await.map(|open| listener = Some(open)), done)
                    }
                    Some(Command::Listen(listening, done)) => {
                        listener = listener.filter(|_| listening);
                        (Ok(()), done)
                    }
                    Some(Command::Cut(done)) => {
                        // The tasks own the sockets: wait for the tasks before reporting that the sockets are closed.
                        connections.shutdown().await;
                        (Ok(()), done)
                    }
                    // The server and every gate have been dropped.
                    None => return,
                };
                // The caller may have stopped waiting.
                let _ = done.send(outcome);
            }
            stream = accept(listener.as_ref()) => {
                if handler.accepts() {
                    connections.spawn(serve(stream, Arc::clone(&handler)));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Accepts the next connection. Never returns while there is no listener.
async fn accept(listener: Option<&TcpListener>) -> TcpStream {
    let Some(listener) = listener else { return std::future::pending().await };
    loop {
        // An error concerns either one connection that is already gone, or a shortage of resources that passes.
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

async fn serve<H: Handler>(stream: TcpStream, handler: Arc<H>) {
    // Small responses should not wait for more data; if the option is refused, they do.
    let _ = stream.set_nodelay(true);
    let reset = Arc::new(AtomicBool::new(false));
    let io = TokioIo::new(Wire { stream, reset: Arc::clone(&reset) });
    let service = service_fn(move |request| {
        let (handler, reset) = (Arc::clone(&handler), Arc::clone(&reset));
        async move {
            match handler.handle(request).await {
                Reply::Answer(response) => Ok(response),
                Reply::Close => Err(anyhow!("closed on purpose")),
                Reply::Reset => {
                    reset.store(true, Ordering::Release);
                    Err(anyhow!("reset on purpose"))
                }
            }
        }
    });
    // The error is either the fault that a handler asked for, or a client that disconnected.
    let _ = http1::Builder::new().serve_connection(io, service).await;
}

/// A socket that is reset instead of closed if a handler asked for it.
struct Wire {
    stream: TcpStream,
    reset: Arc<AtomicBool>,
}

impl Drop for Wire {
    fn drop(&mut self) {
        if self.reset.load(Ordering::Acquire) {
            // With a linger time of zero, the system sends RST instead of FIN.
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Poller<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Poller<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Poller<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Poller<'_>) -> Poll<io::Result<()>> {
        if self.reset.load(Ordering::Acquire) {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
