//! Background maintenance: ends requests that waited for too long, and deletes what ended long ago. Every worker does a little at a time;
//! two that run at once skip each other's requests.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use shared::backoff::Jitter;
use shared::message::MessageDigest;
use shared::store::sign_finish::{Failure, SignEnding, SignFinish, UpstreamNews};
use shared::store::sign_overdue::Scan;
use shared::store::webhook_finish::WebhookFailure;
use shared::store::{JobKind, Lease, Store, StoreError, within};
use shared::telemetry::display_chain;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::finisher::Finisher;
use crate::settings::Settings;

/// Jobs and requests are handled in groups of this size, to keep each transaction short.
const AT_ONCE: u32 = 500;

/// The pause between two groups, and the pause after the last one. The latter is a quarter of the shortest age, within limits.
const NEXT_GROUP: Duration = Duration::from_millis(50);
const NEXT_ROUND: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_mins(1);

/// A full scan, of every waiting job, takes at most one in this many parts of the time.
const ONE_IN: u32 = 30;

/// The longest pause after a full scan that failed: `ONE_IN` times as long as a statement may take.
const LONGEST_PAUSE: Duration = Duration::from_mins(5);

/// How long ending a group of overdue jobs may take.
const LEASE: Duration = Duration::from_mins(1);

/// The age limits.
#[derive(Clone, Copy, Debug)]
pub struct Ages {
    /// How long a request may wait for its signature. `None` if this process does not sign.
    pub deadline: Option<Duration>,
    /// How long a webhook may wait for a receiver that is down. `None` if this process does not deliver.
    pub webhooks: Option<Duration>,
    /// How long a finished request is kept.
    pub retention: Duration,
}

/// A receiver is not given up before it has been down for this long, however short the retry schedule is.
const SHORTEST_SCHEDULE: Duration = Duration::from_hours(1);

impl Ages {
    /// Those of a worker with these settings.
    #[must_use]
    pub fn of(settings: &Settings) -> Self {
        let whole_schedule = settings.webhook.webhook_retry_schedule.whole();
        Self {
            deadline: settings.worker_queues.sign.then_some(settings.sign.sign_deadline),
            webhooks: settings.worker_queues.webhook.then(|| whole_schedule.max(SHORTEST_SCHEDULE)),
            retention: settings.retention,
        }
    }

    /// The pause between two rounds: what is too old does not stay for much longer.
    fn next_round(self) -> Duration {
        let shortest = self.deadline.map_or(self.retention, |deadline| deadline.min(self.retention));
        (shortest / 4).clamp(*NEXT_ROUND.start(), *NEXT_ROUND.end())
    }
}

/// How long one step of a round may take.
const STEP_WITHIN: Duration = Duration::from_secs(30);

/// Runs until `stop`.
pub async fn run(store: Store, ages: Ages, finisher: Arc<Finisher<SignFinish>>, stop: CancellationToken) {
    let mut maintenance = Maintenance { store, ages, finisher, next_full_scan: Instant::now() };
    let mut steps = Steps::default();
    let rounds = async {
        loop {
            let pause = match maintenance.round(&mut steps).await {
                Left::More => NEXT_GROUP,
                Left::Nothing => Jitter::FIFTH.apply(ages.next_round(), &mut rand::rng()),
            };
            tokio::time::sleep(pause).await;
        }
    };
    stop.run_until_cancelled(Box::pin(rounds)).await;
}

/// Whether a round left something for the next one.
enum Left {
    /// A group was full.
    More,
    Nothing,
}

struct Maintenance {
    store: Store,
    ages: Ages,
    finisher: Arc<Finisher<SignFinish>>,
    next_full_scan: Instant,
}

impl Maintenance {
    /// Handles one group of everything.
    async fn round(&mut self, steps: &mut Steps) -> Left {
        let mut largest = 0;
        if let Some(deadline) = self.ages.deadline {
            largest = steps.run("overdue", self.end_overdue(deadline)).await;
        }
        let store = &self.store;
        if let Some(age) = self.ages.webhooks {
            let exhausted = steps.run("lost receivers", store.exhaust_webhooks_of_lost_receivers(age, AT_ONCE)).await;
            report(exhausted, JobKind::Webhook, WebhookFailure::ReceiverDown.code());
            largest = largest.max(exhausted);
        }
        largest = largest.max(steps.run("idle receivers", store.delete_idle_receivers(self.ages.retention, AT_ONCE)).await);
        largest = largest.max(steps.run("retired secrets", store.delete_retired_secrets(AT_ONCE)).await);
        let deleted = steps.run("ended requests", store.delete_ended_requests(self.ages.retention, AT_ONCE)).await;
        metrics::counter!("countersign_requests_deleted_total").increment(deleted.into());
        if largest.max(deleted) >= AT_ONCE { Left::More } else { Left::Nothing }
    }

    /// Ends jobs that are past their deadline, and returns how many. Makes a full scan too if it is time for one.
    async fn end_overdue(&mut self, deadline: Duration) -> Result<u32, StoreError> {
        let ended = self.end(self.find(deadline, Scan::OfThoseDueFirst).await?).await;
        let began = Instant::now();
        if began < self.next_full_scan {
            return Ok(ended);
        }
        // In case it takes longer than a step may.
        self.next_full_scan = began + LONGEST_PAUSE;
        let found = self.find(deadline, Scan::Full).await;
        self.next_full_scan = Instant::now() + pause_after_full_scan(began.elapsed(), found.is_ok());
        Ok(ended.max(self.end(found?).await))
    }

    async fn find(&self, deadline: Duration, scan: Scan) -> Result<Vec<(Lease, MessageDigest)>, StoreError> {
        self.store.claim_overdue_sign_jobs(deadline, scan, AT_ONCE, LEASE).await
    }

    async fn end(&self, overdue: Vec<(Lease, MessageDigest)>) -> u32 {
        let count = u32::try_from(overdue.len()).unwrap_or(AT_ONCE);
        let past_deadline =
            |lease, digest| SignFinish::without_call(lease, digest, SignEnding::Failed(Failure::DeadlineExceeded), UpstreamNews::None);
        let ends = overdue.into_iter().map(|(lease, digest)| self.finisher.finish(past_deadline(lease, digest)));
        futures_util::future::join_all(ends).await;
        report(count, JobKind::Sign, Failure::DeadlineExceeded.code());
        count
    }
}

/// Reports jobs that were ended without another attempt.
fn report(count: u32, kind: JobKind, outcome: &'static str) {
    if count > 0 {
        metrics::counter!("countersign_attempts_total", "queue" => kind.name(), "outcome" => outcome).increment(count.into());
        tracing::warn!(queue = kind.name(), outcome, count, "given up");
    }
}

/// The pause after a full scan. One that failed may have waited for a Postgres that stood still, which does not say how
/// long it takes.
fn pause_after_full_scan(took: Duration, worked: bool) -> Duration {
    let pause = took * ONE_IN;
    if worked { pause } else { pause.min(LONGEST_PAUSE) }
}

/// Runs steps, and remembers which of them failed last time.
#[derive(Default)]
struct Steps {
    failing: BTreeSet<&'static str>,
}

impl Steps {
    /// The number of items that a step handled: 0 if it failed or took too long. The next step runs in any case.
    async fn run(&mut self, step: &'static str, work: impl Future<Output = Result<u32, StoreError>>) -> u32 {
        match within(STEP_WITHIN, work).await {
            Ok(count) => {
                self.failing.remove(step);
                count
            }
            Err(error) => {
                // Once until it works again. Others report that Postgres is unavailable.
                if self.failing.insert(step) && !matches!(error, StoreError::Unavailable(_)) {
                    tracing::warn!(step, error = display_chain(&error), "a step of the maintenance failed; trying on");
                }
                0
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_old_for_a_short_time_only_is_looked_for_more_often() {
        for (deadline, retention, pause) in [(86_400, 2_592_000, 60), (20, 2_592_000, 5), (86_400, 40, 10), (1, 1, 1)] {
            let (deadline, retention) = (Some(Duration::from_secs(deadline)), Duration::from_secs(retention));
            assert_eq!(Ages { deadline, webhooks: None, retention }.next_round().as_secs(), pause);
        }
    }

    #[test]
    fn a_full_scan_takes_a_thirtieth_of_the_time_and_one_that_stood_still_is_not_put_off_for_longer() {
        let pause = |took, worked| pause_after_full_scan(Duration::from_secs(took), worked).as_secs();
        assert_eq!((pause(2, true), pause(2, false)), (60, 60));
        assert_eq!((pause(30, true), pause(30, false)), (900, 300));
    }

    #[tokio::test(start_paused = true)]
    async fn a_step_that_fails_or_never_ends_counts_nothing_and_lets_the_next_one_follow() {
        let mut steps = Steps::default();
        assert_eq!(steps.run("fails", async { Err(StoreError::Corrupt("test")) }).await, 0);
        assert_eq!(steps.run("hangs", std::future::pending()).await, 0);
        assert_eq!(steps.run("works", async { Ok(3) }).await, 3);
        assert_eq!(steps.failing, BTreeSet::from(["fails", "hangs"]));
        assert_eq!(steps.run("fails", async { Ok(1) }).await, 1);
        assert_eq!(steps.failing, BTreeSet::from(["hangs"]));
    }
}
