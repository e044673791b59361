//! How many calls are made at the same time, and how many jobs are leased for them.
//!
//! A job that is leased for its turn spares the call before it the wait for a claim; and the more are claimed and written together, the less it
//! costs. But it holds a slot that no call uses, it is late if the turn does not come, and should the process die, it waits for the end
//! of its lease. So no more are leased than will soon begin: of calls that take long, few. How long they take is known from those that ended; where all
//! of a sudden none does, those that are leased already wait, and are given back if they waited for too long.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// So long a job may be leased beside its call: while its claim comes back, while it waits for its turn, while its outcome is being written.
const BESIDE_THE_CALL: Duration = Duration::from_millis(100);

/// Most jobs that are leased for each call at a time, the one that calls included. Where calls take no time, this many make claims and writes large enough:
/// see docs/performance.md.
const MOST_FOR_A_CALL: usize = 16;

/// The mean time of a call is that of about so many.
const MEAN_OF: u64 = 256;

/// The turns to call.
#[derive(Debug)]
pub struct Calls {
    at_once: usize,
    turns: Semaphore,
    mean_nanos: AtomicU64,
}

/// A turn to call, until it is dropped.
#[derive(Debug)]
pub struct Turn<'a> {
    calls: &'a Calls,
    _permit: SemaphorePermit<'a>,
}

impl Calls {
    /// Up to `at_once` calls at the same time, of which nobody knows yet how long they take.
    #[must_use]
    pub fn new(at_once: usize) -> Self {
        Self { at_once, turns: Semaphore::new(at_once), mean_nanos: AtomicU64::new(nanos(BESIDE_THE_CALL)) }
    }

    /// Waits for a turn.
    pub async fn turn(&self) -> Turn<'_> {
        let permit = self.turns.acquire().await.expect("the semaphore is never closed");
        Turn { calls: self, _permit: permit }
    }

    /// Most jobs that should be leased, those included whose calls are under way.
    #[must_use]
    pub fn most_leased(&self) -> usize {
        let mean = self.mean_nanos.load(Ordering::Relaxed).max(1);
        // By Little's law: so many calls begin in that time.
        let soon = self.at_once as u128 * u128::from(nanos(BESIDE_THE_CALL)) / u128::from(mean);
        usize::try_from(soon).unwrap_or(usize::MAX).saturating_add(self.at_once).min(self.at_once * MOST_FOR_A_CALL)
    }
}

impl Turn<'_> {
    /// The call that it was for began then, and has ended.
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

    /// What is leased after many calls that took so long.
    async fn leased_after(calls: &Calls, took: Duration) -> usize {
        for _ in 0..10 * MEAN_OF {
            let turn = calls.turn().await;
            let began = Instant::now();
            tokio::time::advance(took).await;
            turn.ended(began);
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
    async fn a_turn_that_nobody_used_says_nothing_of_calls() {
        let calls = Calls::new(10);
        for _ in 0..10 * MEAN_OF {
            drop(calls.turn().await);
        }
        assert_eq!(calls.most_leased(), 20);
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_have_a_turn_at_a_time_than_may() {
        let calls = Calls::new(2);
        let (first, _second) = (calls.turn().await, calls.turn().await);
        assert!(tokio::time::timeout(Duration::from_secs(1), calls.turn()).await.is_err());
        drop(first);
        calls.turn().await;
    }
}
