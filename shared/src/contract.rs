//! What callers and receivers see of a request: the bodies of the API's answers and of the webhook, in one place because they are the same.

use poem_openapi::{Enum, Object};
use time::OffsetDateTime;
use uuid::Uuid;

/// Where a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
#[oai(rename_all = "lowercase")]
pub enum Status {
    /// Waiting for a signature.
    Pending,
    /// The signature is there.
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
    /// Where the request stands.
    pub status: Status,
    /// The message exactly as it was posted.
    pub message: String,
    /// The upstream's signature, byte for byte. Present once signed.
    pub signature: Option<String>,
    /// The caller's idempotency key, if one was given.
    pub client_request_id: Option<String>,
    /// Calls of the upstream that were made for this message and count.
    pub attempts: u32,
    /// When the request was stored.
    pub created_at: OffsetDateTime,
    /// When the message was signed; earlier than `createdAt` if it had been signed for somebody before.
    pub signed_at: Option<OffsetDateTime>,
    /// When the request failed for good.
    pub failed_at: Option<OffsetDateTime>,
    /// When the next call of the upstream may be made. Present while pending.
    pub next_attempt_at: Option<OffsetDateTime>,
    /// Messages that go first, this one included. Present while pending.
    pub queue_position: Option<u32>,
    /// When the signature is expected, by the budget and the messages that go first. Present while pending.
    pub estimated_completion_at: Option<OffsetDateTime>,
    /// Where to ask for the state. Present while pending.
    pub status_url: Option<String>,
    /// The last thing that went wrong, once something did.
    pub last_error: Option<LastError>,
    /// The delivery of the webhook, where a URL was given.
    pub webhook: Option<WebhookState>,
}

/// What went wrong last.
#[derive(Clone, Debug, PartialEq, Eq, Object)]
#[oai(rename_all = "camelCase", skip_serializing_if_is_none)]
pub struct LastError {
    /// Stable class: `status`, `timeout`, `connection`, `reset`, `body`; `outcome-unknown`: the call was cut by a crash of ours;
    /// `upstream-unavailable`: the upstream works for nobody at present; and for a request that failed `upstream-refused`,
    /// `attempts-exhausted` or `deadline-exceeded`.
    pub code: String,
    /// The HTTP status that the upstream answered, if it answered.
    pub status: Option<u16>,
    /// When it happened.
    pub at: OffsetDateTime,
}

/// Where the delivery of a webhook stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
#[oai(rename_all = "lowercase")]
pub enum WebhookStatus {
    /// Not delivered yet; it will be tried (again).
    Pending,
    /// The receiver answered 2xx.
    Delivered,
    /// Every try failed; kept for replay.
    Exhausted,
}

/// The delivery of a request's webhook.
#[derive(Clone, Debug, PartialEq, Eq, Object)]
#[oai(rename_all = "camelCase", skip_serializing_if_is_none)]
pub struct WebhookState {
    /// Where the delivery stands.
    pub status: WebhookStatus,
    /// Deliveries tried, since it was last asked to be sent again.
    pub attempts: u32,
    /// The HTTP status of the receiver's last answer.
    pub last_status: Option<u16>,
    /// When the last try began.
    pub last_attempt_at: Option<OffsetDateTime>,
    /// When the next try is due. Present while pending and the outcome is known.
    pub next_attempt_at: Option<OffsetDateTime>,
}

/// How one delivery went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
#[oai(rename_all = "lowercase")]
pub enum DeliveryOutcome {
    /// It is under way.
    Sending,
    /// The receiver answered 2xx.
    Delivered,
    /// It did not; `status` or `error` says more.
    Failed,
    /// The worker that sent it died before it could say; it was sent, or not.
    Unknown,
}

/// One delivery of a webhook.
#[derive(Clone, Debug, PartialEq, Eq, Object)]
#[oai(rename_all = "camelCase", skip_serializing_if_is_none)]
pub struct DeliveryAttempt {
    /// Counted from 1 for each request; numbers can be missing.
    pub number: u32,
    /// When it began.
    pub started_at: OffsetDateTime,
    /// How long it took, in milliseconds.
    pub duration_ms: Option<u32>,
    /// How it went.
    pub outcome: DeliveryOutcome,
    /// The HTTP status of the receiver's answer, if it answered.
    pub status: Option<u16>,
    /// Stable class of what went wrong: `status`, `timeout`, `connection`, `reset`, `body`, `address` (no address that a webhook may go to),
    /// `unreadable` (a defect on our side).
    pub error: Option<String>,
    /// The first 2 KiB of the receiver's answer; what is not UTF-8 is replaced.
    pub response: Option<String>,
}

/// The delivery log of a request.
#[derive(Clone, Debug, PartialEq, Eq, Object)]
#[oai(rename_all = "camelCase", skip_serializing_if_is_none)]
pub struct Deliveries {
    /// The `webhook-id` of every delivery.
    pub webhook_id: String,
    /// Where the delivery stands; missing if the request asked for no webhook.
    pub webhook: Option<WebhookState>,
    /// What was sent, oldest first; the last 100.
    pub deliveries: Vec<DeliveryAttempt>,
}

/// What a webhook tells.
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
    /// When it happened; the same in every try.
    pub timestamp: OffsetDateTime,
    /// The request as `GET /crypto/sign/{id}` answers it, without `webhook`.
    pub data: SigningRequest,
}

impl WebhookEvent {
    /// The event of a request that is final; nothing for one that is pending.
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
