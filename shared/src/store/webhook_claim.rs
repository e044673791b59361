//! The statement that claims webhook jobs.
//!
//! Receivers are the tenants' machines: some are slow, some are dead, and some have ten thousand webhooks waiting. None of them may get in
//! the way of the others. So the claim does not take the jobs that have been due the longest, but a fair share from each receiver. Its
//! parts:
//!
//! 1. `walk`: a loose index scan from receiver to receiver, one step each, from where the last claim stopped. Each step lands on the entry
//!    of the receiver's first job that nobody holds, so it also tells whether anything is due. The ten thousand jobs behind that entry are
//!    never read. A walk has at most `STEPS` steps; the caller continues from where it ended.
//! 2. `ready`: the receivers with a due job and room for it. A receiver that works has room up to a limit per process. One that fails, or
//!    that is not known yet, has room for one job, and only when its probe is due (see
//!    [`ReceiverNews`](super::webhook_finish::ReceiverNews)). A slow one has room for one job per process.
//! 3. `chosen`: as many receivers as jobs are wanted, and no more [new and troubled](Standing) ones than the caller has room for, in all
//!    and of one server. Of these, the servers take turns, and within a server the ones that have been due the longest are chosen.
//! 4. `due`: the same number of jobs from each, first due first, locked. `skip locked` passes over jobs that another worker is claiming.
//! 5. `probes`: a failing receiver lets one worker through. `on conflict` rechecks its condition after waiting for the lock, so it lets
//!    only one through even if two race. Jobs first, then probes: a claim that finds no job takes no probe.
//! 6. `leased`, `lost`, `pruned`: the lease with its fencing token, written before the delivery is made, so that a crash leaves a trace;
//!    the entry in the delivery log for an expired lease; and the removal of the oldest entries of a job that has very many.
//!
//! All of it is committed before anything is sent. If the worker is killed before the commit, nothing happened. After the commit, the lease
//! expires by itself, and the probe with it.
//!
//! The number of deliveries in flight to one receiver is limited per process, not globally. The limit protects the permits of the process,
//! and needs no row that every claim and every finish would have to lock. Processes share only what costs nothing while all is well:
//! whether a receiver fails.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::lease::{ClaimSentAt, readable};
use super::receivers::{ReceiverId, Standing, WATCHED_WITHIN, Wanted};
use super::requests::RequestState;
use super::server_time::ServerTime;
use super::webhook_finish::WebhookFinish;
use super::{Claimed, JobId, Lease, Result, Store, StoreError, count, duration, seconds};
use crate::contract::SigningRequest;
use crate::encryption::{AtRest, EncryptionError, SealedFor};
use crate::secret::Secret;
use crate::standard_webhooks::WebhookSecret;

/// The maximum number of receivers that one claim looks at.
const STEPS: i32 = 256;

/// How many entries of the delivery log are kept for one request.
pub(super) const KEPT_ATTEMPTS: i32 = 100;

/// A webhook that this process may send.
#[derive(Debug)]
pub struct WebhookJob {
    /// The lease on the job.
    pub lease: Lease,
    /// The request whose outcome it delivers.
    pub request: SigningRequest,
    /// Where to send it.
    pub url: String,
    /// The receiver at that address.
    pub receiver: ReceiverId,
    /// Consecutive failures of the receiver before this delivery. If above 0, this delivery is a probe.
    pub failures: u32,
    /// What is known about the receiver.
    pub standing: Standing,
    /// The secrets to sign it with and the headers to send, if they could be decrypted.
    pub confidential: Result<Confidential, EncryptionError>,
    /// The number of this attempt, counted from 1. Only attempts that count are included.
    pub attempt: u32,
    /// The trace context of the request.
    pub traceparent: Option<String>,
    /// Postgres's clock, by which the attempt is dated.
    pub clock: ServerTime,
}

/// The data of a webhook that is encrypted at rest.
#[derive(Debug)]
pub struct Confidential {
    /// Headers that the caller wants to be sent.
    pub headers: Secret<HashMap<String, String>>,
    /// The secrets to sign the webhook with, newest first.
    pub secrets: Vec<WebhookSecret>,
}

impl Store {
    /// Claims webhook jobs for `lease`, a fair share from each receiver. Begins after the receiver `after`; `None`: with the first one. Also
    /// returns the receiver after which the next claim should begin; `None` if all of the rest were looked at.
    ///
    /// # Errors
    /// If a statement fails. Then nothing was claimed or, if the connection broke during the commit, the leases expire by themselves.
    pub async fn claim_webhook_jobs(
        &self,
        wanted: &Wanted,
        after: Option<ReceiverId>,
        lease: Duration,
    ) -> Result<(Claimed<WebhookJob>, Option<ReceiverId>)> {
        let sent_at = ClaimSentAt::now();
        let number = |jobs: u32| i32::try_from(jobs).unwrap_or(i32::MAX);
        let held_by: Vec<Uuid> = wanted.held.iter().map(|held| held.receiver.0).collect();
        let held: Vec<i32> = wanted.held.iter().map(|held| number(held.jobs)).collect();
        let held_as_new: Vec<i32> = wanted.held.iter().map(|held| number(held.as_new)).collect();
        let held_as_troubled: Vec<i32> = wanted.held.iter().map(|held| number(held.as_troubled)).collect();
        let rows = sqlx::query_as!(
            Row,
            r#"-- webhook.claim
            with recursive walk as (
                (
                    select receiver, next_run_at, 1 as step from jobs
                    where kind = 'webhook' and state = 'pending' and receiver > $1 and (lease_token is null or leased_until <= now())
                    order by receiver, next_run_at limit 1
                )
                union all
                select next.receiver, next.next_run_at, walk.step + 1
                from walk cross join lateral (
                    select j.receiver, j.next_run_at from jobs j
                    where j.kind = 'webhook' and j.state = 'pending' and j.receiver > walk.receiver
                        and (j.lease_token is null or j.leased_until <= now())
                    order by j.receiver, j.next_run_at limit 1
                ) next
                where walk.step < $2
            ),
            held as materialized (
                select *, substring(uuid_send(receiver) for 8) as server
                from unnest($4::uuid[], $5::int[], $12::int[], $13::int[]) as held (receiver, jobs, as_new, as_troubled)
            ),
            held_by_servers as materialized (
                select server, sum(as_new) as as_new, sum(as_troubled) as as_troubled from held group by server
            ),
            known as materialized (
                select w.receiver, w.next_run_at, coalesce(r.failures, 1) as failures, coalesce(r.probe_at, w.next_run_at) as probe_at,
                    -- `Standing`: 0 is good, 1 new, 2 troubled.
                    case
                        when r.failures > 1 or r.failures = 0 and r.slow then 2
                        when r.failures = 0 then 0
                        else 1
                    end as standing,
                    case when r.failures = 0 then (case when r.slow then 1 else $3 end) - coalesce(held.jobs, 0) else 1 end as room,
                    w.server, coalesce(s.as_new, 0) as server_as_new, coalesce(s.as_troubled, 0) as server_as_troubled
                from (select *, substring(uuid_send(receiver) for 8) as server from walk) w
                left join receivers r on r.receiver = w.receiver
                left join held on held.receiver = w.receiver
                left join held_by_servers s on s.server = w.server
                where w.next_run_at <= now()
            ),
            in_turn as materialized (
                select *, case standing when 1 then server_as_new when 2 then server_as_troubled else 0 end
                    + row_number() over (partition by standing, server order by greatest(probe_at, next_run_at), receiver) as turn
                from known
                where room > 0 and (failures = 0 or probe_at <= now())
            ),
            ready as materialized (
                select *, row_number() over (partition by standing order by turn, greatest(probe_at, next_run_at), receiver) as place
                from in_turn
                where standing = 0 or standing = 1 and turn <= $14 or standing = 2 and turn <= $15
            ),
            chosen as materialized (
                select * from ready
                where standing = 0 or standing = 1 and place <= $6 or standing = 2 and place <= $10
                order by receiver limit $7
            ),
            due as materialized (
                select j.id, j.lost_since, chosen.receiver, chosen.failures, chosen.standing
                from chosen cross join lateral (
                    select id, case when lease_token is not null then leased_at end as lost_since from jobs
                    where kind = 'webhook' and state = 'pending' and receiver = chosen.receiver and next_run_at <= now()
                        and (lease_token is null or leased_until <= now())
                    order by next_run_at, id
                    limit least(chosen.room, greatest($7 / (select count(*) from chosen), 1))
                    for no key update skip locked
                ) j
            ),
            probes as (
                insert into receivers (receiver, probe_at)
                select receiver, now() + make_interval(secs => $8) from due where failures > 0 order by receiver
                on conflict (receiver) do update set probe_at = excluded.probe_at, changed_at = now(),
                    -- Nobody watched, and what the receiver did meanwhile is not known.
                    failing_since = case
                        when receivers.probe_at < now() - make_interval(secs => $11) then now() else receivers.failing_since
                    end
                    where receivers.failures > 0 and receivers.probe_at <= now()
                returning receiver
            ),
            leased as (
                update jobs
                set attempt = attempt + 1, lease_token = gen_random_uuid(), leased_at = now(),
                    leased_until = now() + make_interval(secs => $8),
                    -- A lease that ran out says nothing about the receiver, and most jobs of a worker that died were not sent.
                    excused = excused + (due.lost_since is not null)::int
                from due
                where jobs.id = any(array[due.id]) and (due.failures = 0 or due.receiver in (select receiver from probes))
                returning jobs.*, due.failures, due.standing, due.lost_since
            ),
            lost as (
                insert into attempts (job_id, number, started_at)
                select id, attempt - 1, lost_since from leased where lost_since is not null
                -- What is in the log already must not stop the queue.
                on conflict (job_id, number) do nothing
            ),
            pruned as (
                delete from attempts a using leased l where l.attempt > $9 and a.job_id = any(array[l.id]) and a.number <= l.attempt - $9
            ),
            hint as (
                select
                    case
                        -- Somebody else was faster, or a receiver has just changed.
                        when exists (select from due) then 0
                        else extract(epoch from least(
                            (select next_run_at from jobs where kind = 'webhook' and state = 'pending' and lane = 0 and next_run_at > now()
                                order by next_run_at limit 1),
                            -- Of those for which there is room: when there is more, a job has ended, and the next claim comes at once.
                            (select min(probe_at) from known where failures > 0 and probe_at > now() and (
                                standing = 1 and $6 > 0 and server_as_new < $14 or standing = 2 and $10 > 0 and server_as_troubled < $15
                            ))
                        ) - now())
                    end::float8 as next_in,
                    case
                        when (select count(*) from chosen) = $7 then (select receiver from chosen order by receiver desc limit 1)
                        when (select max(step) from walk) = $2 then (select receiver from walk order by step desc limit 1)
                    end as stopped_at
            )
            select
                leased.id as "id?", leased.request_id, leased.lease_token, leased.attempt - leased.excused as "attempt?",
                leased.traceparent, leased.receiver, leased.failures as "failures?",
                leased.standing as "standing?", r.webhook_url,
                r.webhook_headers as "webhook_headers?: Json<HashMap<String, String>>", r.sealed_webhook_headers, r.webhook_headers_key_id,
                k.id as "api_key_id?", k.webhook_secret as "webhook_secret?", k.webhook_secret_key_id,
                retired.secrets as "retired?", retired.key_ids as "retired_key_ids?: Vec<Option<String>>",
                hint.next_in, hint.stopped_at, now() as "now!"
            from hint
            left join leased on true
            left join lateral (select * from requests where requests.id = leased.request_id limit 1) r on true
            left join api_keys k on k.id = r.api_key_id
            left join lateral (
                select array_agg(s.secret order by s.id desc) as secrets, array_agg(s.secret_key_id order by s.id desc) as key_ids
                from retired_webhook_secrets s
                where s.api_key_id = k.id and s.signs_until > now()
            ) retired on true"#,
            after.map_or(Uuid::nil(), |receiver| receiver.0),
            STEPS,
            i32::try_from(wanted.per_receiver).unwrap_or(i32::MAX),
            &held_by,
            &held,
            i64::from(wanted.newcomers.in_all),
            i64::try_from(wanted.most.max(1)).unwrap_or(i64::MAX),
            seconds(lease),
            KEPT_ATTEMPTS,
            i64::from(wanted.troubled.in_all),
            seconds(WATCHED_WITHIN),
            &held_as_new,
            &held_as_troubled,
            i64::from(wanted.newcomers.of_one_server),
            i64::from(wanted.troubled.of_one_server),
        )
        .fetch_all(&self.database)
        .await?;
        let next_in = rows.first().and_then(|row| row.next_in).and_then(duration);
        let stopped_at = rows.first().and_then(|row| row.stopped_at).map(ReceiverId);
        let ids: Vec<Uuid> = rows.iter().filter_map(|row| row.request_id).collect();
        if ids.is_empty() {
            return Ok((Claimed { jobs: Vec::new(), next_in, look_again_in: None }, stopped_at));
        }
        let mut states = match self.requests(&ids).await {
            Ok(states) => states,
            // They are leased already, and nobody will work on them. If Postgres refuses to read them, they stay leased: otherwise, each claim
            // would end at them again.
            Err(error) if error.is_transient() => {
                let given_back: Vec<WebhookFinish> = rows.iter().filter_map(|row| row.given_back(sent_at, lease)).collect();
                let _ = self.finish_webhook_jobs(&given_back).await;
                return Err(error);
            }
            Err(error) => return Err(error),
        };
        let jobs = readable(rows.into_iter().filter_map(|row| row.into_job(self, &mut states, sent_at, lease)));
        Ok((Claimed { jobs, next_in, look_again_in: None }, stopped_at))
    }

    /// Decrypts the secrets and headers of one job. A value that can't be read affects only this job, and must not keep the others from
    /// being sent.
    fn confidential(
        &self,
        request: Uuid,
        api_key: Uuid,
        secrets: impl Iterator<Item = AtRest>,
        headers: Headers,
    ) -> Result<Confidential, EncryptionError> {
        let secrets = secrets.map(|stored| {
            let opened = self.keyring.open(SealedFor::WebhookSecret(api_key), stored)?;
            WebhookSecret::from_bytes(opened.expose().clone()).map_err(|_| EncryptionError::Malformed)
        });
        let headers = match headers {
            Headers::Plain(headers) => headers,
            Headers::Sealed(stored) => {
                let opened = self.keyring.open(SealedFor::WebhookHeaders(request), stored)?;
                serde_json::from_slice(opened.expose()).map_err(|_| EncryptionError::Malformed)?
            }
        };
        Ok(Confidential { secrets: secrets.collect::<Result<_, _>>()?, headers: Secret::new(headers) })
    }
}

/// A claimed job, or a single row without one. The columns about the queue are the same in every row.
struct Row {
    id: Option<i64>,
    request_id: Option<Uuid>,
    lease_token: Option<Uuid>,
    attempt: Option<i32>,
    traceparent: Option<String>,
    receiver: Option<Uuid>,
    failures: Option<i32>,
    standing: Option<i32>,
    webhook_url: Option<String>,
    webhook_headers: Option<Json<HashMap<String, String>>>,
    sealed_webhook_headers: Option<Vec<u8>>,
    webhook_headers_key_id: Option<String>,
    api_key_id: Option<Uuid>,
    webhook_secret: Option<Vec<u8>>,
    webhook_secret_key_id: Option<String>,
    retired: Option<Vec<Vec<u8>>>,
    retired_key_ids: Option<Vec<Option<String>>>,
    next_in: Option<f64>,
    stopped_at: Option<Uuid>,
    now: OffsetDateTime,
}

impl Row {
    /// The end of its lease without an attempt, if there is a job.
    fn given_back(&self, sent_at: ClaimSentAt, lease: Duration) -> Option<WebhookFinish> {
        Some(WebhookFinish::released(Lease::new(JobId(self.id?), self.lease_token?, sent_at, lease), count(self.failures?)))
    }

    /// The job, if there is one. Its request must be in `states`.
    fn into_job(
        self,
        store: &Store,
        states: &mut HashMap<Uuid, Result<RequestState>>,
        sent_at: ClaimSentAt,
        lease: Duration,
    ) -> Option<Result<WebhookJob>> {
        let id = JobId(self.id?);
        let read = || {
            let (request_id, api_key_id) = (self.request_id?, self.api_key_id?);
            let request = match states.remove(&request_id)? {
                Ok(state) => state.request,
                Err(error) => return Some(Err(error)),
            };
            let retired = self.retired.unwrap_or_default().into_iter().zip(self.retired_key_ids.unwrap_or_default());
            let stored = AtRest { key_id: self.webhook_secret_key_id, bytes: self.webhook_secret? };
            let secrets = std::iter::once(stored).chain(retired.map(|(bytes, key_id)| AtRest { key_id, bytes }));
            let headers = match (self.sealed_webhook_headers, self.webhook_headers) {
                (Some(bytes), _) => Headers::Sealed(AtRest { key_id: self.webhook_headers_key_id, bytes }),
                (None, plain) => Headers::Plain(plain.map(|headers| headers.0).unwrap_or_default()),
            };
            Some(Ok(WebhookJob {
                lease: Lease::new(id, self.lease_token?, sent_at, lease),
                request,
                url: self.webhook_url?,
                receiver: ReceiverId(self.receiver?),
                failures: count(self.failures?),
                standing: match self.standing? {
                    0 => Standing::Good,
                    1 => Standing::New,
                    2 => Standing::Troubled,
                    _ => return None,
                },
                confidential: store.confidential(request_id, api_key_id, secrets, headers),
                attempt: count(self.attempt?),
                traceparent: self.traceparent,
                clock: ServerTime::heard(self.now),
            }))
        };
        Some(read().unwrap_or(Err(StoreError::Corrupt("webhook job"))))
    }
}

/// The headers of a request as they are stored.
enum Headers {
    Plain(HashMap<String, String>),
    Sealed(AtRest),
}
