//! The state of requests, as their callers and receivers see it.

use std::collections::HashMap;

use time::OffsetDateTime;
use uuid::Uuid;

use super::keys::KeyId;
use super::{Result, Store, StoreError, count};
use crate::contract::{LastError, SigningRequest, Status, WebhookState, WebhookStatus};
use crate::forecast::Waiting;

/// The state of a request, and its owner.
#[derive(Clone, Debug)]
pub struct RequestState {
    /// The API key that posted it.
    pub owner: KeyId,
    /// What the caller sees, except for the place in the queue.
    pub request: SigningRequest,
    /// For a pending request: how its message waits, for a lookup in a [`Forecast`](crate::forecast::Forecast).
    pub waiting: Option<Waiting>,
}

impl Store {
    /// The states of the requests with these ids, in any order; unknown ids are missing. One that can't be read spoils no other.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn requests(&self, ids: &[Uuid]) -> Result<HashMap<Uuid, Result<RequestState>>> {
        let rows = sqlx::query_as!(
            Row,
            r#"-- requests.state
            select
                r.id, r.api_key_id, r.client_request_id, r.created_at, m.body, j.signature,
                (r.webhook_url is not null) as "has_webhook!",
                j.state::text as "state!", j.attempt - j.excused as "attempts!", j.failure, j.finished_at,
                case when j.lease_token is null then greatest(j.next_run_at, now()) else now() end as "next_run_at!",
                last.error as "last_error?", last.status as "last_status?", last.finished_at as "last_at?",
                w.state::text as "webhook_state?", w.attempt - w.excused as "webhook_attempts?",
                case when w.state = 'pending' then greatest(w.next_run_at, now()) end as "webhook_next_at?",
                case when w.lease_token is null then told.status end as "webhook_status?",
                case when w.lease_token is null then told.started_at else w.leased_at end as "webhook_at?",
                u.breaker_at as "breaker_at?",
                j.lane, j.id as job_id, j.next_run_at as due_at, j.lease_token is not null and j.leased_until > now() as "in_flight!",
                now() as "now!"
            -- One step of an index for each, whatever the planner believes about the sizes; none for what can't be there: the error of what
            -- was signed at once, or the webhook of a request that wants none.
            from unnest($1::uuid[]) as asked (id)
            cross join lateral (select * from requests where requests.id = asked.id limit 1) r
            cross join lateral (select * from jobs where jobs.id = r.sign_job_id limit 1) j
            cross join lateral (select * from messages where messages.id = j.message_id limit 1) m
            left join lateral (
                select a.status, a.error, a.finished_at
                from (
                    -- A lease that ran out, and an attempt whose lease did: the worker died, or could not write.
                    select null as status, 'outcome-unknown' as error, j.leased_until as finished_at, j.attempt as number
                    where j.lease_token is not null and j.leased_until <= now()
                    union all
                    (select status, coalesce(error, 'outcome-unknown'), coalesce(finished_at, started_at), number
                    from attempts
                    where job_id = j.id and (j.attempt > 1 or j.state <> 'succeeded') and outcome is distinct from 'released'
                        and (error is not null or finished_at is null and (number < j.attempt or j.lease_token is null))
                    order by number desc limit 1)
                ) a
                order by a.number desc limit 1
            ) last on true
            left join lateral (
                select * from jobs where jobs.request_id = r.id and jobs.kind = 'webhook' and r.webhook_url is not null limit 1
            ) w on true
            left join lateral (
                select a.status, a.started_at from attempts a
                where a.job_id = w.id and a.outcome is distinct from 'released'
                order by a.number desc limit 1
            ) told on true
            left join upstream u on j.state = 'pending' and u.probe_at is not null"#,
            ids,
        )
        .fetch_all(&self.database)
        .await?;
        Ok(rows.into_iter().map(|row| (row.id, row.into_state())).collect())
    }
}

struct Row {
    id: Uuid,
    api_key_id: Uuid,
    client_request_id: Option<String>,
    created_at: OffsetDateTime,
    body: Vec<u8>,
    signature: Option<Vec<u8>>,
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
    breaker_at: Option<OffsetDateTime>,
    lane: i16,
    job_id: i64,
    due_at: OffsetDateTime,
    in_flight: bool,
    now: OffsetDateTime,
}

impl Row {
    fn into_state(self) -> Result<RequestState> {
        let status = match self.state.as_str() {
            "pending" => Status::Pending,
            "succeeded" => Status::Signed,
            "failed" => Status::Failed,
            _ => return Err(StoreError::Corrupt("state of a sign job")),
        };
        let text = |bytes| String::from_utf8(bytes).map_err(|_| StoreError::Corrupt("message or signature"));
        let own_error = match (self.failure, self.last_error) {
            (None, None) => None,
            (failure, error) => Some(LastError {
                code: failure.or(error).unwrap_or_default(),
                status: self.last_status.map(http_status),
                at: self.finished_at.filter(|_| status == Status::Failed).or(self.last_at).unwrap_or(self.now),
            }),
        };
        // The failure that keeps it waiting may have happened to another message.
        let last_error = match self.breaker_at {
            Some(at) if own_error.as_ref().is_none_or(|own| own.at < at) => {
                Some(LastError { code: "upstream-unavailable".to_owned(), status: None, at })
            }
            _ => own_error,
        };
        let request = SigningRequest {
            id: self.id,
            status,
            message: text(self.body)?,
            signature: self.signature.map(text).transpose()?,
            client_request_id: self.client_request_id,
            attempts: count(self.attempts),
            created_at: self.created_at,
            signed_at: self.finished_at.filter(|_| status == Status::Signed),
            failed_at: self.finished_at.filter(|_| status == Status::Failed),
            next_attempt_at: (status == Status::Pending).then_some(self.next_run_at),
            queue_position: None,
            estimated_completion_at: None,
            status_url: None,
            last_error,
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
        let turn = (self.due_at, self.job_id);
        let waiting = (status == Status::Pending).then_some(Waiting { fresh: self.lane == 0, turn, in_flight: self.in_flight });
        Ok(RequestState { owner: KeyId(self.api_key_id), request, waiting })
    }
}

fn http_status(stored: i16) -> u16 {
    stored.unsigned_abs()
}
