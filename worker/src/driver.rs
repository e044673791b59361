//! The loop for any kind of job: claim, work, finish. It knows nothing about Postgres, and is tested without it.

use std::future::Future;
use std::ops::RangeInclusive;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use shared::backoff::Jitter;
use shared::store::{Claimed, StoreError, within};
use shared::telemetry::display_chain;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A kind of job: where it comes from and what is done with it.
pub trait Queue: Send + Sync + 'static {
    /// A claimed job. It holds the lease.
    type Job: Send + 'static;

    /// The queue's name in logs and metrics.
    const NAME: &'static str;

    /// Maximum number of jobs that this process should hold at present; at least one. Called before each claim.
    fn most_leased(&self) -> usize;

    /// Claims up to `most` jobs.
    fn claim(&self, most: usize) -> impl Future<Output = Result<Claimed<Self::Job>, StoreError>> + Send;

    /// Works on a job and writes its outcome, or gives it back because of `stop`.
    fn work(&self, job: Self::Job, stop: Stop) -> impl Future<Output = NextClaim> + Send;
}

/// What the end of a job means for the next claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextClaim {
    /// Nothing new: it is made when the last one said, or at once if that one reported jobs that wait for room.
    AsPlanned,
    /// There is something to claim that no claim knew of: the job is tried again, or its place is free.
    AtOnce,
}

/// Tells the jobs in flight to stop.
#[derive(Clone, Debug)]
pub struct Stop {
    /// Once this is cancelled, no call begins: a job without one is given back.
    pub begin_nothing: CancellationToken,
    /// Once this is cancelled, every job is given back, whatever it is doing.
    pub give_up: CancellationToken,
}

/// The timing of a driver.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// How often the queue is polled if no hint comes.
    pub poll: Duration,
    /// How long jobs in flight may take once the driver is told to stop.
    pub grace: Duration,
}

/// The longest that a claim may take. After that, the connection is taken for dead.
const CLAIM_WITHIN: Duration = Duration::from_secs(15);
/// The same for a claim that is in flight when the driver is told to stop.
const LAST_CLAIM_WITHIN: Duration = Duration::from_secs(3);

/// How long giving jobs back may take. It is one statement, and an unavailable Postgres must not keep the process alive.
const GIVE_BACK_WITHIN: Duration = Duration::from_secs(3);

/// Hints are followed at once. But if others are just taking the due jobs, the driver does not claim again sooner than this.
const SHORTEST_SLEEP: Duration = Duration::from_millis(5);

/// While more jobs are due than may be leased, the driver waits for half of those in flight to end before it claims: a claim for each job
/// that ends would mean a commit for each job. It waits for as long as the last claim took, within these limits.
const GATHER_FOR: RangeInclusive<Duration> = Duration::from_millis(5)..=Duration::from_millis(200);

/// Runs `queue` until `stop`, then waits up to the grace period for the jobs in flight.
///
/// `wake` is a hint that there may be something to claim. The driver registers for it before it claims, so that a hint during a claim is
/// not lost. It also polls, so that a lost hint costs at most one interval.
///
/// A claim that got fewer jobs than it asked for says when there will be more. The driver does not claim again before then, unless
/// something changes. The end of a job in flight is such a change if another job waits for what it held. Whether one waits is known from
/// the last claim, or is seen by the claim in flight.
pub async fn run<Q: Queue>(queue: Arc<Q>, pace: Pace, wake: Arc<Notify>, stop: CancellationToken) {
    let mut driver = Driver::new(queue, wake, stop.clone());
    let claimed = AssertUnwindSafe(driver.claim_until(&stop, pace.poll)).catch_unwind().await;
    if claimed.is_err() {
        stop.cancel();
    }
    // What is in flight has its end even after a panic.
    driver.drain(pace.grace).await;
    if let Err(panic) = claimed {
        std::panic::resume_unwind(panic);
    }
}

/// The state of a driver.
struct Driver<Q> {
    queue: Arc<Q>,
    wake: Arc<Notify>,
    /// The number of jobs in flight.
    in_flight: watch::Sender<usize>,
    /// How long the last claim took.
    claim_took: Duration,
    /// Whether the end of a job is a reason to claim: another job waits for its place, or may wait.
    others_wait: Arc<AtomicBool>,
    /// Whether the last claim failed.
    failing: bool,
    tasks: TaskTracker,
    stop: Stop,
}

/// A job in flight. It counts until this is dropped.
struct InFlight(watch::Sender<usize>);

impl InFlight {
    fn count_in(all: watch::Sender<usize>) -> Self {
        all.send_modify(|jobs| *jobs += 1);
        Self(all)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.send_modify(|jobs| *jobs -= 1);
    }
}

impl<Q: Queue> Driver<Q> {
    fn new(queue: Arc<Q>, wake: Arc<Notify>, stop: CancellationToken) -> Self {
        Self {
            queue,
            wake,
            in_flight: watch::Sender::new(0),
            claim_took: Duration::ZERO,
            others_wait: Arc::new(AtomicBool::new(true)),
            failing: false,
            tasks: TaskTracker::new(),
            stop: Stop { begin_nothing: stop, give_up: CancellationToken::new() },
        }
    }

    /// Claims jobs and starts them, until `stop`.
    async fn claim_until(&mut self, stop: &CancellationToken, poll: Duration) {
        let wake = Arc::clone(&self.wake);
        let mut more_is_due = false;
        while let Some(most) = stop.run_until_cancelled(self.room(more_is_due)).await {
            let hint = wake.notified();
            tokio::pin!(hint);
            hint.as_mut().enable();
            let Some(claimed) = self.claim(most, stop).await else { return };
            let poll = Jitter::FIFTH.apply(poll, &mut rand::rng());
            more_is_due = claimed.as_ref().is_ok_and(|claimed| claimed.jobs.len() >= most);
            let pause = match claimed {
                Ok(claimed) => {
                    self.others_wait.store(more_is_due || claimed.next_in.is_some(), Ordering::SeqCst);
                    // If none was got though one is due, others are just taking it.
                    let again = more_is_due || !claimed.jobs.is_empty() && claimed.next_in == Some(Duration::ZERO);
                    let again_in = claimed.again_in();
                    self.start(claimed.jobs);
                    if again {
                        continue;
                    }
                    again_in.map_or(poll, |next| next.max(SHORTEST_SLEEP).min(poll))
                }
                Err(_) => poll,
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = hint => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Waits until another job may be leased, and returns how many may. While more are due than may be leased, first waits for several to
    /// end, so that the claim is for more than one.
    async fn room(&self, more_is_due: bool) -> usize {
        let mut in_flight = self.in_flight.subscribe();
        if more_is_due {
            let gather_for = self.claim_took.clamp(*GATHER_FOR.start(), *GATHER_FOR.end());
            let _ = tokio::time::timeout(gather_for, in_flight.wait_for(|jobs| *jobs <= self.queue.most_leased() / 2)).await;
        }
        let jobs = *in_flight.wait_for(|jobs| *jobs < self.queue.most_leased()).await.expect("the sender is in `self`");
        // It is asked anew, and may have changed.
        self.queue.most_leased().saturating_sub(jobs).max(1)
    }

    /// Claims up to `most` jobs. At `stop`, a claim in flight is still awaited, so that no lease is taken in vain, but not forever: `None`
    /// if it takes too long.
    async fn claim(&mut self, most: usize, stop: &CancellationToken) -> Option<Result<Claimed<Q::Job>, StoreError>> {
        // This claim may not see what is given back by jobs that end from here on.
        self.others_wait.store(true, Ordering::SeqCst);
        let began = Instant::now();
        let claim = within(CLAIM_WITHIN, self.queue.claim(most));
        let claimed = tokio::select! {
            claimed = claim => claimed,
            () = async { stop.cancelled().await; tokio::time::sleep(LAST_CLAIM_WITHIN).await } => return None,
        };
        self.claim_took = began.elapsed();
        match &claimed {
            Ok(claimed) => {
                metrics::counter!("countersign_jobs_claimed_total", "queue" => Q::NAME).increment(claimed.jobs.len() as u64);
                if std::mem::take(&mut self.failing) {
                    tracing::info!(queue = Q::NAME, "claiming again");
                }
            }
            Err(error) => {
                metrics::counter!("countersign_claim_errors_total", "queue" => Q::NAME).increment(1);
                // Log once per outage, not once per poll.
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(queue = Q::NAME, error = display_chain(error), "can't claim jobs; polling on");
                }
            }
        }
        Some(claimed)
    }

    /// Starts the claimed jobs.
    fn start(&self, jobs: Vec<Q::Job>) {
        for job in jobs {
            let (in_flight, queue, stop) = (InFlight::count_in(self.in_flight.clone()), Arc::clone(&self.queue), self.stop.clone());
            let (wake, others_wait) = (Arc::clone(&self.wake), Arc::clone(&self.others_wait));
            self.tasks.spawn(async move {
                let next = queue.work(job, stop).await;
                drop(in_flight);
                if next == NextClaim::AtOnce || others_wait.load(Ordering::SeqCst) {
                    wake.notify_one();
                }
            });
        }
    }

    /// Waits up to `grace` for the jobs in flight, then has the remaining ones given back.
    async fn drain(self, grace: Duration) {
        self.tasks.close();
        if tokio::time::timeout(grace, self.tasks.wait()).await.is_err() {
            tracing::info!(queue = Q::NAME, jobs = self.tasks.len(), "the grace is over: giving back what is in flight");
            self.stop.give_up.cancel();
            let _ = tokio::time::timeout(GIVE_BACK_WITHIN, self.tasks.wait()).await;
        }
    }
}

#[cfg(test)]
mod tests;
