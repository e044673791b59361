//! What all workers know about the upstream: the agreed rate and its slots.
//!
//! A window of the budget has `calls` slots. A slot is taken with a job in one statement, and free again one window after the upstream
//! answered (or, should the worker die, one window after its lease ended). The answer proves that the call had arrived by then, and the
//! next call with this slot is sent later than a window after; so two uses never arrive less than a window apart. `calls` slots, each
//! used at most once in any window: never more than `calls` arrivals.

use super::{Result, Store, seconds};
use crate::units::Rate;

/// A window is stretched by this factor when a slot waits for it, because clocks do not run alike: NTP may slew a clock by up to 500
/// parts in a million (`adjtimex(2)`), Postgres's in one direction and the upstream's in the other.
pub(super) const CLOCKS_DRIFT: f64 = 1.001;

impl Store {
    /// Makes `rate` the agreed rate. More slots are usable at once; when slots are taken away or the window grows, those that stay
    /// wait until what was sent under the old rate is out of every window.
    ///
    /// # Errors
    /// Those of a statement.
    pub async fn agree_on_rate(&self, rate: Rate) -> Result<()> {
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
        // The order in which claims and finishes lock: slots, then the row of the upstream.
        sqlx::query!("-- upstream.lock_slots\nselect from upstream_slots order by slot for update").execute(&mut transaction).await?;
        let old = sqlx::query!(
            r#"-- upstream.lock_rate
            select window_length = make_interval(secs => $1) as "same_window!",
                greatest(extract(epoch from make_interval(secs => $1) - window_length), 0)::float8 as "longer_by!"
            from upstream for update"#,
            seconds(rate.window()),
        )
        .fetch_one(&mut transaction)
        .await?;
        if !old.same_window {
            sqlx::query!(
                "-- upstream.lengthen_window
                update upstream_slots set free_at = free_at + make_interval(secs => $1) where free_at > '-infinity'",
                old.longer_by,
            )
            .execute(&mut transaction)
            .await?;
        }
        // Those that stay are the ones that are free last. When the first of them is, all that were taken away have been, so no more
        // than the new number of calls is in the window that the next call closes. The others are kept, with the time of their use,
        // for the day when the rate is raised again.
        sqlx::query!(
            "-- upstream.retire_slots
            update upstream_slots s set retired = r.place > $1
            from (select slot, row_number() over (order by free_at desc, slot) as place from upstream_slots) r
            where r.slot = s.slot and s.retired <> (r.place > $1)",
            i64::from(calls),
        )
        .execute(&mut transaction)
        .await?;
        sqlx::query!(
            "-- upstream.add_slots
            insert into upstream_slots (slot)
            select n from generate_series(1 + (select count(*) from upstream_slots), $1::int) n",
            calls,
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
        transaction.commit().await?;
        Ok(())
    }
}
