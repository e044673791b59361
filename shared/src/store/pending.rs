//! The number of unfinished requests, so that it can be limited.
//!
//! It is a ledger: whoever accepts or ends requests adds a row with the difference in the same transaction. Nobody waits for anybody, and
//! no row is looked up, so writing costs the same when no vacuum has run for hours. Reading the sum is what costs. So a process caches the
//! last sum that it read and adds what it has accepted since. It reads again in the background, and before it refuses anything.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Result, Store, within};
use crate::telemetry::display_chain;

/// The minimum time for which the cached number is used. The number does not include what other processes accept meanwhile.
const GOOD_FOR: Duration = Duration::from_millis(250);

/// No statement takes longer than this.
const READ_WITHIN: Duration = Duration::from_secs(10);

/// Reading takes at most this share of the time. The share is per process, so it adds up.
const ONE_IN: u32 = 30;

/// If there are more rows than this, they are merged into one.
const MANY: i64 = 1_000;

/// What a process knows about the number. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Pending {
    cached: Arc<Mutex<CachedCount>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct CachedCount {
    seen: Option<Seen>,
    /// Requests that this process has accepted since it started.
    accepted: i64,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    requests: i64,
    good_until: Instant,
}

impl Pending {
    fn cached(&self) -> MutexGuard<'_, CachedCount> {
        self.cached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores the number that was read when this process had accepted `accepted` requests. It may not include those accepted since.
    fn read(&self, requests: i64, accepted: i64, good_for: Duration) {
        let mut cached = self.cached();
        let requests = requests.saturating_add(cached.accepted - accepted);
        cached.seen = Some(Seen { requests, good_until: Instant::now() + good_for });
    }

    /// Adds requests that were accepted.
    pub(super) fn add(&self, requests: i64) {
        let mut cached = self.cached();
        cached.accepted = cached.accepted.saturating_add(requests);
        if let Some(seen) = &mut cached.seen {
            seen.requests = seen.requests.saturating_add(requests);
        }
    }

    /// Whether the caller should read the number again: `true` for one caller, and for no other until the read is done or [`READ_WITHIN`]
    /// has passed.
    fn take_refresh(&self) -> bool {
        self.cached().seen.as_mut().is_some_and(|seen| {
            let old = seen.good_until <= Instant::now();
            if old {
                seen.good_until = Instant::now() + READ_WITHIN;
            }
            old
        })
    }
}

impl Store {
    /// How many more requests may be accepted before `most` are unfinished. Uses the cached number if it leaves room for `wanted`.
    /// Otherwise reads the number first, so that nothing is refused because of a stale one.
    pub(super) async fn room(&self, wanted: usize, most: u64) -> Result<i64> {
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let wanted = i64::try_from(wanted).unwrap_or(i64::MAX);
        let seen = self.pending.cached().seen;
        if let Some(room) = seen.map(|seen| most.saturating_sub(seen.requests)).filter(|room| *room >= wanted) {
            if self.pending.take_refresh() {
                let store = self.clone();
                self.tasks.spawn(async move {
                    if let Err(error) = within(READ_WITHIN, store.pending_requests()).await {
                        tracing::debug!(error = display_chain(&error), "can't count the unfinished requests; the last number stands");
                    }
                });
            }
            return Ok(room);
        }
        Ok(most.saturating_sub(i64::try_from(self.pending_requests().await?).unwrap_or(i64::MAX)))
    }

    /// How many requests are unfinished.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn pending_requests(&self) -> Result<u64> {
        let (asked, accepted) = (Instant::now(), self.pending.cached().accepted);
        let sum = sqlx::query!(
            r#"-- pending.sum
            select coalesce(sum(requests), 0)::bigint as "requests!", count(*) as "rows!" from pending_changes"#
        )
        .fetch_one(&self.database)
        .await?;
        let good_for = GOOD_FOR.max(asked.elapsed() * ONE_IN);
        self.pending.read(sum.requests, accepted, good_for);
        if sum.rows > MANY
            && let Err(error) = self.settle_pending_changes().await
        {
            tracing::debug!(error = display_chain(&error), "many changes of the count stay many");
        }
        Ok(u64::try_from(sum.requests).unwrap_or(0))
    }

    /// Merges many rows into one. Two calls at once take different rows.
    async fn settle_pending_changes(&self) -> Result<()> {
        sqlx::query!(
            "-- pending.settle
            with gone as (
                delete from pending_changes
                where id = any(array(select id from pending_changes limit 100000 for update skip locked))
                returning requests
            )
            insert into pending_changes (requests) select sum(requests) from gone having count(*) > 0"
        )
        .execute(&self.database)
        .await?;
        Ok(())
    }
}
