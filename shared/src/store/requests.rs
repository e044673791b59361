//! The state of requests, as their callers and receivers see it.

use std::collections::HashMap;

use time::OffsetDateTime;
use uuid::Uuid;

use super::keys::KeyId;
use super::{Result, Store, StoreError, count};
use crate::contract::{LastError, SigningRequest, Status, WebhookState, WebhookStatus};

/// A request's state, and whose it is.
#[derive(Clone, Debug)]
pub struct RequestState {
    /// The key that posted it.
    pub owner: KeyId,
    /// What the caller sees.
    pub request: SigningRequest,
}

/// How far the queue is counted; a position beyond is given as this. Counting further would cost more than the number is worth.
const FARTHEST_POSITION: i64 = 10_000;

impl Store {
    /// The states of the requests with these ids, in any order; unknown ids are missing.
    ///
    /// # Errors
    /// Those of a statement.
    pub async fn requests(&self, ids: &[Uuid]) -> Result<HashMap<Uuid, RequestState>> {
        let rows = sqlx::query_as!(
            Row,
            r#"-- requests.state
            select
                r.id, r.api_key_id, r.client_request_id, r.created_at, m.body, m.signature, m.signed_at,
                (r.webhook_url is not null) as "has_webhook!",
                j.state::text as "state!", j.attempt - j.excused as "attempts!", j.failure, j.finished_at,
                case when j.lease_token is null then greatest(j.next_run_at, now()) else now() end as "next_run_at!",
                last.error as "last_error?", last.status as "last_status?", last.finished_at as "last_at?",
                w.state::text as "webhook_state?", w.attempt - w.excused as "webhook_attempts?",
                case when w.state = 'pending' then greatest(w.next_run_at, now()) end as "webhook_next_at?",
                told.status as "webhook_status?", told.started_at as "webhook_at?",
                now() as "now!"
            from requests r
            join jobs j on j.id = r.sign_job_id
            join messages m on m.digest = j.message_digest
            left join lateral (
                select a.error, a.status, a.finished_at
                from attempts a
                where a.job_id = j.id and a.error is not null
                order by a.number desc limit 1
            ) last on true
            left join jobs w on w.request_id = r.id and w.kind = 'webhook'
            left join lateral (
                select a.status, a.started_at from attempts a where a.job_id = w.id order by a.number desc limit 1
            ) told on true
            where r.id = any($1)"#,
            ids,
        )
        .fetch_all(&self.database)
        .await?;
        rows.into_iter().map(|row| Ok((row.id, row.into_state()?))).collect()
    }

    /// For pending requests: their place in the queue, counted from 1, and when a signature is expected if every call before it
    /// uses one share of the budget.
    ///
    /// # Errors
    /// Those of a statement.
    pub async fn queue_places(&self, ids: &[Uuid]) -> Result<HashMap<Uuid, Place>> {
        let rows = sqlx::query!(
            r#"-- requests.queue_places
            select
                r.id,
                least(ahead.fresh + ahead.retries, $2) as "position!",
                greatest(
                    case when j.lease_token is null then j.next_run_at else now() end,
                    now() + coalesce(u.window_length / u.calls, interval '6 s') * least(ahead.fresh + ahead.retries, $2)::int
                ) as "expected_at!"
            from requests r
            join jobs j on j.id = r.sign_job_id
            left join upstream u on true
            cross join lateral (
                select
                    (select count(*) from (
                        select from jobs f
                        where f.kind = 'sign' and f.state = 'pending' and f.lane = 0
                            and (j.lane = 1 or (f.next_run_at, f.id) <= (j.next_run_at, j.id))
                        limit $2
                    ) f) as fresh,
                    (select count(*) from (
                        select from jobs t
                        where t.kind = 'sign' and t.state = 'pending' and t.lane = 1 and j.lane = 1
                            and (t.next_run_at, t.id) <= (j.next_run_at, j.id)
                        limit $2
                    ) t) as retries
            ) ahead
            where r.id = any($1) and j.state = 'pending'"#,
            ids,
            FARTHEST_POSITION,
        )
        .fetch_all(&self.database)
        .await?;
        Ok(rows.into_iter().map(|row| (row.id, Place { position: count(row.position), expected_at: row.expected_at })).collect())
    }
}

/// A place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Counted from 1.
    pub position: u32,
    /// When a signature is expected.
    pub expected_at: OffsetDateTime,
}

struct Row {
    id: Uuid,
    api_key_id: Uuid,
    client_request_id: Option<String>,
    created_at: OffsetDateTime,
    body: Vec<u8>,
    signature: Option<Vec<u8>>,
    signed_at: Option<OffsetDateTime>,
    has_webhook: bool,
    state: String,
    attempts: i32,
    failure: Option<String>,
    finished_at: Option<OffsetDateTime>,
    next_run_at: OffsetDateTime,
    last_error: Option<String>,
    last_status: Option<i16>,
    last_at: Option<OffsetDateTime>,
    webhook_state: Option<String>,
    webhook_attempts: Option<i32>,
    webhook_next_at: Option<OffsetDateTime>,
    webhook_status: Option<i16>,
    webhook_at: Option<OffsetDateTime>,
    now: OffsetDateTime,
}

impl Row {
    fn into_state(self) -> Result<RequestState> {
        let status = match self.state.as_str() {
            "pending" => Status::Pending,
            "succeeded" => Status::Signed,
            _ => Status::Failed,
        };
        let signed = status == Status::Signed;
        let text = |bytes| String::from_utf8(bytes).map_err(|_| StoreError::Corrupt("message or signature"));
        let request = SigningRequest {
            id: self.id,
            status,
            message: text(self.body)?,
            signature: self.signature.filter(|_| signed).map(text).transpose()?,
            client_request_id: self.client_request_id,
            attempts: count(self.attempts),
            created_at: self.created_at,
            signed_at: self.signed_at.filter(|_| signed),
            failed_at: self.finished_at.filter(|_| status == Status::Failed),
            next_attempt_at: (status == Status::Pending).then_some(self.next_run_at),
            queue_position: None,
            estimated_completion_at: None,
            status_url: None,
            last_error: match (self.failure, self.last_error) {
                (None, None) => None,
                (failure, error) => Some(LastError {
                    code: failure.or(error).unwrap_or_default(),
                    status: self.last_status.map(http_status),
                    at: self.finished_at.filter(|_| status == Status::Failed).or(self.last_at).unwrap_or(self.now),
                }),
            },
            webhook: self.has_webhook.then(|| WebhookState {
                status: match self.webhook_state.as_deref() {
                    Some("succeeded") => WebhookStatus::Delivered,
                    Some("failed") => WebhookStatus::Exhausted,
                    _ => WebhookStatus::Pending,
                },
                attempts: self.webhook_attempts.map_or(0, count),
                last_status: self.webhook_status.map(http_status),
                last_attempt_at: self.webhook_at,
                next_attempt_at: self.webhook_next_at,
            }),
        };
        Ok(RequestState { owner: KeyId(self.api_key_id), request })
    }
}

fn http_status(stored: i16) -> u16 {
    stored.unsigned_abs()
}
