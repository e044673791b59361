//! What callers and receivers see of a request: the bodies of the API's answers and of the webhook. They share one module because they are
//! the same.

use poem_openapi::{Enum, Object};
use time::OffsetDateTime;
use uuid::Uuid;

/// The state of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
#[oai(rename_all = "lowercase")]
pub enum Status {
    /// Waiting for a signature.
    Pending,
    /// The message is signed.
    Signed,
    /// There will be no signature; `lastError` says why.
    Failed,
}

/// One signing request.
#[derive(Clone, Debug, PartialEq, Object)]
#[oai(rename_all = "camelCase", skip_serializing_if_is_none)]
pub struct SigningRequest {
    /// Identifies the request.
    pub id: Uuid,
    /// The state of the request.
    pub status: Status,
    /// The message, exactly as it was posted.
    pub message: String,
    /// The upstream's signature, byte for byte. Present once signed.
    pub signature: Option<String>,
    /// The caller's idempotency key, if one was given.
    pub client_request_id: Option<String>,
    /// The number of calls to the upstream that were made for this message and count as attempts.
    pub attempts: u32,
    /// When the request was stored.
    pub created_at: OffsetDateTime,
    /// When the message was signed. Earlier than `createdAt` if the message had already been signed for another request.
    pub signed_at: Option<OffsetDateTime>,
    /// When the request failed permanently.
    pub failed_at: Option<OffsetDateTime>,
    /// When the next call to the upstream may be made. Present while pending.
    pub next_attempt_at: Option<OffsetDateTime>,
    /// The number of messages that go first, this one included. Present while pending.
    pub queue_position: Option<u32>,
    /// When the signature is expected, given the budget and the messages that go first. Present while pending.
    pub estimated_completion_at: Option<OffsetDateTime>,
    /// The URL to poll for the state. Present while pending.
    pub status_url: Option<String>,
    /// The last error, if there was one.
    pub last_error: Option<LastError>,
    /// The delivery of the webhook, if a URL was given.
    pub webhook: Option<WebhookState>,
}

/// The last error of a request.
#[derive(Clone, Debug, PartialEq, Eq, Object)]
#[oai(rename_all = "camelCase", skip_serializing_if_is_none)]
pub struct LastError {
    /// Stable error code: `status`, `timeout`, `connection`, `tls`, `reset`, `body`; `outcome-unknown`: a crash on our side cut the call;
    /// `upstream-unavailable`: the upstream does not work for any caller at present; and for a request that failed: `upstream-refused`,
    /// `attempts-exhausted` or `deadline-exceeded`.
    pub code: String,
    /// The HTTP status that the upstream answered, if it answered.
    pub status: Option<u16>,
    /// When it happened.
    pub at: OffsetDateTime,
}

/// The state of a webhook's delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
#[oai(rename_all = "lowercase")]
pub enum WebhookStatus {
    /// Not delivered yet. Delivery will be attempted, or attempted again.
    Pending,
    /// The receiver answered 2xx.
    Delivered,
    /// Every attempt failed. The webhook is kept for replay.
    Exhausted,
}

/// The delivery of a request's webhook.
#[derive(Clone, Debug, PartialEq, Eq, Object)]
#[oai(rename_all = "camelCase", skip_serializing_if_is_none)]
pub struct WebhookState {
    /// The state of the delivery.
    pub status: WebhookStatus,
    /// The number of delivery attempts, since the last replay if there was one.
    pub attempts: u32,
    /// The HTTP status of the receiver's last answer.
    pub last_status: Option<u16>,
    /// When the last attempt began.
    pub last_attempt_at: Option<OffsetDateTime>,
    /// When the next attempt is due. Present while the delivery is pending and the request's outcome is known.
    pub next_attempt_at: Option<OffsetDateTime>,
}

/// The outcome of one delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
#[oai(rename_all = "lowercase")]
pub enum DeliveryOutcome {
    /// The delivery is in progress.
    Sending,
    /// The receiver answered 2xx.
    Delivered,
    /// The receiver did not answer 2xx; `status` or `error` says more.
    Failed,
    /// The worker died before it could record the outcome. The webhook may or may not have been sent.
    Unknown,
}

/// One delivery of a webhook.
#[derive(Clone, Debug, PartialEq, Eq, Object)]
#[oai(rename_all = "camelCase", skip_serializing_if_is_none)]
pub struct DeliveryAttempt {
    /// The number of the delivery, counted from 1 for each request. Numbers can be missing.
    pub number: u32,
    /// When the delivery began.
    pub started_at: OffsetDateTime,
    /// How long the delivery took, in milliseconds.
    pub duration_ms: Option<u32>,
    /// The outcome of the delivery.
    pub outcome: DeliveryOutcome,
    /// The HTTP status of the receiver's answer, if it answered.
    pub status: Option<u16>,
    /// Stable error code: `status`, `timeout`, `connection`, `tls`, `reset`, `body`, `address` (no address that a webhook may go to),
    /// `unreadable` (a defect on our side).
    pub error: Option<String>,
    /// The first 2 KiB of the receiver's answer. Bytes that are not UTF-8 are replaced.
    pub response: Option<String>,
}

/// The delivery log of a request.
#[derive(Clone, Debug, PartialEq, Eq, Object)]
#[oai(rename_all = "camelCase", skip_serializing_if_is_none)]
pub struct Deliveries {
    /// The `webhook-id` of every delivery.
    pub webhook_id: String,
    /// The state of the delivery. Absent if the request asked for no webhook.
    pub webhook: Option<WebhookState>,
    /// The last 100 deliveries, oldest first.
    pub deliveries: Vec<DeliveryAttempt>,
}

/// The type of a webhook event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
pub enum EventType {
    /// `data` holds the signature.
    #[oai(rename = "signature.completed")]
    Completed,
    /// There will be no signature; `data.lastError` says why.
    #[oai(rename = "signature.failed")]
    Failed,
}

/// The body of a webhook.
#[derive(Clone, Debug, PartialEq, Object)]
pub struct WebhookEvent {
    /// What happened.
    #[oai(rename = "type")]
    pub event_type: EventType,
    /// When it happened. The same in every attempt.
    pub timestamp: OffsetDateTime,
    /// The request as `GET /crypto/sign/{id}` returns it, without `webhook`.
    pub data: SigningRequest,
}

impl WebhookEvent {
    /// The event of a request that is final. `None` if the request is pending.
    #[must_use]
    pub fn of(request: SigningRequest) -> Option<Self> {
        let (event_type, timestamp) = match request.status {
            Status::Pending => return None,
            Status::Signed => (EventType::Completed, request.signed_at?),
            Status::Failed => (EventType::Failed, request.failed_at?),
        };
        Some(Self { event_type, timestamp, data: SigningRequest { webhook: None, ..request } })
    }
}
