//! A span and metrics for each request. They never contain a message, a signature, an id or a key: the route is recorded as its pattern.

use std::time::Instant;

use futures_util::FutureExt;
use poem::{Endpoint, IntoResponse, Middleware, Request, Response};
use shared::telemetry::continue_trace;
use tracing::{Instrument, Span, field};

use super::{matched, problem_of};
use crate::server::Rest;

/// Traces and counts requests.
pub struct Observe;

impl<E: Endpoint> Middleware<E> for Observe {
    type Output = Observed<E>;

    fn transform(&self, inner: E) -> Observed<E> {
        Observed(inner)
    }
}

/// An endpoint that is traced and counted.
pub struct Observed<E>(E);

impl<E: Endpoint> Endpoint for Observed<E> {
    type Output = Response;

    async fn call(&self, request: Request) -> poem::Result<Response> {
        let path = request.uri().path().to_owned();
        let answer =
            |answered: poem::Result<E::Output>| answered.map_or_else(|error| problem_of(error, &path), IntoResponse::into_response);
        // Boxed, so that it is dropped before the rest of an answer is awaited.
        let call = |request| Box::pin(self.0.call(request));
        let Some((route, _)) = matched(&path) else { return Ok(answer(call(request).await)) };
        let method = request.method().as_str().to_owned();
        let span = tracing::info_span!(
            "http.request",
            otel.name = format!("{method} {route}"),
            otel.kind = "server",
            http.request.method = method,
            http.route = route,
            http.response.status_code = field::Empty,
            otel.status_code = field::Empty,
        );
        continue_trace(&span, request.headers().get("traceparent").and_then(|value| value.to_str().ok()));
        let started = Instant::now();
        let mut response = answer(call(request).instrument(span.clone()).await);
        let rest = Rest::take_from(&mut response);
        let answered = Answered { route, span, started };
        Ok(match rest {
            Some(rest) => Rest::response(rest.instrument(answered.span.clone()).map(|response| answered.with(response))),
            None => answered.with(response),
        })
    }
}

/// A request whose metrics are yet to be recorded.
struct Answered {
    route: &'static str,
    span: Span,
    started: Instant,
}

impl Answered {
    fn with(self, response: Response) -> Response {
        let Self { route, span, started } = self;
        let status = response.status();
        span.record("http.response.status_code", status.as_u16());
        if status.is_server_error() {
            span.record("otel.status_code", "ERROR");
        }
        metrics::counter!("countersign_http_requests_total", "route" => route, "status" => status.as_str().to_owned()).increment(1);
        metrics::histogram!("countersign_http_request_seconds", "route" => route).record(started.elapsed());
        response
    }
}
