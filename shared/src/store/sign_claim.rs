//! The statement that claims sign jobs.
//!
//! A job may only be worked on with a slot of the budget, and claiming the two separately could strand either. So one statement claims
//! both. Its parts:
//!
//! 1. `gate`, `wanted`, `room`: how many slots are free, up to as many as there is use for. None, unless the rate is the agreed one, the
//!    slots are set by the clock of this server (see `slots`), and the upstream is neither paused nor down. One, if the circuit breaker is
//!    open and a probe is due.
//! 2. `fresh`, `retries`: the first due jobs of each lane, locked. `skip locked` passes over jobs that another worker is claiming at this
//!    moment. The lock is `for no key update` instead of plain `for update`: it is the weakest lock that keeps two claims apart. An
//!    expired lease is as good as none. A leased job stays in its place in the index: the claim steps over it.
//!    `newest`: instead of the first job, if this is a probe. What seems to be the upstream's absence may be the refusal of some messages,
//!    and these must not be every probe there is.
//! 3. `slots`: as many slots as there are jobs, locked. Jobs first, then slots: a claim that finds no job locks no slot, so no claim holds
//!    slots that it can't use.
//! 4. `picked`: first tries before retries, except that every fifth use of a slot prefers a retry that has been due for five windows.
//!    [`policy`](crate::policy) gives the reason, has the two constants, and makes the same choice in Rust; a test compares the two.
//! 5. `probe`: an open circuit breaker lets one worker through. `update` rechecks its condition after waiting for the lock, so it lets only
//!    one through even if two race.
//! 6. `spent`, `leased`: the slot, taken until a window after the end of the lease; and the lease with its fencing token. They are written
//!    before the call is made, so that a crash leaves a trace.
//! 7. `lost`: the attempt under an expired lease. Its outcome is unknown.
//!
//! All of it is committed before any work starts. If the worker is killed before the commit, nothing happened. After the commit, the lease
//! expires by itself, and the slot a window later.

use std::time::Duration;

use time::OffsetDateTime;
use uuid::Uuid;

use super::lease::{ClaimSentAt, Slot, readable};
use super::low_water::{LATE_BY, LowWater};
use super::slots::CLOCKS_DRIFT;
use super::{Claimed, JobId, Lease, Result, Store, StoreError, count, duration, seconds};
use crate::message::Message;
use crate::policy::{RETRY_EVERY, RETRY_OVERDUE_WINDOWS};
use crate::units::Rate;

/// If fewer jobs than this are due, leased ones included, only as many free slots are counted. If more are, the jobs are not counted: most
/// claims of many get as many as they asked for.
const FEW: i64 = 16;

/// A sign job that this process may work on.
#[derive(Debug)]
pub struct SignJob {
    /// The lease on the job.
    pub lease: Lease,
    /// The message to sign.
    pub message: Message,
    /// The number of this attempt, counted from 1. Only attempts that count are included.
    pub attempt: u32,
    /// How long ago the job was created.
    pub age: Duration,
    /// How many messages wait for a signature, including this one. Counted from the low-water marks on, up to 1,000.
    pub competing: u32,
    /// The mean time between two calls when the whole budget is spent.
    pub interval: Duration,
    /// Consecutive failures of the upstream before this call. If above 0, this call is a probe.
    pub breaker_failures: u32,
    /// The trace context of the request that created the job.
    pub traceparent: Option<String>,
}

impl Store {
    /// Claims up to `most` sign jobs for `lease`, each with a slot of the budget. Claims none unless `rate` is the agreed one.
    ///
    /// Scans jobs and slots from the low-water marks `from`, and also returns where the next claim may start. With the default marks, it is
    /// a full scan.
    ///
    /// # Errors
    /// If a statement fails. Then nothing was claimed or, if the connection broke during the commit, the leases expire by themselves.
    pub async fn claim_sign_jobs(&self, most: usize, lease: Duration, rate: Rate, from: LowWater) -> Result<(Claimed<SignJob>, LowWater)> {
        let sent_at = ClaimSentAt::now();
        let rows = sqlx::query_as!(
            Row,
            r#"-- sign.claim
            with gate as materialized (
                select window_length, breaker_failures, probe_at is not null as probing
                from upstream
                where paused_until <= now() and (probe_at is null or probe_at <= now())
                    and calls = $6 and window_length = make_interval(secs => $7)
                    and timeline = server_timeline()
            ),
            wanted as materialized (
                select case when (select probing from gate) then 1 when count(*) < $11 then least(count(*), $1::bigint) else $1::bigint end as n
                from (
                    (select from jobs
                    where kind = 'sign' and state = 'pending' and lane = 0 and next_run_at between coalesce($8::timestamptz, '-infinity') and now()
                    order by next_run_at limit $11)
                    union all
                    (select from jobs
                    where kind = 'sign' and state = 'pending' and lane = 1 and next_run_at between coalesce($9::timestamptz, '-infinity') and now()
                    order by next_run_at limit $11)
                    limit $11
                ) due
            ),
            room as materialized (
                select count(*) as n from (
                    select from upstream_slots
                    where free_at between coalesce($10::timestamptz, '-infinity') and now() and not retired
                    -- The order of the index: or else a plan may look up all of them before it returns the first.
                    order by free_at
                    limit (select n from wanted)
                ) free
                where exists (select from gate)
            ),
            fresh as materialized (
                select id, next_run_at, case when lease_token is not null then leased_at end as lost_since from jobs
                where kind = 'sign' and state = 'pending' and lane = 0 and next_run_at between coalesce($8::timestamptz, '-infinity') and now()
                    and (lease_token is null or leased_until <= now())
                order by next_run_at, id
                limit (select case when exists (select from gate where probing) then 0 else n end from room)
                for no key update skip locked
            ),
            newest as materialized (
                select id, next_run_at, case when lease_token is not null then leased_at end as lost_since from jobs
                where kind = 'sign' and state = 'pending' and lane = 0 and next_run_at between coalesce($8::timestamptz, '-infinity') and now()
                    and (lease_token is null or leased_until <= now())
                order by next_run_at desc, id desc
                limit (select case when exists (select from gate where probing) then n else 0 end from room)
                for no key update skip locked
            ),
            firsts as materialized (
                select * from fresh union all select * from newest
            ),
            retries as materialized (
                select id, next_run_at, case when lease_token is not null then leased_at end as lost_since from jobs
                where kind = 'sign' and state = 'pending' and lane = 1 and next_run_at between coalesce($9::timestamptz, '-infinity') and now()
                    and (lease_token is null or leased_until <= now())
                order by next_run_at, id
                limit (select n from room)
                for no key update skip locked
            ),
            slots as materialized (
                select ctid as place, slot, uses, free_at from upstream_slots
                where free_at between coalesce($10::timestamptz, '-infinity') and now() and not retired
                order by free_at, slot
                limit least(
                    (select n from room), (select count(*) from firsts) + (select count(*) from retries)
                )
                for update skip locked
            ),
            picked as materialized (
                select id, lost_since, row_number() over () as seat
                from (
                    (select id, lost_since from retries order by next_run_at, id limit greatest(
                        least(
                            (select count(*) from slots where (slot + uses) % $4::int = 0),
                            (select count(*) from retries, gate where next_run_at <= now() - $5::int * window_length)
                        ),
                        (select count(*) from slots) - (select count(*) from firsts)
                    ))
                    union all
                    (select id, lost_since from firsts order by next_run_at, id)
                ) due
                limit (select count(*) from slots)
            ),
            probe as (
                update upstream set probe_at = now() + make_interval(secs => $2)
                where probe_at <= now() and exists (select from picked)
                returning only_row
            ),
            paired as (
                -- Not a join, which a planner that expects few rows makes by comparing each with each.
                select picked.id, picked.lost_since, taken.places[picked.seat::int] as place
                from picked cross join (select array_agg(place order by slot) as places from slots) taken
                where not (select probing from gate) or exists (select from probe)
            ),
            spent as (
                -- By its place, not by its number: that would step over every earlier use, while no vacuum has taken them away. A slot that
                -- was written since this statement began is not seen there; then its job is not leased either.
                update upstream_slots s
                set free_at = now() + make_interval(secs => $2) + s.window_length * $3::float8, uses = uses + 1,
                    lease_token = gen_random_uuid()
                from paired
                where s.ctid = paired.place
                returning paired.id as job, paired.lost_since, s.slot, s.free_at, s.lease_token
            ),
            leased as (
                update jobs
                set attempt = attempt + 1, lease_token = spent.lease_token, leased_at = now(),
                    leased_until = now() + make_interval(secs => $2),
                    lane = case when spent.lost_since is null then jobs.lane else 1 end
                from spent
                -- Not `jobs.id = spent.job`, by which all jobs could be walked in the order of their index.
                where jobs.id = any(array[spent.job])
                returning jobs.*, spent.slot, spent.free_at as taken_until, spent.lost_since
            ),
            lost as (
                insert into attempts (job_id, number, started_at)
                select id, attempt - 1, lost_since from leased where lost_since is not null
                -- What is in the log already must not stop the queue.
                on conflict (job_id, number) do nothing
            ),
            -- Who got as much as was wanted asks again anyway.
            hint as (
                select case when due_at is not null then extract(epoch from greatest(
                    due_at, now(),
                    (select free_at from upstream_slots
                        where free_at >= coalesce($10::timestamptz, '-infinity') and not retired and slot not in (select slot from leased)
                        order by free_at limit 1),
                    (select greatest(paused_until, probe_at) from upstream),
                    -- The heartbeat finds out what to do about these.
                    (select now() + interval '1 second' from upstream
                        where calls <> $6 or window_length <> make_interval(secs => $7) or timeline is distinct from server_timeline())
                ) - now())::float8 end as next_in
                from (select case when (select count(*) from leased) < $1 then least(
                    (select next_run_at from jobs
                        where kind = 'sign' and state = 'pending' and lane = 0 and next_run_at >= coalesce($8::timestamptz, '-infinity')
                            and (lease_token is null or leased_until <= now()) and id not in (select id from leased)
                        order by next_run_at, id limit 1),
                    (select next_run_at from jobs
                        where kind = 'sign' and state = 'pending' and lane = 1 and next_run_at >= coalesce($9::timestamptz, '-infinity')
                            and (lease_token is null or leased_until <= now()) and id not in (select id from leased)
                        order by next_run_at, id limit 1)
                ) end as due_at offset 0) first
            )
            select
                leased.id as "id?", leased.slot as "slot?", leased.taken_until as "taken_until?",
                (select nullif(max(free_at), '-infinity') from slots) as slots_reached,
                case when leased.lost_since is null and not gate.probing then leased.lane end as "lane?",
                leased.next_run_at as "next_run_at?", leased.lease_token, leased.attempt - leased.excused as "attempt?", leased.traceparent,
                extract(epoch from now() - leased.created_at)::float8 as age,
                messages.body as "body?",
                gate.breaker_failures as "breaker_failures?",
                case when leased.id is null then null when (select count(*) from leased) >= 1000 then 1000 else (
                    select count(*) from (
                        (select from jobs
                        where kind = 'sign' and state = 'pending' and lane = 0 and next_run_at >= coalesce($8::timestamptz, '-infinity')
                        order by next_run_at, id limit 1000)
                        union all
                        (select from jobs
                        where kind = 'sign' and state = 'pending' and lane = 1 and next_run_at >= coalesce($9::timestamptz, '-infinity')
                        order by next_run_at, id limit 1000)
                        limit 1000
                    ) waiting
                ) end as competing,
                hint.next_in
            from hint
            left join leased on true
            left join lateral (select body from messages m where m.id = leased.message_id limit 1) messages on true
            left join gate on true"#,
            i64::try_from(most).unwrap_or(i64::MAX),
            seconds(lease),
            CLOCKS_DRIFT,
            i32::from(RETRY_EVERY),
            i32::from(RETRY_OVERDUE_WINDOWS),
            i32::from(rate.calls()),
            seconds(rate.window()),
            from.fresh,
            from.retries,
            from.slots,
            FEW,
        )
        .fetch_all(&self.database)
        .await?;
        let reached = rows.iter().fold(from, |reached, row| row.advance(reached));
        let next_in = rows.first().and_then(|row| row.next_in).and_then(duration);
        let jobs = readable(rows.into_iter().filter_map(|row| row.into_job(sent_at, lease, rate.interval())));
        Ok((Claimed { jobs, next_in, look_again_in: None }, reached))
    }
}

/// A claimed job, or a single row without one. The columns about the queue are the same in every row.
struct Row {
    id: Option<i64>,
    slot: Option<i32>,
    taken_until: Option<OffsetDateTime>,
    slots_reached: Option<OffsetDateTime>,
    lane: Option<i16>,
    next_run_at: Option<OffsetDateTime>,
    lease_token: Option<Uuid>,
    attempt: Option<i32>,
    traceparent: Option<String>,
    age: Option<f64>,
    body: Option<Vec<u8>>,
    breaker_failures: Option<i32>,
    competing: Option<i64>,
    next_in: Option<f64>,
}

impl Row {
    /// Moves `reached` as far as the claim came with this job.
    fn advance(&self, mut reached: LowWater) -> LowWater {
        let due = self.next_run_at.map(|due| due - LATE_BY);
        match self.lane {
            Some(0) => reached.fresh = reached.fresh.max(due),
            Some(_) => reached.retries = reached.retries.max(due),
            // Its lease had expired, or it is a probe: it does not lie where the others do.
            None => {}
        }
        reached.slots = reached.slots.max(self.slots_reached);
        reached
    }

    /// The job, if there is one.
    fn into_job(self, sent_at: ClaimSentAt, lease: Duration, interval: Duration) -> Option<Result<SignJob>> {
        let id = JobId(self.id?);
        let read = || {
            let slot = Slot { number: self.slot?, taken_until: self.taken_until? };
            Some(SignJob {
                lease: Lease::new(id, self.lease_token?, sent_at, lease).with_slot(slot),
                message: Message::new(String::from_utf8(self.body?).ok()?),
                attempt: count(self.attempt?),
                age: self.age.and_then(duration)?,
                competing: count(self.competing?),
                interval,
                breaker_failures: count(self.breaker_failures?),
                traceparent: self.traceparent,
            })
        };
        Some(read().ok_or(StoreError::Corrupt("job")))
    }
}
