//! The HTTP server below the simulated upstream and the webhook receiver: one whose handlers can misbehave.
//!
//! Real clients break on real sockets, so a fault is not a mocked error: a reset is a RST on the wire, a truncated body ends before
//! its `Content-Length`, a service that is gone has no listener. A framework hides the socket; this is hyper with nothing above it.
//!
//! - `server` accepts, and can close its listener and come back; `body` has the bodies, well-behaved and not.

mod body;
mod server;

pub(crate) use body::{Body, and_then, empty, json, read, slow, text, truncated};
pub(crate) use server::{Gate, Server};

use std::sync::Arc;

use hyper::Request;
use hyper::body::Incoming;

/// What a handler wants to happen to the connection that brought the request.
pub(crate) enum Reply {
    /// An ordinary answer; the connection may be used again.
    Answer(hyper::Response<Body>),
    /// No answer; the connection is closed.
    Close,
    /// No answer; the connection is reset (RST).
    Reset,
}

/// What serves the requests of a [`Server`].
pub(crate) trait Handler: Send + Sync + 'static {
    /// Is a new connection served, or closed at once?
    fn accepts(&self) -> bool {
        true
    }

    /// Serves one request. Called as soon as the head of the request is parsed; dropped when the client goes away.
    fn handle(self: Arc<Self>, request: Request<Incoming>) -> impl Future<Output = Reply> + Send;
}
