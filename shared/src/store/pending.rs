//! How many requests are unfinished, so that the number can be bounded.
//!
//! A ledger: who accepts requests, or ends them, adds a row with the difference in the same transaction. Nobody waits for anybody, and no row
//! is looked up, so that writing costs the same when no vacuum has run for hours. What costs is reading the sum. So a process remembers the
//! sum that it read last and adds what it has accepted since; it reads again in the background, and before it refuses anything.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Result, Store};
use crate::telemetry::display_chain;

/// How long the number is good for. What other processes accept meanwhile is not in it.
const GOOD_FOR: Duration = Duration::from_millis(250);

/// No statement takes longer.
const READ_WITHIN: Duration = Duration::from_secs(10);

/// Reading takes no more than this share of the time. Each process reads for itself, so it adds up.
const ONE_IN: u32 = 30;

/// More rows than this are made one.
const MANY: i64 = 1_000;

/// What a process knows of the number. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Pending {
    cached: Arc<Mutex<CachedCount>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct CachedCount {
    seen: Option<Seen>,
    /// Accepted by this process, ever.
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

    /// The number was read, when this process had accepted so many. What it has accepted since may not be in it.
    fn read(&self, requests: i64, accepted: i64, good_for: Duration) {
        let mut cached = self.cached();
        let requests = requests.saturating_add(cached.accepted - accepted);
        cached.seen = Some(Seen { requests, good_until: Instant::now() + good_for });
    }

    /// So many were accepted.
    pub(super) fn add(&self, requests: i64) {
        let mut cached = self.cached();
        cached.accepted = cached.accepted.saturating_add(requests);
        if let Some(seen) = &mut cached.seen {
            seen.requests = seen.requests.saturating_add(requests);
        }
    }

    /// Whether the number should be read again: true for one caller, and for no other until that is done.
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
    /// How many more requests may be accepted before `most` are unfinished. The cached number is used if it leaves room for `wanted`; if not, the
    /// number is read first, so that nothing is refused because of an old one.
    pub(super) async fn room(&self, wanted: usize, most: u64) -> Result<i64> {
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let wanted = i64::try_from(wanted).unwrap_or(i64::MAX);
        let seen = self.pending.cached().seen;
        if let Some(room) = seen.map(|seen| most.saturating_sub(seen.requests)).filter(|room| *room >= wanted) {
            if self.pending.take_refresh() {
                let store = self.clone();
                self.tasks.spawn(async move {
                    if let Err(error) = store.pending_requests().await {
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
            tracing::debug!(%error, "many changes of the count stay many");
        }
        Ok(u64::try_from(sum.requests).unwrap_or(0))
    }

    /// Makes one row of many. Two at once take different ones.
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
