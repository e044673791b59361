//! Finishes sign jobs with their outcome, in one statement: the fenced update, the attempt, the signature, a webhook job for each waiting
//! request that asked for one, and the slot released. See `notify` for who is notified, and when.
//!
//! A request may be attached to a job just as the job ends. Both sides lock the job's row, but a statement sees only what was committed
//! before it began. So a finish that had to wait for the row does not see the requests that were attached meanwhile. It does see the
//! current version of the row, because it is about to write it, and the row counts the attached requests. If the finish knows of fewer, it
//! leaves the job alone. For these jobs, and for any others that were not written, a second try locks the jobs before its statement begins,
//! and so sees all requests.

use std::time::Duration;

use time::OffsetDateTime;

use super::slots::CLOCKS_DRIFT;
use super::{Finished, Hint, JobKind, Lease, Result, Store, StoreError, listen, notify, place, seconds};
use crate::call_error::CallError;
use crate::message::MessageDigest;

pub use super::upstream_news::UpstreamNews;

/// The outcome of an attempt to sign.
#[derive(Debug)]
pub struct SignFinish {
    /// The lease of the attempt. Writing the outcome ends it.
    pub lease: Lease,
    /// The digest of the message. Those who wait for it are notified.
    pub digest: MessageDigest,
    /// What becomes of the job.
    pub ending: SignEnding,
    /// What is known of the call.
    pub call: Call,
    /// The HTTP status that the upstream answered, if it did.
    pub status: Option<u16>,
    /// What went wrong, if something did.
    pub error: Option<CallError>,
    /// What the attempt says about the upstream.
    pub upstream: UpstreamNews,
}

impl SignFinish {
    /// The end of an attempt that made no call.
    #[must_use]
    pub fn without_call(lease: Lease, digest: MessageDigest, ending: SignEnding, upstream: UpstreamNews) -> Self {
        Self { lease, digest, ending, call: Call::NotMade, status: None, error: None, upstream }
    }
}

/// What is known of the call of an attempt. Says when its slot is free again, and whether the job has had its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// It can't have reached the upstream. Its slot is free at once, and a job that is given back keeps its place.
    NotMade,
    /// It has ended. Its slot is free a window from now.
    Ended,
    /// Nobody waits for it any more, but it may still arrive. Its slot stays taken as if nobody had freed it: until a window after the end
    /// of the lease.
    Abandoned,
}

/// What becomes of a sign job.
#[derive(Debug, PartialEq, Eq)]
pub enum SignEnding {
    /// It is signed: the signature, byte for byte.
    Signed(String),
    /// It is retried after this delay.
    Retry(Duration),
    /// The upstream works for nobody at present, or asks everybody to wait. The job is retried when it works again, and this attempt does not
    /// count.
    Unavailable {
        /// How long it waits with the retries. `None`: it keeps its place.
        again_in: Option<Duration>,
    },
    /// The worker gives the job back, and this attempt does not count.
    Released,
    /// It failed for good.
    Failed(Failure),
}

impl SignEnding {
    /// Whether it is an outcome: nobody has to wait any longer.
    fn is_final(&self) -> bool {
        matches!(self, Self::Signed(_) | Self::Failed(_))
    }
}

/// Why there will be no signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The upstream rejected the message as unacceptable.
    Refused,
    /// All allowed attempts failed.
    AttemptsExhausted,
    /// It took longer than allowed.
    DeadlineExceeded,
}

impl Failure {
    /// The failure with this code. `None` if there is none.
    #[must_use]
    pub fn of_code(code: &str) -> Option<Self> {
        [Self::Refused, Self::AttemptsExhausted, Self::DeadlineExceeded].into_iter().find(|failure| failure.code() == code)
    }

    /// The stable code that callers see in `lastError`.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Refused => "upstream-refused",
            Self::AttemptsExhausted => "attempts-exhausted",
            Self::DeadlineExceeded => "deadline-exceeded",
        }
    }
}

impl Store {
    /// Writes the outcomes of `finishes` as a batch, durably. Returns one result per finish, in order.
    ///
    /// # Errors
    /// If a statement fails. Then nothing was written, or a part was, or (if the connection broke during a commit) everything was. Writing
    /// again what was written returns [`Finished::LeaseLost`].
    pub async fn finish_sign_jobs(&self, finishes: &[SignFinish]) -> Result<Vec<Finished>> {
        // This comes first, so that a pause that the upstream asked for is kept even if the rest is not written.
        self.record_upstream_news(finishes).await?;
        let results = self.write_outcomes(finishes).await?;
        // Not before: until the outcome is written, this could be retried and give back a probe that another worker has claimed since.
        self.give_probes_back(finishes.iter().zip(&results).filter(|(_, result)| **result == Finished::Written).map(|(finish, _)| finish))
            .await;
        Ok(results)
    }

    async fn write_outcomes(&self, finishes: &[SignFinish]) -> Result<Vec<Finished>> {
        let mut order: Vec<usize> = (0..finishes.len()).collect();
        // In the order in which `accept` locks them.
        order.sort_unstable_by_key(|&place| finishes[place].lease.job.0);
        let mut results = vec![Finished::LeaseLost; finishes.len()];
        let columns = Columns::of(order.iter().map(|&place| &finishes[place]));
        let payload = || listen::results_payload(finishes.iter().map(|finish| finish.digest.hint()));
        let mut notification = notify::goes_with_commit(finishes.len()).then(payload);
        let written = match write(&self.database, &columns, Attached::MaybeMore, notification.as_deref()).await {
            // Postgres refuses every commit that notifies while its queue of notifications is full: some session does not read them.
            Err(StoreError::Refused(_)) if notification.take().is_some() => {
                write(&self.database, &columns, Attached::MaybeMore, None).await
            }
            written => written,
        }?;
        if notification.is_none() {
            self.tell(hints(&written, finishes));
        }
        for row in &written {
            results[order[row.place]] = Finished::Written;
        }
        order.retain(|&place| results[place] == Finished::LeaseLost);
        if order.is_empty() {
            return Ok(results);
        }
        match self.write_with_jobs_locked(finishes, &order).await {
            Ok(written) => {
                for row in &written {
                    results[order[row.place]] = Finished::Written;
                }
            }
            // An error would say that the others were not written either.
            Err(error) if error.is_transient() => {
                for place in order {
                    results[place] = Finished::HeldUp;
                }
            }
            Err(error) => return Err(error),
        }
        Ok(results)
    }

    /// Writes the outcomes at the places `order` that the first write did not: each job is lost, or has got a request meanwhile.
    async fn write_with_jobs_locked(&self, finishes: &[SignFinish], order: &[usize]) -> Result<Vec<Written>> {
        let mut columns = Columns::of(order.iter().map(|&place| &finishes[place]));
        // The first write freed them.
        columns.slots.fill(None);
        let mut transaction = self.database.begin().await?;
        sqlx::query!(
            "-- sign.lock_jobs
            select from jobs where id = any($1) order by id for no key update",
            &columns.jobs,
        )
        .execute(&mut transaction)
        .await?;
        let written = write(&mut transaction, &columns, Attached::AllSeen, None).await?;
        transaction.commit().await?;
        self.tell(hints(&written, finishes));
        Ok(written)
    }
}

/// An outcome that was written.
struct Written {
    /// Its index in the columns.
    place: usize,
    /// Whether it created webhook jobs.
    opens_webhooks: bool,
}

/// The hints for those who wait. They include every final outcome, whether it was written now or not: an earlier try may have written it in
/// a commit that this process has not heard of.
fn hints(written: &[Written], finishes: &[SignFinish]) -> impl Iterator<Item = Hint> {
    let results: Vec<u64> = finishes.iter().filter(|finish| finish.ending.is_final()).map(|finish| finish.digest.hint()).collect();
    let webhooks = written.iter().any(|row| row.opens_webhooks).then_some(Hint::Jobs(JobKind::Webhook));
    webhooks.into_iter().chain((!results.is_empty()).then_some(Hint::Results(results)))
}

/// Whether the statement sees every request that is attached to the jobs it ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Attached {
    /// It may miss some. If it sees fewer than the job's row counts, it leaves the job alone.
    MaybeMore,
    /// It does: the jobs were locked before it began.
    AllSeen,
}

/// Writes the outcomes in `columns`, and returns those that were written. `notification` is the payload that notifies those who wait in the
/// same transaction; `None` if this transaction does not notify.
async fn write(
    executor: impl sqlx::PgExecutor<'_>,
    columns: &Columns,
    attached: Attached,
    notification: Option<&str>,
) -> Result<Vec<Written>> {
    let written = sqlx::query!(
        r#"-- sign.finish
        with outcome as materialized (
            select o.*, r.*
            from unnest(
                $1::bigint[], $2::uuid[], $3::text[], $4::float8[], $5::bytea[], $6::text[], $7::text[], $8::int[], $9::text[], $10::bool[],
                $12::int[], $14::timestamptz[]
            ) with ordinality as o (job, token, state, delay, signature, failure, verdict, status, error, called, slot, taken_until, ord)
            cross join lateral (
                select count(*) as attached, array_agg(r.id) filter (where r.webhook_url is not null) as with_webhook,
                    array_agg(receiver_of(r.api_key_id, r.webhook_url)) filter (where r.webhook_url is not null) as receivers,
                    array_agg(r.traceparent) filter (where r.webhook_url is not null) as traces
                from requests r where r.sign_job_id = o.job and o.state <> 'pending'
            ) r
        ),
        ended as (
            update jobs j
            set state = o.state::job_state,
                lease_token = null,
                -- What has to wait waits with the retries.
                lane = case when o.state = 'pending' and o.delay is not null then 1 else j.lane end,
                -- An attempt that does not count: it keeps its place, unless there was a call.
                next_run_at = case
                    when o.delay is not null then now() + make_interval(secs => o.delay)
                    when o.called then now()
                    else j.next_run_at
                end,
                excused = j.excused + (o.verdict in ('unavailable', 'released'))::int,
                failure = o.failure,
                signature = o.signature,
                finished_at = case when o.state <> 'pending' then now() end
            from outcome o
            where j.id = any(array[o.job]) and j.lease_token = o.token and (o.state = 'pending' or $13 or o.attached >= j.attached)
            returning j.id, j.attempt, j.leased_at, j.state, o.ord, o.verdict, o.status, o.error, o.attached, o.with_webhook, o.receivers, o.traces
        ),
        attempted as (
            insert into attempts (job_id, number, started_at, finished_at, outcome, status, error)
            select id, attempt, leased_at, now(), verdict, status, error from ended
        ),
        -- A slot belongs to the lease, not to the job: it is released even when the job was lost.
        -- It is looked up where the claim put it. Those that are not there were moved or retired since, or others have them; all slots are
        -- read once for them.
        held as materialized (
            select o.token, o.called, (
                select ctid from upstream_slots
                where free_at = o.taken_until and slot = o.slot and not retired and lease_token = o.token
            ) as place
            from outcome o
            where o.slot is not null
        ),
        moved as materialized (
            select ctid as place, lease_token from upstream_slots
            where exists (select from held where place is null)
                and lease_token = any(array(select token from held where place is null))
        ),
        freed as (
            update upstream_slots s
            set free_at = case when h.called then now() + s.window_length * $11::float8 else now() end, lease_token = null
            from (
                select token, called, coalesce(place, (select m.place from moved m where m.lease_token = token)) as place from held
            ) h
            where s.ctid = h.place and s.lease_token = h.token
        ),
        outbox as (
            insert into jobs (kind, request_id, receiver, traceparent)
            select 'webhook', r.id, r.receiver, r.trace
            from ended cross join unnest(with_webhook, receivers, traces) as r (id, receiver, trace)
            order by r.id
            returning id
        ),
        counted as (
            insert into pending_changes (requests) select -sum(attached) from ended having sum(attached) > 0
        ),
        notified as (
            select case when exists (select from outbox) then pg_notify($16, 'webhook') end,
                case when exists (select from ended where state <> 'pending') then pg_notify($17, $15) end
            where $15::text is not null
        )
        select ord as "ord!", with_webhook is not null as "opens_webhooks!" from ended cross join (select count(*) from notified) done"#,
        &columns.jobs,
        &columns.tokens,
        &columns.states as _,
        &columns.delays as &[Option<f64>],
        &columns.signatures as &[Option<Vec<u8>>],
        &columns.failures as &[Option<&str>],
        &columns.verdicts as _,
        &columns.statuses as &[Option<i32>],
        &columns.errors as &[Option<&str>],
        &columns.called,
        CLOCKS_DRIFT,
        &columns.slots as &[Option<i32>],
        attached == Attached::AllSeen,
        &columns.taken_until as &[Option<OffsetDateTime>],
        notification,
        listen::JOBS,
        listen::RESULTS,
    )
    .fetch_all(executor)
    .await?;
    written.into_iter().map(|row| Ok(Written { place: place(row.ord)?, opens_webhooks: row.opens_webhooks })).collect()
}

/// The finishes as columns, as `unnest` takes them.
#[derive(Default)]
struct Columns {
    jobs: Vec<i64>,
    tokens: Vec<uuid::Uuid>,
    slots: Vec<Option<i32>>,
    taken_until: Vec<Option<OffsetDateTime>>,
    states: Vec<&'static str>,
    delays: Vec<Option<f64>>,
    signatures: Vec<Option<Vec<u8>>>,
    failures: Vec<Option<&'static str>>,
    verdicts: Vec<&'static str>,
    statuses: Vec<Option<i32>>,
    errors: Vec<Option<&'static str>>,
    called: Vec<bool>,
}

impl Columns {
    fn of<'a>(finishes: impl Iterator<Item = &'a SignFinish>) -> Self {
        let mut columns = Self::default();
        for finish in finishes {
            let (state, verdict) = match &finish.ending {
                SignEnding::Signed(_) => ("succeeded", "succeeded"),
                SignEnding::Retry(_) => ("pending", "try_again"),
                SignEnding::Unavailable { .. } => ("pending", "unavailable"),
                SignEnding::Released => ("pending", "released"),
                // No call was made, so this is not an attempt that counts.
                SignEnding::Failed(_) if finish.call == Call::NotMade => ("failed", "released"),
                SignEnding::Failed(Failure::Refused) => ("failed", "refused"),
                SignEnding::Failed(_) => ("failed", "try_again"),
            };
            columns.jobs.push(finish.lease.job.0);
            columns.tokens.push(finish.lease.token);
            let freed = finish.lease.slot.filter(|_| finish.call != Call::Abandoned);
            columns.slots.push(freed.map(|slot| slot.number));
            columns.taken_until.push(freed.map(|slot| slot.taken_until));
            columns.states.push(state);
            columns.verdicts.push(verdict);
            columns.delays.push(match finish.ending {
                SignEnding::Retry(delay) => Some(seconds(delay)),
                SignEnding::Signed(_) | SignEnding::Failed(_) => Some(0.0),
                SignEnding::Unavailable { again_in } => again_in.map(seconds),
                SignEnding::Released => None,
            });
            columns.signatures.push(match &finish.ending {
                SignEnding::Signed(signature) => Some(signature.as_bytes().to_vec()),
                _ => None,
            });
            columns.failures.push(match finish.ending {
                SignEnding::Failed(failure) => Some(failure.code()),
                _ => None,
            });
            columns.statuses.push(finish.status.map(i32::from));
            columns.errors.push(finish.error.map(CallError::code));
            columns.called.push(finish.call != Call::NotMade);
        }
        columns
    }
}
