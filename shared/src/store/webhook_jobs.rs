//! Webhook jobs: taken, and given back with an outcome.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::{Claimed, Finished, JobId, Lease, Result, Store, StoreError, count, duration, seconds};
use crate::contract::SigningRequest;
use crate::secret::Secret;
use crate::standard_webhooks::WebhookSecret;

/// A webhook that this process may send.
#[derive(Debug)]
pub struct WebhookJob {
    /// The right to do so.
    pub lease: Lease,
    /// Whose outcome it tells.
    pub request: SigningRequest,
    /// Where it goes.
    pub url: String,
    /// Headers that the caller wants sent along.
    pub headers: Secret<HashMap<String, String>>,
    /// What it is signed with, newest first.
    pub secrets: Vec<WebhookSecret>,
    /// Which try this is, counted from 1, of those that count.
    pub attempt: u32,
    /// The trace of the request.
    pub traceparent: Option<String>,
}

/// How an attempt to deliver ended.
#[derive(Debug)]
pub struct WebhookFinish {
    /// The right to say so. It ends with this.
    pub lease: Lease,
    /// What becomes of the job.
    pub ending: Delivery,
    /// HTTP status that the receiver answered, if it did.
    pub status: Option<u16>,
    /// Stable class of what went wrong, if something did.
    pub error: Option<&'static str>,
}

/// What becomes of a webhook job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The receiver has it.
    Delivered,
    /// It is tried again after this delay.
    Retry(Duration),
    /// It is not tried again, and kept; with a stable code.
    Exhausted(&'static str),
    /// The worker stops and gives the job back, as if this attempt had not been.
    Released,
}

impl Store {
    /// Claims up to `most` webhook jobs for `lease`, in the order in which they are due.
    ///
    /// # Errors
    /// Those of a statement; jobs that were claimed but could not be read are due again when their lease runs out.
    pub async fn claim_webhook_jobs(&self, most: usize, lease: Duration) -> Result<Claimed<WebhookJob>> {
        let asked = Instant::now();
        let rows = sqlx::query!(
            r#"-- webhook.claim
            with due as materialized (
                select id from jobs
                where kind = 'webhook' and state = 'pending' and lane in (0, 1) and next_run_at <= now()
                order by next_run_at, id
                limit $1
                for no key update skip locked
            ),
            leased as (
                update jobs
                set attempt = attempt + 1, lease_token = gen_random_uuid(), next_run_at = now() + make_interval(secs => $2)
                from due
                where jobs.id = due.id
                returning jobs.*
            ),
            opened as (
                insert into attempts (job_id, number) select id, attempt from leased
            ),
            hint as (
                select extract(epoch from greatest(next_run_at, now()) - now())::float8 as next_in
                from (select least(
                    (select next_run_at from jobs where kind = 'webhook' and state = 'pending' and lane = 0
                        order by next_run_at, id limit 1),
                    (select next_run_at from jobs where kind = 'webhook' and state = 'pending' and lane = 1
                        order by next_run_at, id limit 1)
                ) as next_run_at) first
            )
            select
                leased.id as "id?", leased.request_id, leased.lease_token, leased.attempt - leased.excused as "attempt?",
                leased.traceparent, r.webhook_url, k.webhook_secret as "webhook_secret?", hint.next_in
            from hint
            left join leased on true
            left join requests r on r.id = leased.request_id
            left join api_keys k on k.id = r.api_key_id"#,
            i64::try_from(most).unwrap_or(i64::MAX),
            seconds(lease),
        )
        .fetch_all(&self.database)
        .await?;
        let next_in = rows.first().and_then(|row| row.next_in).and_then(duration);
        let ids: Vec<Uuid> = rows.iter().filter_map(|row| row.request_id).collect();
        if ids.is_empty() {
            return Ok(Claimed { jobs: Vec::new(), next_in });
        }
        let mut states = self.requests(&ids).await?;
        let mut headers = self.webhook_headers(&ids).await?;
        let jobs = rows
            .into_iter()
            .filter_map(|row| Some((row.id?, row)))
            .map(|(id, row)| {
                let read = || {
                    let request_id = row.request_id?;
                    Some(WebhookJob {
                        lease: Lease::new(JobId(id), row.lease_token?, asked, lease),
                        request: states.remove(&request_id)?.request,
                        url: row.webhook_url?,
                        headers: Secret::new(headers.remove(&request_id).unwrap_or_default()),
                        secrets: vec![WebhookSecret::from_bytes(row.webhook_secret?).ok()?],
                        attempt: count(row.attempt?),
                        traceparent: row.traceparent,
                    })
                };
                read().ok_or(StoreError::Corrupt("webhook job"))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Claimed { jobs, next_in })
    }

    /// Writes the outcomes of `finishes` together, durably. One result per finish, in order.
    ///
    /// # Errors
    /// Those of a statement; then nothing was written, or (if the connection broke during the commit) all was.
    pub async fn finish_webhook_jobs(&self, finishes: &[WebhookFinish]) -> Result<Vec<Finished>> {
        let jobs: Vec<i64> = finishes.iter().map(|finish| finish.lease.job.0).collect();
        let tokens: Vec<Uuid> = finishes.iter().map(|finish| finish.lease.token).collect();
        let (mut states, mut verdicts, mut delays, mut failures) = (vec![], vec![], vec![], vec![]);
        for finish in finishes {
            let (state, verdict, delay, failure) = match finish.ending {
                Delivery::Delivered => ("succeeded", "succeeded", None, None),
                Delivery::Retry(delay) => ("pending", "try_again", Some(seconds(delay)), None),
                Delivery::Exhausted(code) => ("failed", "try_again", None, Some(code.to_owned())),
                Delivery::Released => ("pending", "released", Some(0.0), None),
            };
            states.push(state);
            verdicts.push(verdict);
            delays.push(delay);
            failures.push(failure);
        }
        let statuses: Vec<Option<i32>> = finishes.iter().map(|finish| finish.status.map(i32::from)).collect();
        let errors: Vec<Option<String>> = finishes.iter().map(|finish| finish.error.map(ToOwned::to_owned)).collect();
        let written = sqlx::query_scalar!(
            r#"-- webhook.finish
            with outcome as materialized (
                select * from unnest($1::bigint[], $2::uuid[], $3::text[], $4::float8[], $5::text[], $6::text[], $7::int[], $8::text[])
                    with ordinality as o (job, token, state, delay, failure, verdict, status, error, ord)
            ),
            ended as (
                update jobs j
                set state = o.state::job_state,
                    lease_token = null,
                    next_run_at = now() + make_interval(secs => coalesce(o.delay, 0)),
                    excused = j.excused + (o.verdict = 'released')::int,
                    failure = o.failure,
                    finished_at = case when o.state <> 'pending' then now() end
                from outcome o
                where j.id = o.job and j.lease_token = o.token
                returning j.id, j.attempt, o.ord, o.verdict, o.status, o.error
            ),
            closed as (
                update attempts a
                set finished_at = now(), outcome = e.verdict, status = e.status, error = e.error
                from ended e
                where a.job_id = e.id and a.number = e.attempt
            )
            select ord as "ord!" from ended"#,
            &jobs,
            &tokens,
            &states as _,
            &delays as &[Option<f64>],
            &failures as &[Option<String>],
            &verdicts as _,
            &statuses as &[Option<i32>],
            &errors as &[Option<String>],
        )
        .fetch_all(&self.database)
        .await?;
        Ok((1..).take(finishes.len()).map(|ord| if written.contains(&ord) { Finished::Written } else { Finished::LeaseLost }).collect())
    }
}
