//! The slots of the budget, when the rate or the server changes. Claims take them (`sign_claim`), finishes free them (`sign_finish`).
//!
//! A window of the budget has `calls` slots. One statement takes a slot together with a job. The slot is free again one window after the
//! upstream answered (or, if the worker dies, one window after its lease ended). The answer proves that the call had arrived by then, and
//! the next call with this slot is sent more than a window later. So two uses never arrive less than a window apart. With `calls` slots,
//! each used at most once in any window, never more than `calls` calls arrive in a window.

use super::transaction::Transaction;
use super::{Result, seconds};
use crate::units::Rate;

/// A window is stretched by this factor when a slot waits for it, because clocks drift: NTP may slew a clock by up to 500 parts in a
/// million (`adjtimex(2)`), Postgres's in one direction and the upstream's in the other.
pub(super) const CLOCKS_DRIFT: f64 = 1.001;

/// Locks all slots and, if another server has taken over since they were set, the leased jobs. In the order in which claims and finishes
/// lock: jobs, slots, the upstream's row. Nobody claims anything meanwhile.
pub(super) async fn lock_with_jobs(transaction: &mut Transaction) -> Result<()> {
    sqlx::query!(
        "-- upstream.lock_leased_jobs
        select from jobs
        where kind = 'sign' and state = 'pending' and next_run_at < 'infinity' and lease_token is not null
            and (select timeline is distinct from server_timeline() from upstream)
        order by id for no key update",
    )
    .execute(&mut *transaction)
    .await?;
    sqlx::query!("-- upstream.lock_slots\nselect from upstream_slots order by slot for update").execute(&mut *transaction).await?;
    Ok(())
}

/// Sets the window of all slots to that of `rate`, which is longer by `longer_by` seconds.
///
/// A slot in use stays taken until its lease ends and a window has passed: how its previous use counts under the new rate is not known, so
/// a call that was not made must not free it sooner. In a longer window, a slot may have been used more than once, so all slots wait until
/// the last use of any is out of it.
pub(super) async fn change_window(transaction: &mut Transaction, rate: Rate, longer_by: f64) -> Result<()> {
    sqlx::query!(
        "-- upstream.change_window
        update upstream_slots s
        set free_at = case when $1 > 0.0::float8 then last.free_at + make_interval(secs => $1 * $3::float8) else s.free_at end,
            window_length = make_interval(secs => $2), lease_token = null
        from (select max(free_at) as free_at from upstream_slots) last",
        longer_by,
        seconds(rate.window()),
        CLOCKS_DRIFT,
    )
    .execute(&mut *transaction)
    .await?;
    Ok(())
}

/// Sets the number of slots to that of `rate`, whose window is longer by `longer_by` seconds.
///
/// The slots that stay are those that are free last. When the first of them is free, all removed ones have been free too, so the window
/// that the next call closes holds no more than the new number of calls. The removed slots are kept, with the time of their use, in case
/// the rate is raised again. In a longer window, new slots wait like all others: the old slots may have been used more than once in it.
pub(super) async fn change_number(transaction: &mut Transaction, rate: Rate, longer_by: f64) -> Result<()> {
    let calls = i32::from(rate.calls());
    sqlx::query!(
        "-- upstream.retire_slots
        update upstream_slots s set retired = r.place > $1
        from (select slot, row_number() over (order by free_at desc, slot) as place from upstream_slots) r
        where r.slot = s.slot and s.retired <> (r.place > $1)",
        i64::from(calls),
    )
    .execute(&mut *transaction)
    .await?;
    sqlx::query!(
        "-- upstream.add_slots
        insert into upstream_slots (slot, window_length, free_at)
        select n, make_interval(secs => $2), case when $3 > 0.0::float8 then coalesce(last.free_at, '-infinity') else '-infinity' end
        from generate_series(1 + (select count(*) from upstream_slots), $1::int) n
        cross join (select max(free_at) as free_at from upstream_slots) last",
        calls,
        seconds(rate.window()),
        longer_by,
    )
    .execute(&mut *transaction)
    .await?;
    Ok(())
}

/// Sets the slots by the clock of this server, if it has taken over since they were set. Each slot waits as if it had been used just now. A
/// slot in use waits as if it had been claimed just now, and so does the lease that uses it. A clock that is behind makes slots and leases
/// wait longer by itself. [`lock_with_jobs`] must run before.
pub(super) async fn trust_no_other_clock(transaction: &mut Transaction) -> Result<()> {
    sqlx::query!(
        "-- upstream.take_over
        with taken_over as (
            update upstream set timeline = server_timeline()
            where timeline is distinct from server_timeline()
            returning only_row
        ),
        claimed as (
            update jobs set leased_until = greatest(leased_until, now() + (leased_until - leased_at))
            where kind = 'sign' and state = 'pending' and next_run_at < 'infinity' and lease_token is not null
                and exists (select from taken_over)
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
