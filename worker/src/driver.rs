//! Claim, work, finish: the loop, for any kind of job. Knows nothing of Postgres; tested without it.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use shared::backoff::Jitter;
use shared::store::{Claimed, StoreError};
use shared::telemetry::display_chain;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A kind of job: where it comes from and what is done with it.
pub trait Queue: Send + Sync + 'static {
    /// A claimed job. It holds the lease.
    type Job: Send + 'static;

    /// The queue's name in logs and metrics.
    const NAME: &'static str;

    /// Most jobs that this process should have at a time, as things are: at least one. Asked before each claim.
    fn most_leased(&self) -> usize;

    /// Claims up to `most` jobs.
    fn claim(&self, most: usize) -> impl Future<Output = Result<Claimed<Self::Job>, StoreError>> + Send;

    /// Works on a job and writes its outcome. When `give_up` is cancelled, it gives the job back instead.
    fn work(&self, job: Self::Job, give_up: CancellationToken) -> impl Future<Output = Ended> + Send;
}

/// What the end of a job changes for the next claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Nothing for a queue in which nothing else waits.
    ForGood,
    /// Something can be claimed that no claim knew of: the job is tried again, or its place is free.
    GivenBack,
}

/// How a driver runs.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// How often the queue is looked at when no hint comes.
    pub poll: Duration,
    /// How long work in flight may take once the driver is told to stop.
    pub grace: Duration,
}

/// The longest a claim may take; beyond, the connection is taken for dead.
const CLAIM_WITHIN: Duration = Duration::from_secs(15);
/// The same for the one that is under way when the driver is told to stop.
const LAST_CLAIM_WITHIN: Duration = Duration::from_secs(3);

/// How long giving jobs back may take. It is one statement; a Postgres that is away must not keep the process.
const GIVE_BACK_WITHIN: Duration = Duration::from_secs(3);

/// Hints are looked into at once; but a queue whose due jobs others are just taking is not asked again sooner than this.
const SHORTEST_SLEEP: Duration = Duration::from_millis(5);

/// While more is due than may be leased, claims are for half of that at least, unless that many do not end so soon: a claim for each job
/// that ends would be a commit for each job.
const GATHER_FOR: Duration = Duration::from_millis(5);

/// Runs `queue` until `stop`, then for up to the grace until what is in flight has ended.
///
/// `wake` is a hint that there may be something to claim. The driver registers for it before it claims, so that a hint that comes
/// while it looks is not lost; and polls as well, so that a hint that never comes costs at most one interval.
///
/// A claim that took less than it might have says when there will be more: there is no other until then, unless something changes. The end of
/// a job in flight is such a change if anything waits for what it held; who waits is known from the last claim, or seen by the one that is
/// under way.
pub async fn run<Q: Queue>(queue: Arc<Q>, pace: Pace, wake: Arc<Notify>, stop: CancellationToken) {
    let mut driver = Driver::new(queue, wake);
    driver.claim_until(&stop, pace.poll).await;
    driver.drain(pace.grace).await;
}

/// The jobs in flight. Each has a permit, and so has each that may still be claimed.
struct Driver<Q> {
    queue: Arc<Q>,
    wake: Arc<Notify>,
    permits: Arc<Semaphore>,
    /// How many permits there are: as many as jobs may be leased, or, after that was lowered, as many as are still in flight.
    in_all: usize,
    /// Whether the end of a job is a reason to claim: something waits for its place, or may.
    others_wait: Arc<AtomicBool>,
    /// Whether the last claim failed.
    failing: bool,
    tasks: TaskTracker,
    give_up: CancellationToken,
}

impl<Q: Queue> Driver<Q> {
    fn new(queue: Arc<Q>, wake: Arc<Notify>) -> Self {
        let in_all = queue.most_leased();
        Self {
            queue,
            wake,
            permits: Arc::new(Semaphore::new(in_all)),
            in_all,
            others_wait: Arc::new(AtomicBool::new(true)),
            failing: false,
            tasks: TaskTracker::new(),
            give_up: CancellationToken::new(),
        }
    }

    /// Claims jobs and starts them, until `stop`.
    async fn claim_until(&mut self, stop: &CancellationToken, poll: Duration) {
        let wake = Arc::clone(&self.wake);
        let mut more_is_due = false;
        while let Some(permit) = stop.run_until_cancelled(self.permit(more_is_due)).await {
            let hint = wake.notified();
            tokio::pin!(hint);
            hint.as_mut().enable();
            // Only this loop takes permits: what is free now stays free.
            let most = 1 + self.permits.available_permits();
            let Some(claimed) = self.claim(most, stop).await else { return };
            let poll = Jitter::FIFTH.apply(poll, &mut rand::rng());
            more_is_due = claimed.as_ref().is_ok_and(|claimed| claimed.jobs.len() >= most);
            let pause = match claimed {
                Ok(Claimed { jobs, next_in }) => {
                    self.others_wait.store(more_is_due || next_in.is_some(), Ordering::SeqCst);
                    let again = more_is_due || !jobs.is_empty() && next_in == Some(Duration::ZERO);
                    self.start(jobs, permit);
                    if again {
                        continue;
                    }
                    next_in.map_or(poll, |next| next.max(SHORTEST_SLEEP).min(poll))
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

    /// The permit of the next job. While more is due than may be leased, some are waited for, so that a claim is not for one job.
    async fn permit(&mut self, more_is_due: bool) -> OwnedSemaphorePermit {
        if more_is_due {
            // They are given back at once, and taken one by one: only the loop takes permits.
            let half = u32::try_from(self.in_all / 2).unwrap_or(u32::MAX);
            let _ = tokio::time::timeout(GATHER_FOR, self.permits.acquire_many(half)).await;
        }
        loop {
            let permit = Arc::clone(&self.permits).acquire_owned().await.expect("the semaphore is never closed");
            let most_leased = self.queue.most_leased();
            self.in_all = resize(&self.permits, self.in_all, most_leased);
            if self.in_all <= most_leased {
                return permit;
            }
            permit.forget();
            self.in_all -= 1;
        }
    }

    /// Claims up to `most` jobs. A claim that is under way at `stop` is waited for, so that no lease is taken in vain; but not for ever: `None`.
    async fn claim(&mut self, most: usize, stop: &CancellationToken) -> Option<Result<Claimed<Q::Job>, StoreError>> {
        // What ends from here on may be what this claim does not see.
        self.others_wait.store(true, Ordering::SeqCst);
        let claim = tokio::time::timeout(CLAIM_WITHIN, self.queue.claim(most));
        let claimed = tokio::select! {
            claimed = claim => claimed.unwrap_or(Err(StoreError::TimedOut)),
            () = async { stop.cancelled().await; tokio::time::sleep(LAST_CLAIM_WITHIN).await } => return None,
        };
        match &claimed {
            Ok(claimed) => {
                metrics::counter!("countersign_jobs_claimed_total", "queue" => Q::NAME).increment(claimed.jobs.len() as u64);
                if std::mem::take(&mut self.failing) {
                    tracing::info!(queue = Q::NAME, "claiming again");
                }
            }
            Err(error) => {
                metrics::counter!("countersign_claim_errors_total", "queue" => Q::NAME).increment(1);
                // Once per outage, not once per poll.
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(queue = Q::NAME, error = display_chain(error), "can't claim jobs; polling on");
                }
            }
        }
        Some(claimed)
    }

    /// Starts what was claimed for `permit` and those that are free.
    fn start(&self, jobs: Vec<Q::Job>, permit: OwnedSemaphorePermit) {
        let mut first = Some(permit);
        for job in jobs {
            let permit = first.take().or_else(|| Arc::clone(&self.permits).try_acquire_owned().ok());
            let (queue, give_up) = (Arc::clone(&self.queue), self.give_up.clone());
            let (wake, others_wait) = (Arc::clone(&self.wake), Arc::clone(&self.others_wait));
            self.tasks.spawn(async move {
                let ended = queue.work(job, give_up).await;
                drop(permit);
                if ended == Ended::GivenBack || others_wait.load(Ordering::SeqCst) {
                    wake.notify_one();
                }
            });
        }
    }

    /// Waits for up to `grace` until the jobs in flight have ended, and has the others given back.
    async fn drain(self, grace: Duration) {
        self.tasks.close();
        if tokio::time::timeout(grace, self.tasks.wait()).await.is_err() {
            tracing::info!(queue = Q::NAME, jobs = self.tasks.len(), "the grace is over: giving back what is in flight");
            self.give_up.cancel();
            let _ = tokio::time::timeout(GIVE_BACK_WITHIN, self.tasks.wait()).await;
        }
    }
}

/// Changes how many permits there are from `from` towards `to`, by taking away free ones or adding some; says how many there are now.
fn resize(permits: &Semaphore, from: usize, to: usize) -> usize {
    if from < to {
        permits.add_permits(to - from);
        return to;
    }
    from - permits.forget_permits(from - to)
}

#[cfg(test)]
mod tests;
