//! Low-water marks: how far a process has come in the queue, and who looks at what lies behind.
//!
//! The indexes of the queue begin with what is leased at present, and with what was done and no vacuum has taken away: a long transaction may
//! hold that back for hours. A look need not step over it again and again: the last one says how far it came ([`LowWater`]).
//!
//! Behind that mark is hardly anything, but not nothing: a job that is given back returns to its place, and an insert may be committed long
//! after it began. So somebody has to look at all every now and then, whenever that takes no more than a share of the time. While it is quick,
//! the look itself begins at the beginning. When it is not, nobody waits for it: the next looks go on from the mark, and behind their backs one
//! statement looks for what lies before it, and takes the mark back to that.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use tokio::sync::Notify;

use super::{Result, Store};

/// Where a look begins. The default is the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LowWater {
    pub(super) fresh: Option<OffsetDateTime>,
    pub(super) retries: Option<OffsetDateTime>,
    pub(super) slots: Option<OffsetDateTime>,
}

/// How much later than it began an insert is mostly committed.
pub(super) const LATE_BY: Duration = Duration::from_millis(100);

impl LowWater {
    /// This mark, and `before` where it says nothing.
    #[must_use]
    fn or(self, before: Self) -> Self {
        Self { fresh: self.fresh.or(before.fresh), retries: self.retries.or(before.retries), slots: self.slots.or(before.slots) }
    }
}

/// Looking at all takes no more than this share of the time. Each process looks for itself, so it adds up.
const ONE_IN: u32 = 30;

/// A look at all that failed is repeated after this; each further one that does after twice as long, up to the share of the time that a look has.
/// One that took longer than a look can has failed: the process, or Postgres, stood still.
const AGAIN_AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Longer than a statement may take.
const WITHIN: Duration = Duration::from_secs(15);

/// What takes longer is not waited for.
const QUICK: Duration = Duration::from_millis(50);

/// The marks of a process. Clones share them.
#[derive(Clone, Debug)]
pub struct Marks {
    store: Store,
    wake: Arc<Notify>,
    quick: Duration,
    come: Arc<Mutex<Come>>,
}

/// How far, and when all may be looked at again.
#[derive(Clone, Copy, Debug)]
struct Come {
    mark: LowWater,
    all_took: Duration,
    /// Looks at all that failed, one after the other.
    failed: u32,
    /// Nothing: it is being looked at.
    all_again: Option<Instant>,
}

impl Marks {
    /// At the beginning. `wake` is told when something was found behind the mark.
    #[must_use]
    pub fn new(store: Store, wake: Arc<Notify>) -> Self {
        let come = Come { mark: LowWater::default(), all_took: Duration::ZERO, failed: 0, all_again: Some(Instant::now()) };
        Self { store, wake, quick: QUICK, come: Arc::new(Mutex::new(come)) }
    }

    /// The same, where a look at all that takes longer than `quick` is not waited for.
    #[must_use]
    pub fn quick_within(self, quick: Duration) -> Self {
        Self { quick, ..self }
    }

    /// Begins a look.
    #[must_use]
    pub fn look(&self) -> Look {
        let mut come = self.come();
        let due = come.all_again.is_some_and(|again| again <= Instant::now());
        let quick = come.all_took <= self.quick;
        let mark = come.mark;
        if due {
            come.all_again = None;
        }
        drop(come);
        if due && !quick {
            tokio::spawn(self.clone().look_behind(mark));
        }
        Look { marks: self.clone(), mark, all: due && quick, began: Instant::now(), reached: None }
    }

    /// How soon a look may find what the last one could not see.
    #[must_use]
    pub fn all_again_in(&self) -> Option<Duration> {
        self.come().all_again.map(|again| again.saturating_duration_since(Instant::now()))
    }

    async fn look_behind(self, mark: LowWater) {
        let began = Instant::now();
        // A server that has vanished without a word must not be the last that was asked.
        let found = match tokio::time::timeout(WITHIN, self.store.behind(mark)).await {
            Ok(Ok(found)) => Some(found),
            Ok(Err(error)) => {
                tracing::warn!(%error, "can't look for jobs behind the low-water mark");
                None
            }
            Err(_) => None,
        };
        self.come().looked_at_all(began.elapsed(), found);
        if found.is_some_and(|found| found != LowWater::default()) {
            self.wake.notify_one();
        }
    }

    fn come(&self) -> MutexGuard<'_, Come> {
        self.come.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Come {
    /// Nothing `reached`: the look failed. Nobody waits for the next one then, if this one took long; but it is made soon, because what was
    /// given back meanwhile lies behind the mark.
    fn looked_at_all(&mut self, took: Duration, reached: Option<LowWater>) {
        let share = took.min(WITHIN) * ONE_IN;
        let rest = if reached.is_some() && took <= WITHIN {
            self.failed = 0;
            share
        } else {
            self.failed = self.failed.saturating_add(1);
            (AGAIN_AFTER_FAILURE * (1 << (self.failed - 1).min(8))).min(share.max(AGAIN_AFTER_FAILURE))
        };
        self.all_took = took;
        self.all_again = Some(Instant::now() + rest);
        self.mark = reached.unwrap_or_default().or(self.mark);
    }
}

/// A look that has begun. It ends when it is dropped, whatever became of it.
#[derive(Debug)]
pub struct Look {
    marks: Marks,
    mark: LowWater,
    all: bool,
    began: Instant,
    reached: Option<LowWater>,
}

impl Look {
    /// Where it begins.
    #[must_use]
    pub fn from(&self) -> LowWater {
        if self.all { LowWater::default() } else { self.mark }
    }

    /// Whether it looks at all.
    #[must_use]
    pub fn is_at_all(&self) -> bool {
        self.all
    }

    /// The next one may begin there. Where that says nothing, nothing is known about where to go on.
    pub fn has_reached(&mut self, reached: LowWater) {
        self.reached = Some(reached);
    }
}

impl Drop for Look {
    fn drop(&mut self) {
        let mut come = self.marks.come();
        if self.all {
            come.looked_at_all(self.began.elapsed(), self.reached);
        } else if come.mark == self.mark {
            // Unless it was taken back meanwhile.
            come.mark = self.reached.unwrap_or_default().or(self.mark);
        }
    }
}

impl Store {
    /// Where the first jobs and slots lie that can be claimed and are behind `mark`; nothing where there are none.
    ///
    /// # Errors
    /// Those of a statement.
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

    /// After how long all is looked at again, if the last look took so long.
    fn again_after(took: Duration, reached: Option<LowWater>) -> Duration {
        let mut come = Come { mark: LowWater::default(), all_took: Duration::ZERO, failed: 0, all_again: None };
        let before = Instant::now();
        come.looked_at_all(took, reached);
        come.all_again.unwrap() - before
    }

    #[test]
    fn a_look_that_was_slow_is_repeated_late_and_one_that_failed_or_stood_still_soon() {
        let slow = Duration::from_secs(5);
        assert!(again_after(slow, Some(LowWater::default())) >= slow * ONE_IN);
        let soon = AGAIN_AFTER_FAILURE..AGAIN_AFTER_FAILURE * 2;
        assert!(soon.contains(&again_after(slow, None)));
        assert!(soon.contains(&again_after(Duration::from_mins(3), Some(LowWater::default()))));
    }

    #[test]
    fn looks_that_fail_again_and_again_take_no_larger_share_of_the_time_than_others() {
        let mut come = Come { mark: LowWater::default(), all_took: Duration::ZERO, failed: 0, all_again: None };
        let mut rest = |took, reached| {
            come.looked_at_all(took, reached);
            (come.all_again.unwrap().duration_since(Instant::now()) + Duration::from_millis(999)).as_secs()
        };
        let long = Duration::from_secs(4);
        let rests: Vec<u64> = (0..9).map(|_| rest(long, None)).collect();
        assert_eq!(rests, [1, 2, 4, 8, 16, 32, 64, 120, 120]);
        assert_eq!(rest(Duration::from_millis(1), None), 1, "Postgres is away, and may be back any moment");
        rest(long, Some(LowWater::default()));
        assert_eq!(rest(long, None), 1, "one that worked begins anew");
    }
}
