//! Low-water marks: where a process begins to scan the queue.
//!
//! The queue's indexes begin with entries that are leased at present, and with dead entries that no vacuum has removed; a long transaction
//! may hold the vacuum back for hours. So that not every scan steps over them, a scan reports how far it came ([`LowWater`]), and the next
//! one starts there.
//!
//! A job may still appear behind the mark: a job that is given back returns to its place, and an insert may commit long after it began. So
//! each process also makes full scans, for at most one thirtieth of its time. While a full scan is quick, it is part of a claim. When it is
//! slow, no claim waits for it: it runs in the background, moves the mark back to what it finds, and wakes the worker.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use tokio::sync::Notify;

use super::{Result, Store, within};
use crate::telemetry::display_chain;

/// Where a scan starts. The default is the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LowWater {
    pub(super) fresh: Option<OffsetDateTime>,
    pub(super) retries: Option<OffsetDateTime>,
    pub(super) slots: Option<OffsetDateTime>,
}

/// How long after its start an insert has usually committed.
pub(super) const LATE_BY: Duration = Duration::from_millis(100);

impl LowWater {
    /// This mark, with the values of `before` where it has none.
    #[must_use]
    fn or(self, before: Self) -> Self {
        Self { fresh: self.fresh.or(before.fresh), retries: self.retries.or(before.retries), slots: self.slots.or(before.slots) }
    }
}

/// Full scans take at most this share of the time. The share is per process, so it adds up.
const ONE_IN: u32 = 30;

/// The delay before a failed full scan is repeated. It doubles with each further failure, up to 256 s, or up to what the share of the time
/// allows if that is less. A scan that took longer than [`WITHIN`] also counts as failed: the process, or Postgres, hung.
const AGAIN_AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Longer than a statement may take.
const WITHIN: Duration = Duration::from_secs(15);

/// A full scan that takes longer runs in the background.
const QUICK: Duration = Duration::from_millis(50);

/// The marks of a process. Clones share them.
#[derive(Clone, Debug)]
pub struct Marks {
    store: Store,
    wake: Arc<Notify>,
    quick: Duration,
    state: Arc<Mutex<State>>,
}

/// How far the process has come, and when the next full scan is due.
#[derive(Clone, Copy, Debug)]
struct State {
    mark: LowWater,
    full_scan_took: Duration,
    /// Consecutive failed full scans.
    failed: u32,
    /// `None` while one is running.
    next_full_scan: Option<Instant>,
}

impl Marks {
    /// Marks at the beginning of the queue. `wake` is notified when something was found behind the mark.
    #[must_use]
    pub fn new(store: Store, wake: Arc<Notify>) -> Self {
        let state = State { mark: LowWater::default(), full_scan_took: Duration::ZERO, failed: 0, next_full_scan: Some(Instant::now()) };
        Self { store, wake, quick: QUICK, state: Arc::new(Mutex::new(state)) }
    }

    /// The same marks, but a full scan that takes longer than `quick` runs in the background.
    #[must_use]
    pub fn quick_within(self, quick: Duration) -> Self {
        Self { quick, ..self }
    }

    /// Begins a scan.
    #[must_use]
    pub fn scan(&self) -> Scan {
        let mut state = self.state();
        let due = state.next_full_scan.is_some_and(|again| again <= Instant::now());
        let quick = state.full_scan_took <= self.quick;
        let mark = state.mark;
        if due {
            state.next_full_scan = None;
        }
        drop(state);
        if due && !quick {
            self.store.tasks.spawn(self.clone().scan_behind(mark));
        }
        Scan { marks: self.clone(), mark, all: due && quick, began: Instant::now(), reached: None }
    }

    /// The time until the next full scan, which may find what the last scan could not see. `None` while one is running.
    #[must_use]
    pub fn next_full_scan_in(&self) -> Option<Duration> {
        self.state().next_full_scan.map(|again| again.saturating_duration_since(Instant::now()))
    }

    async fn scan_behind(self, mark: LowWater) {
        let began = Instant::now();
        // A server that vanished silently must not block all later full scans.
        let found = within(WITHIN, self.store.behind(mark)).await;
        let found =
            found.inspect_err(|error| tracing::warn!(error = display_chain(error), "can't scan for jobs behind the low-water mark"));
        let found = found.ok();
        self.state().record_full_scan(began.elapsed(), found);
        if found.is_some_and(|found| found != LowWater::default()) {
            self.wake.notify_one();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// `reached` is `None` if the scan failed. Then the next one comes soon, because jobs that were given back meanwhile lie behind the
    /// mark. It runs in the background if this one was slow.
    fn record_full_scan(&mut self, took: Duration, reached: Option<LowWater>) {
        let share = took.min(WITHIN) * ONE_IN;
        let rest = if reached.is_some() && took <= WITHIN {
            self.failed = 0;
            share
        } else {
            self.failed = self.failed.saturating_add(1);
            (AGAIN_AFTER_FAILURE * (1 << (self.failed - 1).min(8))).min(share.max(AGAIN_AFTER_FAILURE))
        };
        self.full_scan_took = took;
        self.next_full_scan = Some(Instant::now() + rest);
        self.mark = reached.unwrap_or_default().or(self.mark);
    }
}

/// A running scan. Dropping it ends it, whatever its result.
#[derive(Debug)]
pub struct Scan {
    marks: Marks,
    mark: LowWater,
    all: bool,
    began: Instant,
    reached: Option<LowWater>,
}

impl Scan {
    /// Where the scan starts.
    #[must_use]
    pub fn start(&self) -> LowWater {
        if self.all { LowWater::default() } else { self.mark }
    }

    /// Whether it is a full scan.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.all
    }

    /// Records where the next scan may start. Where `reached` has no value, the next one starts where this one did.
    pub fn reached(&mut self, reached: LowWater) {
        self.reached = Some(reached);
    }
}

impl Drop for Scan {
    fn drop(&mut self) {
        let mut state = self.marks.state();
        if self.all {
            state.record_full_scan(self.began.elapsed(), self.reached);
        } else if state.mark == self.mark {
            // Unless the mark was moved meanwhile.
            state.mark = self.reached.unwrap_or_default().or(self.mark);
        }
    }
}

impl Store {
    /// Where the first claimable jobs and slots behind `mark` are; `None` where there are none.
    ///
    /// # Errors
    /// If a statement fails.
    async fn behind(&self, mark: LowWater) -> Result<LowWater> {
        let first = sqlx::query!(
            r#"-- sign.behind
            select
                (select next_run_at from jobs
                    where kind = 'sign' and state = 'pending' and lane = 0 and next_run_at < $1
                        and (lease_token is null or leased_until <= now())
                    order by next_run_at, id limit 1) as fresh,
                (select next_run_at from jobs
                    where kind = 'sign' and state = 'pending' and lane = 1 and next_run_at < $2
                        and (lease_token is null or leased_until <= now())
                    order by next_run_at, id limit 1) as retries,
                (select free_at from upstream_slots
                    where free_at < $3 and free_at > '-infinity' and not retired
                    order by free_at limit 1) as slots"#,
            mark.fresh,
            mark.retries,
            mark.slots,
        )
        .fetch_one(&self.database)
        .await?;
        Ok(LowWater { fresh: first.fresh, retries: first.retries, slots: first.slots })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The delay before the next full scan, if the last one took this long.
    fn again_after(took: Duration, reached: Option<LowWater>) -> Duration {
        let mut state = State { mark: LowWater::default(), full_scan_took: Duration::ZERO, failed: 0, next_full_scan: None };
        let before = Instant::now();
        state.record_full_scan(took, reached);
        state.next_full_scan.unwrap() - before
    }

    #[test]
    fn a_full_scan_that_was_slow_is_repeated_late_and_one_that_failed_or_stood_still_soon() {
        let slow = Duration::from_secs(5);
        assert!(again_after(slow, Some(LowWater::default())) >= slow * ONE_IN);
        let soon = AGAIN_AFTER_FAILURE..AGAIN_AFTER_FAILURE * 2;
        assert!(soon.contains(&again_after(slow, None)));
        assert!(soon.contains(&again_after(Duration::from_mins(3), Some(LowWater::default()))));
    }

    #[test]
    fn full_scans_that_fail_again_and_again_take_no_larger_share_of_the_time_than_others() {
        let mut state = State { mark: LowWater::default(), full_scan_took: Duration::ZERO, failed: 0, next_full_scan: None };
        let mut rest = |took, reached| {
            state.record_full_scan(took, reached);
            (state.next_full_scan.unwrap().duration_since(Instant::now()) + Duration::from_millis(999)).as_secs()
        };
        let long = Duration::from_secs(4);
        let rests: Vec<u64> = (0..9).map(|_| rest(long, None)).collect();
        assert_eq!(rests, [1, 2, 4, 8, 16, 32, 64, 120, 120]);
        assert_eq!(rest(Duration::from_millis(1), None), 1, "Postgres is away, and may be back any moment");
        rest(long, Some(LowWater::default()));
        assert_eq!(rest(long, None), 1, "one that worked begins anew");
    }
}
