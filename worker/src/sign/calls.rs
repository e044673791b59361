//! Limits how many calls are made at the same time, and how many jobs are leased for them.
//!
//! A job that is leased before its turn comes saves the wait for a claim after the previous call. Larger claims and writes are also cheaper
//! per job. But such a job holds a slot that no call uses; it is late if its turn does not come; and if the process dies, it waits for the
//! end of its lease. So no more jobs are leased than will begin soon: few, if calls take long. The duration of calls is known from those
//! that have ended. If calls suddenly stop ending, the jobs that are already leased wait, and are given back if they waited for too long.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// How long a job may be leased in addition to its call: while its claim returns, while it waits for its turn, and while its outcome is
/// written.
const BESIDE_THE_CALL: Duration = Duration::from_millis(100);

/// Maximum number of jobs leased per concurrent call, the one that calls included. If calls take no time, this many make claims and writes
/// large enough: see docs/performance-log.md.
const MOST_FOR_A_CALL: usize = 16;

/// The mean duration of calls is taken over about this many calls.
const MEAN_OF: u64 = 256;

/// Hands out permits to call.
#[derive(Debug)]
pub struct Calls {
    at_once: usize,
    permits: Semaphore,
    mean_nanos: AtomicU64,
}

/// The right to make one call, until it is dropped.
#[derive(Debug)]
pub struct Permit<'a> {
    calls: &'a Calls,
    _permit: SemaphorePermit<'a>,
}

impl Calls {
    /// Allows up to `at_once` calls at the same time. How long they take is not known yet.
    #[must_use]
    pub fn new(at_once: usize) -> Self {
        Self { at_once, permits: Semaphore::new(at_once), mean_nanos: AtomicU64::new(nanos(BESIDE_THE_CALL)) }
    }

    /// Waits until a call may be made.
    pub async fn permit(&self) -> Permit<'_> {
        let permit = self.permits.acquire().await.expect("the semaphore is never closed");
        Permit { calls: self, _permit: permit }
    }

    /// Maximum number of jobs that should be leased, including those whose calls are in flight.
    #[must_use]
    pub fn most_leased(&self) -> usize {
        let mean = self.mean_nanos.load(Ordering::Relaxed).max(1);
        // By Little's law, this many calls begin in that time.
        let soon = self.at_once as u128 * u128::from(nanos(BESIDE_THE_CALL)) / u128::from(mean);
        usize::try_from(soon).unwrap_or(usize::MAX).saturating_add(self.at_once).min(self.at_once * MOST_FOR_A_CALL)
    }
}

impl Permit<'_> {
    /// Records that the call of this permit began at `began` and has now ended.
    pub fn ended(self, began: Instant) {
        let took = nanos(began.elapsed());
        let mean = |mean: u64| Some(mean - mean / MEAN_OF + took / MEAN_OF);
        let _ = self.calls.mean_nanos.fetch_update(Ordering::Relaxed, Ordering::Relaxed, mean);
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of jobs to lease after many calls that each took `took`.
    async fn leased_after(calls: &Calls, took: Duration) -> usize {
        for _ in 0..10 * MEAN_OF {
            let permit = calls.permit().await;
            let began = Instant::now();
            tokio::time::advance(took).await;
            permit.ended(began);
        }
        calls.most_leased()
    }

    #[tokio::test(start_paused = true)]
    async fn as_many_are_leased_as_begin_soon_and_those_that_call() {
        let calls = Calls::new(10);
        assert_eq!(calls.most_leased(), 20);
        assert_eq!(leased_after(&calls, Duration::from_millis(20)).await, 10 + 49);
        assert_eq!(leased_after(&calls, Duration::from_secs(1)).await, 10 + 1);
        assert_eq!(leased_after(&calls, Duration::from_secs(30)).await, 10);
        assert_eq!(leased_after(&calls, Duration::ZERO).await, 160);
    }

    #[tokio::test(start_paused = true)]
    async fn a_permit_that_nobody_used_says_nothing_of_calls() {
        let calls = Calls::new(10);
        for _ in 0..10 * MEAN_OF {
            drop(calls.permit().await);
        }
        assert_eq!(calls.most_leased(), 20);
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_have_a_permit_at_a_time_than_may() {
        let calls = Calls::new(2);
        let (first, _second) = (calls.permit().await, calls.permit().await);
        assert!(tokio::time::timeout(Duration::from_secs(1), calls.permit()).await.is_err());
        drop(first);
        calls.permit().await;
    }
}
