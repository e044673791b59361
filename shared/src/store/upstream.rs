//! What all workers know about the upstream: the agreed rate and its slots, a pause, the circuit breaker.
//!
//! A window of the budget has `calls` slots. One statement takes a slot together with a job. The slot is free again one window after the
//! upstream answered (or, if the worker dies, one window after its lease ended). The answer proves that the call had arrived by then, and
//! the next call with this slot is sent more than a window later. So two uses never arrive less than a window apart. With `calls` slots,
//! each used at most once in any window, never more than `calls` calls arrive in a window.
//!
//! This holds for one rate. So a worker reports its configured rate when it starts, and again every [`SEEN_EVERY`] while it is alive. A
//! rate that differs from that of a living worker is refused. If no worker is alive, a new rate replaces the old one: more slots apply at
//! once; fewer slots or longer windows apply when the calls that were sent under the old rate are out of every window.

use std::time::Duration;

use uuid::Uuid;

use super::transaction::Transaction;
use super::{Result, Store, StoreError, count, duration, seconds};
use crate::units::Rate;

/// A window is stretched by this factor when a slot waits for it, because clocks drift: NTP may slew a clock by up to 500 parts in a
/// million (`adjtimex(2)`), Postgres's in one direction and the upstream's in the other.
pub(super) const CLOCKS_DRIFT: f64 = 1.001;

/// How often a worker sends a heartbeat.
pub const SEEN_EVERY: Duration = Duration::from_secs(2);

/// A worker that has not been seen for this long is taken for dead.
pub const LIVES_FOR: Duration = Duration::from_secs(10);

/// Identifies one run of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerId(Uuid);

impl WorkerId {
    /// A new id.
    #[must_use]
    pub fn generate() -> Self {
        Self(Uuid::now_v7())
    }
}

/// Whether a worker may call the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agreement {
    /// Its rate is the agreed one.
    Agreed,
    /// Other workers use this rate.
    Differs(Rate),
}

/// The answer to a worker's heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// Whether it may call the upstream.
    pub agreement: Agreement,
    /// Another server has taken over, and the slots are not set by its clock yet. Nobody claims until [`take_over`](Store::take_over) has
    /// run.
    pub taken_over: bool,
}

/// The upstream, as the workers see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamState {
    /// The agreed rate.
    pub rate: Rate,
    /// For how long from now the upstream asked all callers to wait; zero if it did not, or if that time is over.
    pub paused_for: Duration,
    /// The circuit breaker, while it is open.
    pub breaker: Option<OpenBreaker>,
}

/// An open circuit breaker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenBreaker {
    /// Stable class of the last failure.
    pub reason: String,
    /// Consecutive failures.
    pub failures: u32,
    /// The time until one call may be tried.
    pub probe_in: Duration,
}

impl Store {
    /// Lets `worker` take part with `rate`, unless living workers use another rate. If no other worker is alive, `rate` becomes the agreed
    /// one. More slots are usable at once. If slots are removed or the window grows, the slots that stay wait until the calls that were
    /// sent under the old rate are out of every window.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn join_workers(&self, worker: WorkerId, rate: Rate) -> Result<Agreement> {
        let calls = i32::from(rate.calls());
        let mut transaction = self.database.begin().await?;
        sqlx::query!(
            "-- upstream.agree
            insert into upstream (calls, window_length) values ($1, make_interval(secs => $2))
            on conflict (only_row) do nothing",
            calls,
            seconds(rate.window()),
        )
        .execute(&mut transaction)
        .await?;
        lock_leased_jobs(&mut transaction).await?;
        // The order in which claims lock: slots, then the upstream's row. Workers that start together take turns here.
        sqlx::query!("-- upstream.lock_slots\nselect from upstream_slots order by slot for update").execute(&mut transaction).await?;
        let old = sqlx::query!(
            r#"-- upstream.lock_rate
            select calls = $2 and window_length = make_interval(secs => $1) as "same!",
                calls, extract(epoch from window_length)::float8 as "window!",
                greatest(extract(epoch from make_interval(secs => $1) - window_length), 0)::float8 as "longer_by!"
            from upstream for update"#,
            seconds(rate.window()),
            calls,
        )
        .fetch_one(&mut transaction)
        .await?;
        let others = sqlx::query_scalar!(
            r#"-- upstream.living_workers
            with dead as (delete from sign_workers where seen_at < now() - make_interval(secs => $1))
            select exists (select from sign_workers where seen_at >= now() - make_interval(secs => $1) and id <> $2) as "others!""#,
            seconds(LIVES_FOR),
            worker.0,
        )
        .fetch_one(&mut transaction)
        .await?;
        if others && !old.same {
            return Ok(Agreement::Differs(read_rate(old.calls, old.window)?));
        }
        if !old.same {
            // A slot in use stays taken until its lease ends and a window has passed: how its previous use counts under the new rate is not
            // known, so a call that was not made must not free it sooner. In a longer window, a slot may have been used more than once, so
            // all slots wait until the last use of any is out of it.
            sqlx::query!(
                "-- upstream.change_window
                update upstream_slots s
                set free_at = case when $1 > 0.0::float8 then last.free_at + make_interval(secs => $1) else s.free_at end,
                    window_length = make_interval(secs => $2), lease_token = null
                from (select max(free_at) as free_at from upstream_slots) last",
                old.longer_by,
                seconds(rate.window()),
            )
            .execute(&mut transaction)
            .await?;
        }
        trust_no_other_clock(&mut transaction).await?;
        // The slots that stay are those that are free last. When the first of them is free, all removed ones have been free too, so the
        // window that the next call closes holds no more than the new number of calls. The removed slots are kept, with the time of their
        // use, in case the rate is raised again.
        sqlx::query!(
            "-- upstream.retire_slots
            update upstream_slots s set retired = r.place > $1
            from (select slot, row_number() over (order by free_at desc, slot) as place from upstream_slots) r
            where r.slot = s.slot and s.retired <> (r.place > $1)",
            i64::from(calls),
        )
        .execute(&mut transaction)
        .await?;
        // In a longer window, new slots wait like all others: the old slots may have been used more than once in it.
        sqlx::query!(
            "-- upstream.add_slots
            insert into upstream_slots (slot, window_length, free_at)
            select n, make_interval(secs => $2), case when $3 > 0.0::float8 then coalesce(last.free_at, '-infinity') else '-infinity' end
            from generate_series(1 + (select count(*) from upstream_slots), $1::int) n
            cross join (select max(free_at) as free_at from upstream_slots) last",
            calls,
            seconds(rate.window()),
            old.longer_by,
        )
        .execute(&mut transaction)
        .await?;
        sqlx::query!(
            "-- upstream.set_rate
            update upstream set calls = $1, window_length = make_interval(secs => $2)",
            calls,
            seconds(rate.window()),
        )
        .execute(&mut transaction)
        .await?;
        sqlx::query!(
            "-- upstream.join
            insert into sign_workers (id, calls, window_length) values ($1, $2, make_interval(secs => $3))
            on conflict (id) do update set seen_at = now()",
            worker.0,
            calls,
            seconds(rate.window()),
        )
        .execute(&mut transaction)
        .await?;
        transaction.commit().await?;
        Ok(Agreement::Agreed)
    }

    /// Records that `worker` is alive, and checks whether its rate is still the agreed one. It may differ if the worker was taken for dead.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn heartbeat(&self, worker: WorkerId, rate: Rate) -> Result<Heartbeat> {
        let row = sqlx::query!(
            r#"-- upstream.stay
            with agreed as materialized (
                select calls, window_length, calls = $2 and window_length = make_interval(secs => $3) as same from upstream
            ),
            seen as (
                insert into sign_workers (id, calls, window_length) select $1, calls, window_length from agreed where same
                on conflict (id) do update set seen_at = now()
            )
            select calls, extract(epoch from window_length)::float8 as "window!", same as "same!",
                (select timeline from upstream) is distinct from substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) as "taken_over!"
            from agreed"#,
            worker.0,
            i32::from(rate.calls()),
            seconds(rate.window()),
        )
        .fetch_one(&self.database)
        .await?;
        let agreement = if row.same { Agreement::Agreed } else { Agreement::Differs(read_rate(row.calls, row.window)?) };
        Ok(Heartbeat { agreement, taken_over: row.taken_over })
    }

    /// After a failover, makes the slots wait by the clock of the new server. Nothing is claimed before that. It reads every waiting job,
    /// so it may take a while. Only one worker does it: a call in the meantime has nothing to do, and returns `false`.
    ///
    /// # Errors
    /// If a statement fails; then nothing has changed.
    pub async fn take_over(&self) -> Result<bool> {
        let mut transaction = self.database.begin().await?;
        let alone = sqlx::query_scalar!(
            r#"-- upstream.alone
            select pg_try_advisory_xact_lock(hashtext('countersign.take_over')) as "alone!""#
        )
        .fetch_one(&mut transaction)
        .await?;
        if alone {
            lock_leased_jobs(&mut transaction).await?;
            sqlx::query!("-- upstream.lock_slots\nselect from upstream_slots order by slot for update").execute(&mut transaction).await?;
            trust_no_other_clock(&mut transaction).await?;
            transaction.commit().await?;
        }
        Ok(alone)
    }

    /// Records that `worker` is gone, so that nobody has to wait until it is taken for dead.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn leave_workers(&self, worker: WorkerId) -> Result<()> {
        sqlx::query!("-- upstream.leave\ndelete from sign_workers where id = $1", worker.0).execute(&self.database).await?;
        Ok(())
    }

    /// The upstream as the workers see it; `None` before the first of them has started.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn upstream(&self) -> Result<Option<UpstreamState>> {
        let row = sqlx::query!(
            r#"-- upstream.state
            select calls, extract(epoch from window_length)::float8 as "window!",
                coalesce(extract(epoch from nullif(paused_until, '-infinity') - now()), 0)::float8 as "paused_for!",
                breaker_failures, breaker_reason, extract(epoch from probe_at - now())::float8 as probe_in
            from upstream"#,
        )
        .fetch_optional(&self.database)
        .await?;
        row.map(|row| {
            let breaker = row.breaker_reason.zip(row.probe_in).map(|(reason, probe_in)| OpenBreaker {
                reason,
                failures: count(row.breaker_failures),
                probe_in: duration(probe_in).unwrap_or_default(),
            });
            Ok(UpstreamState { rate: read_rate(row.calls, row.window)?, paused_for: duration(row.paused_for).unwrap_or_default(), breaker })
        })
        .transpose()
    }
}

/// Sets the slots by the clock of this server, if it has taken over since they were set. Each slot waits as if it had been used just now. A
/// slot in use waits as if it had been claimed just now, and so does the lease that uses it. A clock that is behind makes slots and leases
/// wait longer by itself. [`lock_leased_jobs`] must run before.
async fn trust_no_other_clock(transaction: &mut Transaction) -> Result<()> {
    sqlx::query!(
        "-- upstream.take_over
        with taken_over as (
            update upstream set timeline = substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)
            where timeline is distinct from substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)
            returning only_row
        ),
        claimed as (
            update jobs set leased_until = greatest(leased_until, now() + (leased_until - leased_at))
            where kind = 'sign' and state = 'pending' and next_run_at < 'infinity' and lease_token is not null and exists (select from taken_over)
            returning lease_token, leased_at
        ),
        -- All jobs are looked at once, and not once for each slot.
        used as materialized (
            select s.ctid as place, c.leased_at from upstream_slots s left join claimed c using (lease_token)
        )
        update upstream_slots s
        set free_at = greatest(s.free_at, now() + coalesce(s.free_at - used.leased_at, s.window_length * $1::float8))
        from used
        where s.ctid = used.place and exists (select from taken_over) and s.free_at > '-infinity'",
        CLOCKS_DRIFT,
    )
    .execute(&mut *transaction)
    .await?;
    Ok(())
}

/// Locks the leased jobs, if another server has taken over since the slots were set. Jobs are locked before slots, as in claims and
/// finishes. Nobody claims anything more until the slots are set anew.
async fn lock_leased_jobs(transaction: &mut Transaction) -> Result<()> {
    sqlx::query!(
        "-- upstream.lock_leased_jobs
        select from jobs
        where kind = 'sign' and state = 'pending' and next_run_at < 'infinity' and lease_token is not null
            and (select timeline is distinct from substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) from upstream)
        order by id for no key update",
    )
    .execute(&mut *transaction)
    .await?;
    Ok(())
}

fn read_rate(calls: i32, window: f64) -> Result<Rate> {
    let corrupt = StoreError::Corrupt("rate");
    let (Ok(calls), Some(window)) = (u16::try_from(calls), duration(window)) else { return Err(corrupt) };
    Rate::new(calls, window).map_err(|_| corrupt)
}
