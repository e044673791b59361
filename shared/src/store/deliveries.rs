//! The delivery log of a request, and replays of its webhook.

use time::OffsetDateTime;
use uuid::Uuid;

use super::keys::KeyId;
use super::webhook_claim::KEPT_ATTEMPTS;
use super::{Hint, JobKind, Result, Store, count};
use crate::contract::{Deliveries, DeliveryAttempt, DeliveryOutcome};

/// The outcome of a replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replay {
    /// It is sent again, or is about to be sent anyway.
    Sending,
    /// The request is not final: there is no outcome to send yet.
    NotFinal,
    /// The request asked for no webhook.
    NoWebhook,
    /// There is no such request, or it belongs to another key.
    Unknown,
}

impl Store {
    /// The delivery log of a request, oldest attempt first. `None` if there is no such request, or if it does not belong to `owner`.
    /// Without an `owner`, every request is visible.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn deliveries(&self, id: Uuid, owner: Option<KeyId>) -> Result<Option<Deliveries>> {
        let found = self.requests(&[id]).await?.remove(&id).transpose()?;
        let Some(state) = found.filter(|state| owner.is_none_or(|owner| owner == state.owner)) else { return Ok(None) };
        let rows = sqlx::query_as!(
            Row,
            r#"-- deliveries.list
            with webhook as materialized (
                select * from jobs where request_id = $1 and kind = 'webhook'
            )
            select
                number as "number!", started_at as "started_at!", duration_ms, outcome, status, error, response, in_flight as "in_flight!"
            from (
                select a.number, a.started_at, a.duration_ms, a.outcome, a.status, a.error, a.response, false as in_flight
                from webhook w join attempts a on a.job_id = w.id
                where a.outcome is distinct from 'released' and (a.outcome is not null or a.number < w.attempt or w.lease_token is null)
                union all
                select attempt, leased_at, null, null, null, null, null, leased_until > now()
                from webhook where lease_token is not null
            ) a
            order by number desc limit $2"#,
            id,
            i64::from(KEPT_ATTEMPTS),
        )
        .fetch_all(&self.database)
        .await?;
        let deliveries = rows.into_iter().rev().map(Row::into_attempt).collect();
        Ok(Some(Deliveries { webhook_id: webhook_id(id), webhook: state.request.webhook, deliveries }))
    }

    /// Sends the webhook of a request again, with a full new retry schedule. A webhook that waits for its next attempt is sent now, and one
    /// that is being sent is left alone.
    ///
    /// The request's row is locked, so that retention does not delete it meanwhile. A worker that holds the job is fenced by its lease. Two
    /// calls at once change the job once.
    ///
    /// # Errors
    /// If a statement fails. Then nothing has changed or, if the connection broke during the commit, the webhook is sent again.
    pub async fn replay(&self, id: Uuid, owner: Option<KeyId>) -> Result<Replay> {
        let mut transaction = self.database.begin().await?;
        let found = sqlx::query!(
            r#"-- deliveries.hold
            select r.webhook_url is not null as "has_webhook!", j.state = 'pending' as "pending!"
            from requests r join jobs j on j.id = any(array[r.sign_job_id])
            where r.id = $1 and ($2::uuid is null or r.api_key_id = $2)
            for share of r"#,
            id,
            owner.map(|owner| owner.0),
        )
        .fetch_optional(&mut transaction)
        .await?;
        match found {
            None => return Ok(Replay::Unknown),
            Some(request) if !request.has_webhook => return Ok(Replay::NoWebhook),
            Some(request) if request.pending => return Ok(Replay::NotFinal),
            Some(_) => {}
        }
        sqlx::query!(
            "-- deliveries.replay
            update jobs
            set state = 'pending', failure = null, finished_at = null, next_run_at = now(),
                -- The tries so far do not count any more.
                excused = case when state = 'pending' then excused else attempt end,
                receiver = coalesce(jobs.receiver, receiver_of(r.api_key_id, r.webhook_url))
            from requests r
            where r.id = $1 and request_id = r.id and kind = 'webhook'
                and (state <> 'pending' or lease_token is null and next_run_at > now())",
            id,
        )
        .execute(&mut transaction)
        .await?;
        transaction.commit().await?;
        self.tell([Hint::Jobs(JobKind::Webhook)]);
        Ok(Replay::Sending)
    }
}

/// The `webhook-id` of a request's webhook: the same in every delivery.
#[must_use]
pub fn webhook_id(request: Uuid) -> String {
    format!("msg_{}", request.simple())
}

struct Row {
    number: i32,
    started_at: OffsetDateTime,
    duration_ms: Option<i32>,
    outcome: Option<String>,
    status: Option<i16>,
    error: Option<String>,
    response: Option<Vec<u8>>,
    in_flight: bool,
}

impl Row {
    fn into_attempt(self) -> DeliveryAttempt {
        let outcome = match self.outcome.as_deref() {
            Some("succeeded") => DeliveryOutcome::Delivered,
            Some(_) => DeliveryOutcome::Failed,
            None if self.in_flight => DeliveryOutcome::Sending,
            None => DeliveryOutcome::Unknown,
        };
        DeliveryAttempt {
            number: count(self.number),
            started_at: self.started_at,
            duration_ms: self.duration_ms.map(count),
            outcome,
            status: self.status.map(i16::unsigned_abs),
            error: self.error,
            response: self.response.filter(|bytes| !bytes.is_empty()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
        }
    }
}
