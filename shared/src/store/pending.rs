//! How many requests are unfinished, so that there can be a most.
//!
//! A ledger. Who accepts requests, or ends them, adds a row with the difference, in the same transaction: nobody waits for anybody, and
//! nothing is looked for, so that it costs the same when no vacuum has run for hours. Reading the sum is what costs. So a process remembers
//! what it read last and what it has accepted since, and reads again behind its back: seldom, but before it refuses anything.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Result, Store};

/// How long the number is good for. Others accept meanwhile; there may be more unfinished requests by as many.
const GOOD_FOR: Duration = Duration::from_millis(250);

/// No statement takes longer.
const READ_WITHIN: Duration = Duration::from_secs(10);

/// Reading takes no more than this share of the time. Each process reads for itself, so it adds up.
const ONE_IN: u32 = 30;

/// A lock for whoever counts anew; any number that nobody else takes.
const RECOUNT: i64 = 0x7265_636f_756e_7400;

/// More rows than that become one.
const MANY: i64 = 1_000;

/// What a process knows of the number. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Pending {
    known: Arc<Mutex<Known>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Known {
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
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number was read, when this process had accepted so many. What it has accepted since may not be in it.
    fn read(&self, requests: i64, accepted: i64, good_for: Duration) {
        let mut known = self.known();
        let requests = requests.saturating_add(known.accepted - accepted);
        known.seen = Some(Seen { requests, good_until: Instant::now() + good_for });
    }

    /// So many were accepted.
    pub(super) fn add(&self, requests: i64) {
        let mut known = self.known();
        known.accepted = known.accepted.saturating_add(requests);
        if let Some(seen) = &mut known.seen {
            seen.requests = seen.requests.saturating_add(requests);
        }
    }

    /// True for one who should read the number again, and no other until that is done.
    fn is_old(&self) -> bool {
        self.known().seen.as_mut().is_some_and(|seen| {
            let old = seen.good_until <= Instant::now();
            if old {
                seen.good_until = Instant::now() + READ_WITHIN;
            }
            old
        })
    }
}

impl Store {
    /// How many requests may be accepted while no more than `most` are unfinished: certainly, if there are fewer than are `wanted`.
    pub(super) async fn room(&self, wanted: usize, most: u64) -> Result<i64> {
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let wanted = i64::try_from(wanted).unwrap_or(i64::MAX);
        let seen = self.pending.known().seen;
        if let Some(room) = seen.map(|seen| most.saturating_sub(seen.requests)).filter(|room| *room >= wanted) {
            if self.pending.is_old() {
                let store = self.clone();
                tokio::spawn(async move { store.pending_requests().await });
            }
            return Ok(room);
        }
        Ok(most.saturating_sub(i64::try_from(self.pending_requests().await?).unwrap_or(i64::MAX)))
    }

    /// How many requests are unfinished.
    ///
    /// # Errors
    /// Those of a statement.
    pub async fn pending_requests(&self) -> Result<u64> {
        let (asked, accepted) = (Instant::now(), self.pending.known().accepted);
        let sum = sqlx::query!(
            r#"-- pending.sum
            select
                (coalesce(sum(requests), 0) + (select sum(requests) from pending_requests))::bigint as "requests!",
                count(*) as "rows!"
            from pending_changes"#
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

    /// Counts the unfinished requests anew, and corrects the count that is kept by the difference: processes of a version that did not
    /// count may have worked beside this one. Says by how much it was wrong.
    ///
    /// # Errors
    /// Those of a statement.
    pub async fn recount_pending_requests(&self) -> Result<i64> {
        // Two who find the same difference would both correct it.
        let mut transaction = self.database.begin().await?;
        sqlx::query!("-- pending.alone\nselect from pg_advisory_xact_lock($1)", RECOUNT).execute(&mut transaction).await?;
        // One statement sees one moment: both numbers are of before or after any other transaction.
        let off_by = sqlx::query_scalar!(
            r#"-- pending.recount
            with difference as materialized (
                select (select count(*) from jobs j join requests r on r.sign_job_id = j.id where j.kind = 'sign' and j.state = 'pending' and j.next_run_at < 'infinity')
                    - (select coalesce(sum(requests), 0) from pending_changes)::bigint
                    - (select sum(requests) from pending_requests)::bigint as off_by
            ),
            corrected as (
                insert into pending_changes (requests) select off_by from difference where off_by <> 0
            )
            select off_by as "off_by!" from difference"#
        )
        .fetch_one(&mut transaction)
        .await?;
        transaction.commit().await?;
        Ok(off_by)
    }
}
