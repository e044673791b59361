//! Every error that a caller can see, and the only place that maps it to HTTP: `application/problem+json` (RFC 9457) with a stable `code`.
//! A problem never contains internal text.

use poem::http::{HeaderValue, StatusCode, header};
use poem::{IntoResponse, Response};
use poem_openapi::registry::{MetaHeader, MetaMediaType, MetaResponse, MetaResponses, Registry};
use poem_openapi::types::Type;
use poem_openapi::{ApiResponse, Object};
use shared::store::accept::Rejection;
use shared::store::sign_finish::Failure;
use uuid::Uuid;

use crate::accept::NotStored;

/// A problem document.
#[derive(Clone, Debug, Object)]
#[oai(rename_all = "camelCase", skip_serializing_if_is_none)]
pub struct Problem {
    /// Identifies the kind of problem: `urn:countersign:problem:` and the code.
    #[oai(rename = "type")]
    pub problem_type: String,
    /// The name of the kind of problem.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What is wrong with this request, and how to fix it.
    pub detail: String,
    /// Stable name of the kind of problem, for programs.
    pub code: String,
    /// Every flaw of the body.
    pub errors: Option<Vec<Flaw>>,
    /// The request that this is about, if one was stored.
    pub request_id: Option<Uuid>,
}

/// One thing that is wrong with a body.
#[derive(Clone, Debug, PartialEq, Eq, Object)]
pub struct Flaw {
    /// What is wrong, and what is accepted.
    pub detail: String,
    /// Where: a JSON pointer in a URI fragment, such as `#/message`.
    pub pointer: String,
}

impl Flaw {
    /// What is wrong at this place.
    #[must_use]
    pub fn at(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { detail: detail.into(), pointer: pointer.into() }
    }
}

/// Why a request failed.
#[derive(Clone, Debug)]
pub enum ApiError {
    /// The body is not JSON, or not what is expected.
    Invalid(Vec<Flaw>),
    /// The idempotency key in the header can't be used.
    BadIdempotencyKey(&'static str),
    /// The API key is missing or unknown.
    Unauthorized,
    /// The key does not have the scope.
    Forbidden(&'static str),
    /// There is no such request, or it belongs to another key.
    UnknownRequest,
    /// There is no such route.
    UnknownRoute,
    /// The route has other methods.
    Method(&'static str),
    /// The body took too long.
    SlowBody,
    /// The body is too large.
    TooLarge,
    /// The message is longer than this many bytes.
    MessageTooLong(usize),
    /// The content type of the body is not JSON.
    NotJson,
    /// The idempotency key was used with another payload.
    Mismatch,
    /// There will be no signature. Holds the reason, and the id of the request that says more.
    WillNotBeSigned(Failure, Uuid),
    /// The request is not final, so there is no webhook to send again.
    NotFinal,
    /// The request asked for no webhook.
    NoWebhook,
    /// Postgres did not answer in time, or refused. No request was stored.
    Unavailable,
    /// Postgres did not say in time whether the request is stored.
    MaybeStored,
    /// Too many requests are unfinished.
    Full,
    /// A bug in this service.
    Internal,
}

impl ApiError {
    /// Status, code, title and detail. The only mapping from errors to HTTP, and exhaustive.
    fn parts(&self) -> (StatusCode, &'static str, &'static str, String) {
        let text = |text: &str| text.to_owned();
        match self {
            Self::Invalid(flaws) => {
                // Of the whole body, the place says nothing.
                let line = |flaw: &Flaw| format!("{} {}", flaw.pointer.trim_end_matches('#'), flaw.detail).trim_start().to_owned();
                let detail = flaws.first().map_or_else(String::new, line);
                (StatusCode::BAD_REQUEST, "invalid-request", "The request is not valid", detail)
            }
            Self::BadIdempotencyKey(detail) => (StatusCode::BAD_REQUEST, "invalid-header", "A header is not valid", text(detail)),
            Self::Unauthorized => {
                let detail = text("send a valid API key in the header X-API-Key");
                (StatusCode::UNAUTHORIZED, "unauthorized", "The API key is missing or unknown", detail)
            }
            Self::Forbidden(scope) => {
                (StatusCode::FORBIDDEN, "forbidden", "The API key may not do this", format!("the key needs the scope `{scope}`"))
            }
            Self::UnknownRequest => {
                (StatusCode::NOT_FOUND, "not-found", "There is no such request", text("no request of this key has this id"))
            }
            Self::UnknownRoute => (StatusCode::NOT_FOUND, "no-such-route", "There is nothing here", text("/docs lists what there is")),
            Self::Method(allowed) => {
                (StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", "The method is not allowed", format!("allowed: {allowed}"))
            }
            Self::SlowBody => {
                (StatusCode::REQUEST_TIMEOUT, "slow-body", "The body took too long", text("send the whole body within 10 seconds"))
            }
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "too-large", "The body is too large", text("send a shorter message")),
            Self::MessageTooLong(most) => {
                (StatusCode::PAYLOAD_TOO_LARGE, "too-large", "The message is too long", format!("accepted: up to {most} bytes of UTF-8"))
            }
            Self::NotJson => {
                let detail = text("send the body with Content-Type: application/json");
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, "not-json", "The body is not announced as JSON", detail)
            }
            Self::Mismatch => {
                let detail = text("this idempotency key was used with another payload; use a new key for a new request");
                (StatusCode::UNPROCESSABLE_ENTITY, "idempotency-mismatch", "The idempotency key is taken", detail)
            }
            Self::WillNotBeSigned(failure, _) => {
                let detail = match failure {
                    Failure::Refused => "the signing service says that this message is unacceptable",
                    Failure::AttemptsExhausted => "the message could not be signed; post it again",
                    Failure::DeadlineExceeded => "the message could not be signed in time; post it again",
                };
                (StatusCode::UNPROCESSABLE_ENTITY, failure.code(), "The message was not signed", text(detail))
            }
            Self::NotFinal => {
                let detail = text("the webhook is sent when the message is signed or has failed; ask for the state with GET");
                (StatusCode::CONFLICT, "not-final", "There is nothing to send again yet", detail)
            }
            Self::NoWebhook => {
                let detail = text("the request was posted without a webhookUrl");
                (StatusCode::CONFLICT, "no-webhook", "The request has no webhook", detail)
            }
            Self::Unavailable => {
                let detail = text("the database could not do this in time; try again");
                (StatusCode::SERVICE_UNAVAILABLE, "unavailable", "The service is not available", detail)
            }
            Self::MaybeStored => {
                let detail = text("the request may or may not be stored; post it again, with an idempotency key it is not stored twice");
                (StatusCode::SERVICE_UNAVAILABLE, "unavailable", "The service is not available", detail)
            }
            Self::Full => {
                let detail = text("too many requests are waiting for their signature; try again when some have it");
                (StatusCode::SERVICE_UNAVAILABLE, "too-many-pending", "The service takes on no more at present", detail)
            }
            Self::Internal => {
                (StatusCode::INTERNAL_SERVER_ERROR, "internal", "Something went wrong here", text("the log of the service says more"))
            }
        }
    }
}

impl From<NotStored> for ApiError {
    fn from(reason: NotStored) -> Self {
        match reason {
            NotStored::Rejected(Rejection::Mismatch) => Self::Mismatch,
            NotStored::Rejected(Rejection::Full) => Self::Full,
            NotStored::Rejected(Rejection::Collision) | NotStored::Unavailable => Self::Unavailable,
            NotStored::Unknown => Self::MaybeStored,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, code, title, detail) = self.parts();
        let problem = Problem {
            problem_type: format!("urn:countersign:problem:{code}"),
            title: title.to_owned(),
            status: status.as_u16(),
            errors: match &self {
                Self::Invalid(flaws) => Some(flaws.clone()),
                Self::MessageTooLong(_) => Some(vec![Flaw::at("#/message", detail.clone())]),
                // The header means the same as this field.
                Self::BadIdempotencyKey(_) => Some(vec![Flaw::at("#/clientRequestId", detail.clone())]),
                _ => None,
            },
            detail,
            code: code.to_owned(),
            request_id: match &self {
                Self::WillNotBeSigned(_, id) => Some(*id),
                _ => None,
            },
        };
        let mut response = poem_openapi::payload::Json(problem).into_response();
        response.set_status(status);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        match &self {
            Self::Unavailable | Self::MaybeStored => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            // Places become free only as fast as the upstream signs.
            Self::Full => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("10"));
            }
            Self::Unauthorized => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("ApiKey header=\"X-API-Key\""));
            }
            Self::Method(allowed) => {
                headers.insert(header::ALLOW, HeaderValue::from_static(allowed));
            }
            _ => {}
        }
        response
    }
}

impl From<ApiError> for poem::Error {
    fn from(error: ApiError) -> Self {
        Self::from_response(error.into_response())
    }
}

/// The problems that an operation documents.
pub trait Documented {
    /// Status and description of each problem.
    const PROBLEMS: &'static [(u16, &'static str)];
}

/// An error of an operation whose documentation lists its problems.
#[derive(Debug)]
pub struct Fails<D>(ApiError, std::marker::PhantomData<D>);

impl<D, E: Into<ApiError>> From<E> for Fails<D> {
    fn from(error: E) -> Self {
        Self(error.into(), std::marker::PhantomData)
    }
}

impl<D> From<Fails<D>> for poem::Error {
    fn from(Fails(error, _): Fails<D>) -> Self {
        error.into()
    }
}

impl<D: Documented> ApiResponse for Fails<D> {
    fn meta() -> MetaResponses {
        let retry_after = || MetaHeader {
            name: "Retry-After".to_owned(),
            description: Some("Seconds until another try is worth it.".to_owned()),
            required: true,
            deprecated: false,
            schema: u32::schema_ref(),
        };
        let response = |&(status, description)| MetaResponse {
            description,
            status: Some(status),
            status_range: None,
            content: vec![MetaMediaType { content_type: "application/problem+json", schema: Problem::schema_ref() }],
            headers: if matches!(status, 429 | 503) { vec![retry_after()] } else { vec![] },
        };
        MetaResponses { responses: D::PROBLEMS.iter().map(response).collect() }
    }

    fn register(registry: &mut Registry) {
        Problem::register(registry);
    }
}
