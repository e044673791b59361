//! Finishes webhook jobs with their outcome, in one statement: the fenced update, the entry of the delivery log, and what the delivery says
//! about its receiver.

use std::time::Duration;

use uuid::Uuid;

use super::{Finished, Lease, Result, Store, place, seconds};
use crate::call_error::CallError;

/// The outcome of an attempt to deliver.
#[derive(Debug)]
pub struct WebhookFinish {
    /// The lease of the attempt. Writing the outcome ends it.
    pub lease: Lease,
    /// What becomes of the job.
    pub ending: WebhookEnding,
    /// The HTTP status that the receiver answered, if it did.
    pub status: Option<u16>,
    /// What went wrong, if something did.
    pub error: Option<CallError>,
    /// How long the attempt took.
    pub took: Duration,
    /// The first bytes of the receiver's answer. At most [`LARGEST_RESPONSE`] are kept.
    pub response: Option<Vec<u8>>,
    /// What the attempt says about the receiver.
    pub receiver: ReceiverNews,
}

impl WebhookFinish {
    /// Gives a job back that was not sent, of a receiver that had failed `before` times in a row when it was claimed.
    #[must_use]
    pub fn released(lease: Lease, before: u32) -> Self {
        let receiver = ReceiverNews::None { before };
        Self { lease, ending: WebhookEnding::Released, status: None, error: None, took: Duration::ZERO, response: None, receiver }
    }
}

/// The maximum number of bytes of an answer that are kept.
pub const LARGEST_RESPONSE: usize = 2048;

/// What becomes of a webhook job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WebhookEnding {
    /// The receiver accepted it.
    Delivered,
    /// It is retried after this delay.
    Retry(Duration),
    /// It is not retried any more, and kept.
    Exhausted(WebhookFailure),
    /// The worker gives the job back, and this attempt does not count.
    Released,
}

/// Why a webhook is not retried any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WebhookFailure {
    /// The receiver answered 410: it wants no more webhooks.
    Gone,
    /// All attempts of the schedule failed.
    AttemptsExhausted,
    /// The receiver was down for as long as the schedule lasts.
    ReceiverDown,
}

impl WebhookFailure {
    /// The stable code in logs and metrics.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::AttemptsExhausted => "exhausted",
            Self::ReceiverDown => "receiver-down",
        }
    }
}

/// What an attempt says about its receiver. `before` holds the consecutive failures that the claim knew of: deliveries that were in flight
/// together fail together, and count once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiverNews {
    /// Nothing. If the attempt was a probe, the next probe may follow at once.
    None {
        /// Consecutive failures before this attempt.
        before: u32,
    },
    /// It works: several deliveries at a time may go to it, or one if it is slow.
    Works {
        /// Whether its answer took so long that it must not hold several calls.
        slow: bool,
    },
    /// It fails: one delivery at a time, and the next one after this pause.
    Fails {
        /// Consecutive failures before this attempt.
        before: u32,
        /// The delay before the next delivery.
        pause: Duration,
    },
}

impl Store {
    /// Writes the outcomes of `finishes` in one transaction, durably. Returns one result per finish, in order.
    ///
    /// # Errors
    /// If a statement fails. Then nothing was written or, if the connection broke during the commit, everything was.
    pub async fn finish_webhook_jobs(&self, finishes: &[WebhookFinish]) -> Result<Vec<Finished>> {
        let columns = Columns::of(finishes);
        let written = sqlx::query_scalar!(
            r#"-- webhook.finish
            with outcome as materialized (
                select * from unnest(
                    $1::bigint[], $2::uuid[], $3::text[], $4::float8[], $5::text[], $6::text[], $7::int[], $8::text[], $9::int[], $10::bytea[],
                    $11::bool[], $12::int[], $13::float8[], $14::bool[]
                ) with ordinality as o
                    (job, token, state, delay, failure, verdict, status, error, duration_ms, response, works, before, pause, slow, ord)
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
                where j.id = any(array[o.job]) and j.lease_token = o.token
                returning j.id, j.attempt, j.leased_at, j.receiver, o.*
            ),
            attempted as (
                insert into attempts (job_id, number, started_at, finished_at, outcome, status, error, duration_ms, response)
                select id, attempt, leased_at, now(), verdict, status, error, duration_ms, response from ended
            ),
            -- One that works makes up for others of this group that did not. Otherwise: fails, with the pause; or nothing was learned.
            news as materialized (
                select receiver, coalesce(bool_or(works), false) as works, max(before) as before, max(pause) as pause,
                    coalesce(bool_or(slow), false) as slow
                from ended group by receiver
            ),
            -- The rows that change, in order, so that two groups can't wait for each other. A receiver that works, as it did, has none.
            changed as materialized (
                select r.receiver, n.works, n.before, n.pause, n.slow
                from receivers r join news n on n.receiver = r.receiver
                where case
                    when n.works then r.failures > 0 or r.slow <> n.slow
                    when n.pause is not null then r.failures <= n.before
                    else r.failures > 0 and r.failures = n.before
                end
                order by r.receiver
                for no key update of r
            ),
            observed as (
                update receivers r
                set failures = case when c.works then 0 when c.pause is not null then c.before + 1 else r.failures end,
                    probe_at = now() + make_interval(secs => case when c.works then 0 else coalesce(c.pause, 0) end),
                    slow = case when c.works then c.slow else r.slow end,
                    failing_since = case when c.works then null else coalesce(r.failing_since, now()) end,
                    changed_at = now()
                from changed c
                where r.receiver = c.receiver
            )
            select ord as "ord!" from ended"#,
            &columns.jobs,
            &columns.tokens,
            &columns.states as _,
            &columns.delays as &[Option<f64>],
            &columns.failures as &[Option<&str>],
            &columns.verdicts as _,
            &columns.statuses as &[Option<i32>],
            &columns.errors as &[Option<&str>],
            &columns.durations,
            &columns.responses as &[Option<Vec<u8>>],
            &columns.works,
            &columns.before,
            &columns.pauses as &[Option<f64>],
            &columns.slow,
        )
        .fetch_all(&self.database)
        .await?;
        let mut results = vec![Finished::LeaseLost; finishes.len()];
        for ord in written {
            results[place(ord)?] = Finished::Written;
        }
        Ok(results)
    }
}

/// The finishes as columns, as `unnest` takes them.
#[derive(Default)]
struct Columns {
    jobs: Vec<i64>,
    tokens: Vec<Uuid>,
    states: Vec<&'static str>,
    delays: Vec<Option<f64>>,
    failures: Vec<Option<&'static str>>,
    verdicts: Vec<&'static str>,
    statuses: Vec<Option<i32>>,
    errors: Vec<Option<&'static str>>,
    durations: Vec<i32>,
    responses: Vec<Option<Vec<u8>>>,
    works: Vec<bool>,
    before: Vec<i32>,
    pauses: Vec<Option<f64>>,
    slow: Vec<bool>,
}

impl Columns {
    fn of(finishes: &[WebhookFinish]) -> Self {
        let mut columns = Self::default();
        for finish in finishes {
            let (state, verdict, delay, failure) = match finish.ending {
                WebhookEnding::Delivered => ("succeeded", "succeeded", None, None),
                WebhookEnding::Retry(delay) => ("pending", "try_again", Some(seconds(delay)), None),
                WebhookEnding::Exhausted(failure) => ("failed", "try_again", None, Some(failure.code())),
                WebhookEnding::Released => ("pending", "released", Some(0.0), None),
            };
            let (works, before, pause) = match finish.receiver {
                ReceiverNews::None { before } => (false, before, None),
                ReceiverNews::Works { .. } => (true, 0, None),
                ReceiverNews::Fails { before, pause } => (false, before, Some(seconds(pause))),
            };
            columns.jobs.push(finish.lease.job.0);
            columns.tokens.push(finish.lease.token);
            columns.states.push(state);
            columns.delays.push(delay);
            columns.failures.push(failure);
            columns.verdicts.push(verdict);
            columns.statuses.push(finish.status.map(i32::from));
            columns.errors.push(finish.error.map(CallError::code));
            columns.durations.push(i32::try_from(finish.took.as_millis()).unwrap_or(i32::MAX));
            columns.responses.push(finish.response.as_ref().map(|bytes| bytes[..bytes.len().min(LARGEST_RESPONSE)].to_vec()));
            columns.works.push(works);
            columns.before.push(i32::try_from(before).unwrap_or(i32::MAX - 1));
            columns.pauses.push(pause);
            columns.slow.push(finish.receiver == ReceiverNews::Works { slow: true });
        }
        columns
    }
}
