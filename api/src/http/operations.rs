//! The operations on requests, and the webhook that reports their outcome.

use std::sync::Arc;
use std::time::Duration;

use poem::http::HeaderMap;
use poem::web::Data;
use poem_openapi::param::{Header, Path};
use poem_openapi::payload::Json;
use poem_openapi::{ApiResponse, OpenApi, Webhook};
use shared::contract::{SigningRequest, Status, WebhookEvent};
use shared::store::accept::NewRequest;
use shared::store::keys::Scope;
use shared::store::sign_finish::Failure;
use shared::telemetry::{self, display_chain};
use uuid::Uuid;

use super::Services;
use super::auth::Authorized;
use super::body::Posted;
use super::headers::{Preferences, idempotency_key};
use super::later::Later;
use super::problem::{ApiError, Documented, Fails};
use crate::answers::{ReadError, status_url};

/// The API.
pub struct Api;

/// The answers to a POST.
#[derive(ApiResponse)]
pub enum PostAnswer {
    /// The message is signed.
    #[oai(status = 200)]
    Signed(
        Json<SigningRequest>,
        /// The preferences that were applied.
        #[oai(header = "Preference-Applied")]
        Option<String>,
    ),
    /// The message is stored and will be signed; ask at `statusUrl`, or wait for the webhook.
    #[oai(status = 202)]
    Pending(
        Json<SigningRequest>,
        /// Where to ask for the state.
        #[oai(header = "Location")]
        String,
        /// Seconds until it is worth asking.
        #[oai(header = "Retry-After")]
        u64,
        /// The preferences that were applied.
        #[oai(header = "Preference-Applied")]
        Option<String>,
    ),
}

/// The answers to a GET.
#[derive(ApiResponse)]
pub enum GetAnswer {
    /// The state of the request, whatever it is.
    #[oai(status = 200)]
    State(
        Json<SigningRequest>,
        /// The preferences that were applied.
        #[oai(header = "Preference-Applied")]
        Option<String>,
    ),
}

/// The problems of a POST.
#[derive(Debug)]
pub struct OnPost;

impl Documented for OnPost {
    const PROBLEMS: &'static [(u16, &'static str)] = &[
        (400, "The body or a header is not valid; `errors` says where."),
        (401, "The API key is missing or unknown."),
        (403, "The API key does not have the scope `sign`."),
        (408, "The body took too long."),
        (413, "The body or the message is too large."),
        (415, "The body is not announced as JSON."),
        (
            422,
            "The idempotency key was used with another payload (`idempotency-mismatch`), or the message will not be signed \
             (`upstream-refused`, `attempts-exhausted`, `deadline-exceeded`).",
        ),
        (429, "Too many requests: from a proxy in front that limits callers; the service itself answers 503."),
        (503, "The request could not be stored."),
    ];
}

/// The problems of a GET.
#[derive(Debug)]
pub struct OnGet;

impl Documented for OnGet {
    const PROBLEMS: &'static [(u16, &'static str)] = &[
        (401, "The API key is missing or unknown."),
        (403, "The API key may not read requests."),
        (404, "There is no such request, or it is somebody else's."),
        (503, "The state could not be read."),
    ];
}

#[OpenApi]
#[allow(clippy::too_many_arguments, reason = "each is a part of the request, or documents one")]
impl Api {
    /// Sign a message
    ///
    /// Stores the request, waits for the signature for a moment (or as `Prefer: wait=N` says), and answers with the signature or a receipt.
    #[oai(path = "/crypto/sign", method = "post", operation_id = "sign")]
    async fn sign(
        &self,
        key: Authorized,
        /// `respond-async`: do not wait. `wait=N`: wait up to N seconds.
        #[oai(name = "Prefer")]
        _prefer: Header<Option<String>>,
        /// Idempotency key, bare or as a structured-field string.
        #[oai(name = "Idempotency-Key")]
        _idempotency_key: Header<Option<String>>,
        headers: &HeaderMap,
        posted: Posted,
        Data(services): Data<&Arc<Services>>,
    ) -> Result<Later<PostAnswer>, Fails<OnPost>> {
        let caller = key.with(Scope::Sign)?;
        let arrived = posted.received_at - key.took();
        let preferences = Preferences::of(headers);
        let request = NewRequest {
            id: Uuid::now_v7(),
            key: caller.key,
            client_request_id: same_key(posted.client_request_id, idempotency_key(headers).map_err(ApiError::BadIdempotencyKey)?)?,
            message: posted.message,
            webhook: posted.webhook,
            traceparent: trace_of(headers),
        };
        let limits = &services.limits;
        let stored = services.answers.post(request, arrived, preferences.wait_or(limits.sync_wait, limits.max_wait)).await?;
        let applied = preferences.applied(limits.max_wait, stored.may_wait);
        let services = Arc::clone(services);
        Ok(Later::new(async move {
            let answered = services.answers.outcome(stored).await.ok_or(ApiError::MaybeStored)?;
            match answered.status {
                Status::Signed => Ok(PostAnswer::Signed(Json(SigningRequest { last_error: None, webhook: None, ..answered }), applied)),
                Status::Pending => {
                    let expected = answered.estimated_completion_at.unwrap_or(answered.created_at);
                    let (location, retry_after) = (status_url(answered.id), retry_after(services.answers.time_until(expected)));
                    let receipt = SigningRequest { last_error: None, webhook: None, ..answered };
                    Ok(PostAnswer::Pending(Json(receipt), location, retry_after, applied))
                }
                Status::Failed => {
                    let failure = answered.last_error.and_then(|error| Failure::of_code(&error.code)).ok_or(ApiError::Internal)?;
                    Err(ApiError::WillNotBeSigned(failure, answered.id))
                }
            }
        }))
    }

    /// State of a request
    ///
    /// Answers at once or, with `Prefer: wait=N`, when the request is final or N seconds have passed.
    #[oai(path = "/crypto/sign/:id", method = "get", operation_id = "state")]
    async fn state(
        &self,
        key: Authorized,
        /// The id of a request.
        id: Path<Uuid>,
        /// `wait=N`: wait up to N seconds until the request is final.
        #[oai(name = "Prefer")]
        _prefer: Header<Option<String>>,
        headers: &HeaderMap,
        Data(services): Data<&Arc<Services>>,
    ) -> Result<Later<GetAnswer>, Fails<OnGet>> {
        let owner = key.owner()?;
        let preferences = Preferences { respond_async: false, ..Preferences::of(headers) };
        let wait = preferences.wait_or(Duration::ZERO, services.limits.max_wait);
        let found = services.answers.get(id.0, owner, wait).await.map_err(unreadable)?.ok_or(ApiError::UnknownRequest)?;
        let applied = preferences.applied(services.limits.max_wait, found.may_wait);
        let services = Arc::clone(services);
        Ok(Later::new(async move {
            let request = services.answers.state(found).await.map_err(unreadable)?.ok_or(ApiError::UnknownRequest)?;
            Ok(GetAnswer::State(Json(request), applied))
        }))
    }
}

/// The webhook that is sent when a request that asked for it is final.
#[Webhook]
pub trait Outgoing {
    /// The outcome of a request
    ///
    /// Sent according to the Standard Webhooks specification: verify `webhook-signature` over `webhook-id`, `webhook-timestamp` and the
    /// body with your secret. Repeated, with the same `webhook-id`, until the answer is 2xx or 410, or the retry schedule ends.
    #[oai(method = "post")]
    fn outcome(
        &self,
        /// The same in every attempt.
        #[oai(name = "webhook-id")]
        id: Header<String>,
        /// When this attempt was made, in seconds since the Unix epoch.
        #[oai(name = "webhook-timestamp")]
        timestamp: Header<String>,
        /// `v1,` and the base64 of an HMAC-SHA256; several, separated by spaces, while a secret is being rotated.
        #[oai(name = "webhook-signature")]
        signature: Header<String>,
        event: Json<WebhookEvent>,
    );
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function of the error")]
fn unreadable(error: ReadError) -> ApiError {
    tracing::warn!(error = display_chain(&error), "can't read a request");
    ApiError::Unavailable
}

/// The idempotency key of a request. The field and the header mean the same, and must not differ.
fn same_key(field: Option<String>, header: Option<String>) -> Result<Option<String>, ApiError> {
    match (field, header) {
        (Some(field), Some(header)) if field != header => {
            Err(ApiError::BadIdempotencyKey("Idempotency-Key and clientRequestId mean the same; give one, or the same value in both"))
        }
        (field, header) => Ok(field.or(header)),
    }
}

/// The trace of the request: our own span if spans are recorded, otherwise the caller's.
fn trace_of(headers: &HeaderMap) -> Option<String> {
    telemetry::traceparent().or_else(|| {
        let given = headers.get("traceparent")?.to_str().ok()?;
        telemetry::is_traceparent(given).then(|| given.to_owned())
    })
}

/// Seconds until it is worth asking for a signature that is expected after this time; at least 1, and at most an hour because it is only an
/// estimate.
fn retry_after(expected_in: Duration) -> u64 {
    expected_in.as_secs().clamp(1, 3600)
}
