//! Bodies: ordinary ones, and ones that end too early or arrive too slowly.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};

/// The body of a response.
pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// The largest request body that is read, in bytes; well above anything the services send.
const READ_BOUND: usize = 4 << 20;

/// Reads a whole request body, up to [`READ_BOUND`].
pub(crate) async fn read(body: Incoming) -> Result<Bytes, Box<dyn std::error::Error + Send + Sync>> {
    Ok(Limited::new(body, READ_BOUND).collect().await?.to_bytes())
}

fn whole(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Full::new(body).map_err(|never| match never {}).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// A response in plain text.
pub(crate) fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    whole(status, "text/plain; charset=utf-8", body.into())
}

/// A response in JSON.
pub(crate) fn json(status: StatusCode, body: &impl serde::Serialize) -> Response<Body> {
    let body = serde_json::to_vec(body).expect("our own types have string keys only");
    whole(status, "application/json", body.into())
}

/// A response without a body.
pub(crate) fn empty(status: StatusCode) -> Response<Body> {
    let mut response = text(status, Bytes::new());
    response.headers_mut().remove(CONTENT_TYPE);
    response
}

/// The same response, with an action that runs once it is on its way: when hyper has consumed the body, in the step that also sends it.
pub(crate) fn and_then(response: Response<Body>, action: impl FnOnce() + Send + 'static) -> Response<Body> {
    struct OnDrop<F: FnOnce()>(Option<F>);
    impl<F: FnOnce()> Drop for OnDrop<F> {
        fn drop(&mut self) {
            if let Some(action) = self.0.take() {
                action();
            }
        }
    }
    let action = OnDrop(Some(action));
    response.map(|body| {
        body.map_frame(move |frame| {
            let _held = &action;
            frame
        })
        .boxed_unsync()
    })
}

/// A 200 response that promises the whole body and ends after the first half of it.
pub(crate) fn truncated(body: &Bytes) -> Response<Body> {
    let length = HeaderValue::from(body.len());
    let half = body.slice(..body.len() / 2);
    let rest = stream::once(async {
        // Yield to hyper once, so that it writes the first half before it sees the error.
        tokio::task::yield_now().await;
        Err(io::Error::other("truncated on purpose"))
    });
    let frames = stream::once(async { Ok(Frame::data(half)) }).chain(rest);
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    response.headers_mut().insert(CONTENT_LENGTH, length);
    response
}

/// A response with an endless body: one byte every `pause`.
pub(crate) fn slow(status: StatusCode, pause: Duration) -> Response<Body> {
    let frames = stream::unfold((), move |()| async move {
        tokio::time::sleep(pause).await;
        Some((Ok(Frame::data(Bytes::from_static(b"."))), ()))
    });
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    *response.status_mut() = status;
    response
}
