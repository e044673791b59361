//! Bodies: the ordinary ones, and those that end too early or come too slowly.

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

/// A body of an answer.
pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// The largest body that is read: well above anything the services send.
const READ_BOUND: usize = 4 << 20;

/// Reads a whole request body, up to a bound.
pub(crate) async fn read(body: Incoming) -> Result<Bytes, Box<dyn std::error::Error + Send + Sync>> {
    Ok(Limited::new(body, READ_BOUND).collect().await?.to_bytes())
}

fn whole(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Full::new(body).map_err(|never| match never {}).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// An answer in plain text.
pub(crate) fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    whole(status, "text/plain; charset=utf-8", body.into())
}

/// An answer in JSON.
pub(crate) fn json(status: StatusCode, body: &impl serde::Serialize) -> Response<Body> {
    let body = serde_json::to_vec(body).expect("our own types have string keys only");
    whole(status, "application/json", body.into())
}

/// An answer without a body.
pub(crate) fn empty(status: StatusCode) -> Response<Body> {
    let mut response = text(status, Bytes::new());
    response.headers_mut().remove(CONTENT_TYPE);
    response
}

/// The same answer, and something to do once it is on its way: when hyper has taken the body, in the step that also sends it.
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

/// A 200 that promises the whole body and ends after the first half of it.
pub(crate) fn truncated(body: &Bytes) -> Response<Body> {
    let length = HeaderValue::from(body.len());
    let half = body.slice(..body.len() / 2);
    let rest = stream::once(async {
        // Back to hyper once, so that it writes the first half before it hears of the end.
        tokio::task::yield_now().await;
        Err(io::Error::other("truncated on purpose"))
    });
    let frames = stream::once(async { Ok(Frame::data(half)) }).chain(rest);
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    response.headers_mut().insert(CONTENT_LENGTH, length);
    response
}

/// Bytes without an end, one every `pause`.
pub(crate) fn slow(status: StatusCode, pause: Duration) -> Response<Body> {
    let frames = stream::unfold((), move |()| async move {
        tokio::time::sleep(pause).await;
        Some((Ok(Frame::data(Bytes::from_static(b"."))), ()))
    });
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    *response.status_mut() = status;
    response
}
