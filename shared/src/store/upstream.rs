//! What all workers know about the upstream: the agreed rate, a pause, the circuit breaker.
//!
//! Slots keep the budget for one rate (see `slots`). So a worker reports its configured rate when it starts, and again every [`SEEN_EVERY`]
//! while it is alive. A rate that differs from that of a living worker is refused. If no worker is alive, a new rate replaces the old one:
//! more slots apply at once; fewer slots or longer windows apply when the calls that were sent under the old rate are out of every window.

use std::time::Duration;

use sqlx::AssertSqlSafe;
use uuid::Uuid;

use super::transaction::Transaction;
use super::{Result, Store, StoreError, count, duration, seconds, slots};
use crate::units::Rate;

/// How often a worker sends a heartbeat.
pub const SEEN_EVERY: Duration = Duration::from_secs(2);

/// A worker that has not been seen for this long is taken for dead.
pub const LIVES_FOR: Duration = Duration::from_secs(10);

/// How long one statement of [taking over](Store::take_over) or of [joining](Store::join_workers) may take. A million waiting jobs are read
/// in seconds, and more slowly by a server that was a standby until just now.
const READ_ALL_WITHIN: Duration = Duration::from_mins(1);

/// How long taking over or joining may take: two such statements, and some short ones.
pub const TAKE_OVER_WITHIN: Duration = Duration::from_secs(2 * READ_ALL_WITHIN.as_secs() + 10);

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
        read_patiently(&mut transaction).await?;
        sqlx::query!(
            "-- upstream.agree
            insert into upstream (calls, window_length) values ($1, make_interval(secs => $2))
            on conflict (only_row) do nothing",
            calls,
            seconds(rate.window()),
        )
        .execute(&mut transaction)
        .await?;
        // Workers that start together take turns here.
        slots::lock_with_jobs(&mut transaction).await?;
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
            with living as materialized (
                -- Who was seen in the future was seen before the clock was set back.
                select id from sign_workers where abs(extract(epoch from now() - seen_at)) <= $1::float8
            ),
            dead as (delete from sign_workers where id not in (select id from living))
            select exists (select from living where id <> $2) as "others!""#,
            seconds(LIVES_FOR),
            worker.0,
        )
        .fetch_one(&mut transaction)
        .await?;
        if others && !old.same {
            return Ok(Agreement::Differs(read_rate(old.calls, old.window)?));
        }
        // First: it looks which slots are in use, and a change of the window ends that.
        slots::trust_no_other_clock(&mut transaction).await?;
        if !old.same {
            slots::change_window(&mut transaction, rate, old.longer_by).await?;
        }
        slots::change_number(&mut transaction, rate, old.longer_by).await?;
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
                (select timeline from upstream) is distinct from server_timeline() as "taken_over!"
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
        read_patiently(&mut transaction).await?;
        let alone = sqlx::query_scalar!(
            r#"-- upstream.alone
            select pg_try_advisory_xact_lock(hashtext('countersign.take_over')) as "alone!""#
        )
        .fetch_one(&mut transaction)
        .await?;
        if alone {
            slots::lock_with_jobs(&mut transaction).await?;
            slots::trust_no_other_clock(&mut transaction).await?;
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

/// Lets the statements of this transaction read every waiting job. The limit of the session is for those that read less.
async fn read_patiently(transaction: &mut Transaction) -> Result<()> {
    let limit = format!("set local statement_timeout = '{}s'", READ_ALL_WITHIN.as_secs());
    sqlx::raw_sql(AssertSqlSafe(limit)).execute(transaction.connection()).await?;
    Ok(())
}

fn read_rate(calls: i32, window: f64) -> Result<Rate> {
    let corrupt = StoreError::Corrupt("rate");
    let (Ok(calls), Some(window)) = (u16::try_from(calls), duration(window)) else { return Err(corrupt) };
    Rate::new(calls, window).map_err(|_| corrupt)
}
