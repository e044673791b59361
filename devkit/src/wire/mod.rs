//! The HTTP server of the simulated upstream and the webhook receiver, whose handlers can misbehave.
//!
//! Real clients fail on real sockets, so a fault is not a mocked error: a reset is an RST on the wire, a truncated body ends before its
//! `Content-Length`, and a service that is gone has no listener. A framework hides the socket, so this uses hyper directly.
//!
//! - `server` accepts connections, and can close and reopen its listener; `body` has the bodies, well-behaved and not.

mod body;
mod server;

pub(crate) use body::{Body, and_then, empty, json, read, slow, text, truncated};
pub(crate) use server::{Gate, Server};

use std::sync::Arc;

use hyper::Request;
use hyper::body::Incoming;

/// How a handler answers a request, or ends its connection.
pub(crate) enum Reply {
    /// An ordinary response; the connection can be reused.
    Answer(hyper::Response<Body>),
    /// No response; the connection is closed.
    Close,
    /// No response; the connection is reset (RST).
    Reset,
}

/// Serves the requests of a [`Server`].
pub(crate) trait Handler: Send + Sync + 'static {
    /// Returns whether a new connection is served; otherwise, it is closed at once.
    fn accepts(&self) -> bool {
        true
    }

    /// Serves one request.
    ///
    /// It is called as soon as the head of the request is parsed. The future is dropped if the client disconnects.
    fn handle(self: Arc<Self>, request: Request<Incoming>) -> impl Future<Output = Reply> + Send;
}
