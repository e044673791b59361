//! Routes, bodies, headers, problems.
//!
//! | file | what |
//! |---|---|
//! | `operations` | the operations, the webhook, and what they answer |
//! | `deliveries` | the operations on the delivery log of a request |
//! | `read` | the body of a POST, read within bounds |
//! | `body` | the same, parsed |
//! | `fields` | a JSON object whose repeated names are reported |
//! | `webhook_addresses` | where webhooks may go |
//! | `document` | the OpenAPI document |
//! | `headers` | `Prefer` and `Idempotency-Key`, parsed |
//! | `auth` | API keys |
//! | `problem` | every error, and its problem document |
//! | `later` | slow answers |
//! | `observe` | a span and metrics for each request |

pub mod auth;
mod body;
mod deliveries;
mod document;
mod fields;
mod headers;
mod later;
mod observe;
mod operations;
pub mod problem;
mod read;
mod webhook_addresses;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use poem::error::{MethodNotAllowedError, NotFoundError};
use poem::http::StatusCode;
use poem::{Endpoint, EndpointExt, IntoResponse, Response, Route};
use poem_openapi::OpenApiService;
use poem_openapi::error::{AuthorizationError, ParsePathError};

use crate::answers::Answers;
use auth::Keys;
use deliveries::DeliveriesApi;
use operations::{Api, Outgoing};
use problem::ApiError;
use shared::store::Store;
pub use webhook_addresses::WebhookAddresses;

/// Limits from the settings.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long a POST waits by default.
    pub sync_wait: Duration,
    /// The longest wait that a caller can ask for.
    pub max_wait: Duration,
    /// The longest message, in bytes.
    pub message_max_bytes: usize,
}

/// What the operations need.
pub struct Services {
    /// Stores requests and waits for their outcome.
    pub answers: Answers,
    /// Delivery logs.
    pub store: Store,
    /// API keys.
    pub keys: Keys,
    /// Limits.
    pub limits: Limits,
    /// Where webhooks may go.
    pub webhook_addresses: WebhookAddresses,
}

/// The pattern and the methods of the route that `path` belongs to. `None` if it is not a route for callers: requests to the routes for
/// operators are neither traced nor counted.
fn matched(path: &str) -> Option<(&'static str, &'static str)> {
    let segments: Vec<&str> = path.strip_prefix("/crypto/sign")?.split('/').collect();
    match segments[..] {
        [""] => Some(("/crypto/sign", "POST")),
        ["", id] if !id.is_empty() => Some(("/crypto/sign/{id}", "GET")),
        ["", id, "deliveries"] if !id.is_empty() => Some(("/crypto/sign/{id}/deliveries", "GET, POST")),
        _ => None,
    }
}

fn service() -> OpenApiService<(Api, DeliveriesApi), &'static dyn Outgoing> {
    OpenApiService::new((Api, DeliveriesApi), "Countersign", env!("CARGO_PKG_VERSION"))
        .description("A reliable front for an unreliable, rate-limited signing API.")
        .webhooks::<&dyn Outgoing>()
}

/// The OpenAPI document.
#[must_use]
pub fn spec() -> String {
    document::completed(&service().spec())
}

/// All routes, including `health`, which are those of [`shared::operations`].
pub fn routes(services: Services, health: Route, metrics: Option<Route>) -> impl Endpoint {
    let service = service();
    let spec = spec();
    // Shared by all answers: the page has over a megabyte.
    let page = Bytes::from(service.swagger_ui_html().replace(&service.spec(), &spec));
    let spec = Bytes::from(spec);
    let docs = poem::endpoint::make_sync(move |_| Response::builder().content_type("text/html; charset=utf-8").body(page.clone()));
    let openapi = poem::endpoint::make_sync(move |_| Response::builder().content_type("application/json").body(spec.clone()));
    let mut routes = Route::new()
        .nest_no_strip("/health", health)
        .nest("/docs", Route::new().at("/", poem::get(docs)))
        .at("/openapi.json", poem::get(openapi));
    if let Some(metrics) = metrics {
        routes = routes.nest_no_strip("/metrics", metrics);
    }
    routes.nest("/", service).data(Arc::new(services)).with(observe::Observe)
}

/// The problem document of an error on `path`. An error that already is a response is returned as it is.
fn problem_of(error: poem::Error, path: &str) -> Response {
    if error.is_from_response() {
        return error.into_response();
    }
    let problem = if error.is::<NotFoundError>() {
        ApiError::UnknownRoute
    } else if error.is::<MethodNotAllowedError>() {
        ApiError::Method(matched(path).map_or("GET", |(_, methods)| methods))
    } else if error.is::<AuthorizationError>() {
        ApiError::Unauthorized
    } else if error.is::<ParsePathError>() {
        ApiError::UnknownRequest
    } else if error.is::<poem::error::ParsePathError>() {
        // A path that is not UTF-8.
        ApiError::UnknownRoute
    } else if error.status() == StatusCode::PAYLOAD_TOO_LARGE {
        ApiError::TooLarge
    } else {
        tracing::error!(%error, route = matched(path).map(|(pattern, _)| pattern), "unexpected");
        ApiError::Internal
    };
    problem.into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_of_the_document_is_a_route_that_is_traced_and_counted_with_its_methods() {
        let document: serde_json::Value = serde_json::from_str(&spec()).unwrap();
        let paths = document["paths"].as_object().unwrap();
        assert_eq!(paths.len(), 3);
        for (path, operations) in paths {
            let mut methods: Vec<String> = operations.as_object().unwrap().keys().map(|method| method.to_uppercase()).collect();
            methods.sort_unstable();
            assert_eq!(matched(&path.replace("{id}", "x")), Some((path.as_str(), methods.join(", ").as_str())));
        }
    }
}
