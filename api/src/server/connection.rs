//! One connection, from request to request.
//!
//! While its caller waits, a connection is only the socket and the rest of the answer: hyper's state, with buffers of about 20 KB, is
//! dropped. When the answer is ready, hyper is set up again, reads a head that stands in for the request, and writes the answer like any
//! other.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::header::{CONNECTION, TRANSFER_ENCODING};
use http::uri::Scheme;
use http::{Method, Request, Version};
use http_body_util::BodyExt;
use http_body_util::combinators::BoxBody;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::server::conn::http1::{self, Parts};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use poem::web::{LocalAddr, RemoteAddr};
use poem::{Endpoint, Response};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::rest::Rest;
use super::socket::Socket;

/// How long a connection may be idle, and how long the head of a request may take to arrive. Longer than load balancers keep idle
/// connections (usually 60 s), so that they are the ones to close them.
pub(super) const IDLE: Duration = Duration::from_secs(90);

/// Serves one connection.
pub(super) struct Connection<E> {
    endpoint: Arc<E>,
    between: (LocalAddr, RemoteAddr),
    stop: CancellationToken,
    turn: Mutex<Turn>,
    /// Whether a request has a body that was not read to its end.
    unread: AtomicBool,
}

/// What the connection does next.
#[derive(Default)]
enum Turn {
    /// Requests go to the endpoint.
    #[default]
    Endpoint,
    /// The caller of this request waits for the rest of its answer.
    Waits(Head, BoxFuture<'static, Response>),
    /// The next head stands in for the request whose caller waited; this is its answer.
    Answer(Response),
}

/// The properties of a request that determine how its answer is written.
#[derive(Clone, Copy)]
struct Head {
    no_body: bool,
    version: Version,
    keep_alive: bool,
}

impl<E: Endpoint + 'static> Connection<E> {
    pub(super) fn new(endpoint: Arc<E>, between: (LocalAddr, RemoteAddr), stop: CancellationToken) -> Arc<Self> {
        Arc::new(Self { endpoint, between, stop, turn: Mutex::default(), unread: AtomicBool::new(false) })
    }

    /// Answers requests on `stream` until either side ends the connection.
    pub(super) async fn serve(self: Arc<Self>, stream: TcpStream) {
        // Answers are written whole, so Nagle's algorithm would only delay them. If this fails, they are only a little later.
        let _ = stream.set_nodelay(true);
        let mut socket = Socket::new(stream);
        loop {
            let Some((waiting, head, rest)) = self.requests(socket).await else { return };
            socket = waiting;
            let answer = tokio::select! {
                answer = rest => answer,
                () = socket.hung_up() => return,
            };
            socket = socket.with_first(head.again(!self.stop.is_cancelled()).as_bytes());
            self.put(Turn::Answer(answer));
        }
    }

    /// Answers requests until the caller of one has to wait. `None` if the connection has ended.
    async fn requests(self: &Arc<Self>, socket: Socket) -> Option<(Socket, Head, BoxFuture<'static, Response>)> {
        let (connection, stalls) = (Arc::clone(self), socket.stalls());
        let service = service_fn(move |request| Arc::clone(&connection).answer(request));
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(IDLE);
        let mut serving = Box::new(builder.serve_connection(TokioIo::new(socket), service));
        let (mut stopped, mut told) = (pin!(self.stop.cancelled()), false);
        let waits = poll_fn(|context| {
            loop {
                // Errors are ignored: the caller sent nonsense, or went away.
                if Pin::new(&mut *serving).poll(context).is_ready() {
                    return Poll::Ready(None);
                }
                if told || stopped.as_mut().poll(context).is_pending() {
                    break;
                }
                told = true;
                Pin::new(&mut *serving).graceful_shutdown();
            }
            // Bytes that hyper has not written yet would be lost. Usually there are none: it reads a head after it has written the previous
            // answer.
            if stalls.load(Ordering::Relaxed) {
                return Poll::Pending;
            }
            match self.take() {
                Turn::Waits(head, rest) => Poll::Ready(Some((head, rest))),
                turn => {
                    self.put(turn);
                    Poll::Pending
                }
            }
        });
        let (head, rest) = waits.await?;
        let Parts { io, read_buf, .. } = serving.into_parts();
        Some((io.into_inner().with_first(&read_buf), head, rest))
    }

    /// Answers one request. If the caller has to wait, leaves the rest of the answer in `turn` and never returns.
    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Result<http::Response<BoxBody<Bytes, io::Error>>, Infallible> {
        if let Turn::Answer(answer) = self.take() {
            return Ok(answer.into());
        }
        let (head, chunked) = (Head::of(&request), request.headers().contains_key(TRANSFER_ENCODING));
        let mut response = self.endpoint.get_response(self.request(request)).await;
        let Some(mut rest) = Rest::take_from(&mut response) else { return Ok(response.into()) };
        if let Poll::Ready(response) = futures_util::poll!(&mut rest) {
            return Ok(response.into());
        }
        // The unread rest of a body must not be taken for the next request, nor what follows a body with two lengths (`content-length` and
        // chunks). hyper ends such a connection, but it may have removed the `content-length`, so chunked requests are all answered here.
        if chunked || self.unread.load(Ordering::Relaxed) {
            return Ok(rest.await.into());
        }
        self.put(Turn::Waits(head, rest));
        std::future::pending().await
    }

    fn request(self: &Arc<Self>, request: Request<Incoming>) -> poem::Request {
        let (parts, body) = request.into_parts();
        let empty = body.is_end_stream();
        self.unread.store(!empty, Ordering::Relaxed);
        let body = if empty { poem::Body::empty() } else { Watched { body, connection: Arc::clone(self) }.boxed().into() };
        let (local, caller) = self.between.clone();
        poem::Request::from_parts((parts, local, caller, Scheme::HTTP).into(), body)
    }

    fn take(&self) -> Turn {
        std::mem::take(&mut *self.turn.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn put(&self, turn: Turn) {
        *self.turn.lock().unwrap_or_else(PoisonError::into_inner) = turn;
    }
}

impl Head {
    fn of(request: &Request<Incoming>) -> Self {
        let said = |what: &str| {
            let values = request.headers().get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
            values.flat_map(|value| value.split(',')).any(|option| option.trim().eq_ignore_ascii_case(what))
        };
        let version = request.version();
        let keep_alive = !said("close") && (version != Version::HTTP_10 || said("keep-alive"));
        Self { no_body: request.method() == Method::HEAD, version, keep_alive }
    }

    /// A head whose answer is written like that of the original request.
    fn again(self, keep_alive: bool) -> String {
        let method = if self.no_body { "HEAD" } else { "GET" };
        let connection = if self.keep_alive && keep_alive { "keep-alive" } else { "close" };
        format!("{method} / {:?}\r\nconnection: {connection}\r\n\r\n", self.version)
    }
}

/// A body that records when it has been read to its end.
struct Watched<E> {
    body: Incoming,
    connection: Arc<Connection<E>>,
}

impl<E> Body for Watched<E> {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if frame.is_none() {
            self.connection.unread.store(false, Ordering::Relaxed);
        }
        Poll::Ready(frame.map(|read| read.map_err(io::Error::other)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
