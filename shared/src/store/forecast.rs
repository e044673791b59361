//! Reads the queue of sign jobs as far as a forecast needs it.

use time::OffsetDateTime;

use super::low_water::{LATE_BY, LowWater};
use super::{Result, Store, count, duration};
use crate::forecast::{Forecast, Lane};

/// How far a forecast looks into each lane of the queue. Looking farther would cost more than the place is worth.
const FARTHEST_PLACE: i64 = 10_000;

/// The first places of a lane, up to this number, are known exactly. Behind them, only every so many-th is.
const EXACT_PLACES: i64 = 256;

impl Store {
    /// A forecast from the queue of sign jobs, scanned from the low-water marks `from`, and where the next scan may start.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn forecast(&self, from: LowWater) -> Result<(Forecast, LowWater)> {
        let row = sqlx::query!(
            r#"-- queue.forecast
            with fresh as (
                select next_run_at, id, row_number() over (order by next_run_at, id) as place from jobs
                where kind = 'sign' and state = 'pending' and lane = 0 and next_run_at >= coalesce($3::timestamptz, '-infinity')
                    and (lease_token is null or leased_until <= now())
                order by next_run_at, id limit $1
            ),
            retries as (
                select next_run_at, id, row_number() over (order by next_run_at, id) as place from jobs
                where kind = 'sign' and state = 'pending' and lane = 1 and next_run_at >= coalesce($4::timestamptz, '-infinity')
                    and (lease_token is null or leased_until <= now())
                order by next_run_at, id limit $1
            ),
            fresh_marks as materialized (
                select * from fresh where place <= $2 or place % $2 = 0 or place = (select max(place) from fresh)
            ),
            retry_marks as materialized (
                select * from retries where place <= $2 or place % $2 = 0 or place = (select max(place) from retries)
            ),
            first_slots as materialized (
                select * from upstream_slots
                where free_at >= coalesce($5::timestamptz, '-infinity') and not retired
                order by free_at limit $2
            )
            select
                now() as "at!",
                array(select next_run_at from fresh_marks order by place) as "fresh_due!",
                array(select id from fresh_marks order by place) as "fresh_ids!",
                array(select place from fresh_marks order by place) as "fresh_places!",
                array(select next_run_at from retry_marks order by place) as "retries_due!",
                array(select id from retry_marks order by place) as "retries_ids!",
                array(select place from retry_marks order by place) as "retries_places!",
                -- A slot that is being used is free a window after the answer, which mostly comes soon.
                array(
                    select greatest(now(), case when lease_token is null then free_at else least(free_at, now() + window_length) end) as free
                    from first_slots order by free
                ) as "slots_free!",
                -- One that is in use may be free sooner than it says.
                (select case when min(free_at) > '-infinity' then least(min(free_at), now()) end from first_slots) as slots_reached,
                u.calls as "calls?",
                extract(epoch from u.window_length)::float8 as "window?",
                greatest(now(), u.paused_until) as "paused_until!", greatest(now(), u.paused_until, u.probe_at) as "closed_until!"
            from (select) once left join upstream u on true"#,
            FARTHEST_PLACE,
            EXACT_PLACES,
            from.fresh,
            from.retries,
            from.slots,
        )
        .fetch_one(&self.database)
        .await?;
        let forecast = Forecast {
            at: row.at,
            fresh: lane(row.fresh_due, row.fresh_ids, row.fresh_places),
            retries: lane(row.retries_due, row.retries_ids, row.retries_places),
            first_slots: row.slots_free,
            slots: row.calls.map_or(0, count),
            window: row.window.and_then(duration).unwrap_or_default(),
            paused_until: row.paused_until,
            closed_until: row.closed_until,
        };
        let reached = |lane: &Lane| Some(lane.first().map_or(row.at, |first| first.min(row.at)) - LATE_BY);
        let reached = LowWater { fresh: reached(&forecast.fresh), retries: reached(&forecast.retries), slots: row.slots_reached };
        Ok((forecast, reached))
    }
}

/// A lane from its columns.
fn lane(due: Vec<OffsetDateTime>, ids: Vec<i64>, places: Vec<i64>) -> Lane {
    Lane { marks: due.into_iter().zip(ids).zip(places).map(|(turn, place)| (turn, count(place))).collect() }
}
