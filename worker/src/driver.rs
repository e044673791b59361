//! Claim, work, finish: the loop, for any kind of job. Knows nothing of Postgres; tested without it.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use shared::backoff::Jitter;
use shared::store::{Claimed, StoreError};
use shared::telemetry::display_chain;
use tokio::sync::{Notify, Semaphore};
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
const LAST_CLAIM_WITHIN: Duration = Duration::from_secs(3);

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
    // As many as may be leased, or, where that is less than are, as many as are.
    let mut in_all = queue.most_leased();
    let permits = Arc::new(Semaphore::new(in_all));
    let (tasks, give_up) = (TaskTracker::new(), CancellationToken::new());
    let (mut failing, mut more_is_due) = (false, false);
    let others_wait = Arc::new(AtomicBool::new(true));
    loop {
        if more_is_due {
            // They are given back at once, and taken one by one below: only this loop takes permits.
            let half = u32::try_from(in_all / 2).unwrap_or(u32::MAX);
            let _ = tokio::time::timeout(GATHER_FOR, permits.acquire_many(half)).await;
        }
        let permit = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            permit = Arc::clone(&permits).acquire_owned() => permit.expect("the semaphore is never closed"),
        };
        let most_leased = queue.most_leased();
        in_all = resize(&permits, in_all, most_leased);
        if in_all > most_leased {
            permit.forget();
            in_all -= 1;
            continue;
        }
        let hint = wake.notified();
        tokio::pin!(hint);
        hint.as_mut().enable();

        // Only this loop takes permits: what is free now stays free.
        let most = 1 + permits.available_permits();
        // What ends from here on may be what this claim does not see.
        others_wait.store(true, Ordering::SeqCst);
        let claim = tokio::time::timeout(CLAIM_WITHIN, queue.claim(most));
        let claimed = tokio::select! {
            claimed = claim => claimed.unwrap_or_else(|_| Err(StoreError::TimedOut)),
            // A claim that is under way is waited for, so that no lease is taken in vain; but not for ever.
            () = async { stop.cancelled().await; tokio::time::sleep(LAST_CLAIM_WITHIN).await } => break,
        };
        if claimed.is_ok() && std::mem::take(&mut failing) {
            tracing::info!(queue = Q::NAME, "claiming again");
        }
        more_is_due = claimed.as_ref().is_ok_and(|claimed| claimed.jobs.len() >= most);
        let sleep = match claimed {
            Ok(Claimed { jobs, next_in }) => {
                let found = !jobs.is_empty();
                metrics::counter!("countersign_jobs_claimed_total", "queue" => Q::NAME).increment(jobs.len() as u64);
                others_wait.store(more_is_due || next_in.is_some(), Ordering::SeqCst);
                let mut first = Some(permit);
                for job in jobs {
                    let permit = first.take().or_else(|| Arc::clone(&permits).try_acquire_owned().ok());
                    let (queue, give_up) = (Arc::clone(&queue), give_up.clone());
                    let (wake, others_wait) = (Arc::clone(&wake), Arc::clone(&others_wait));
                    tasks.spawn(async move {
                        let ended = queue.work(job, give_up).await;
                        drop(permit);
                        if ended == Ended::GivenBack || others_wait.load(Ordering::SeqCst) {
                            wake.notify_one();
                        }
                    });
                }
                if more_is_due || found && next_in == Some(Duration::ZERO) {
                    continue;
                }
                // Of the permit that was had for the claim, if that found nothing.
                drop(first);
                let poll = Jitter::FIFTH.apply(pace.poll, &mut rand::rng());
                next_in.map_or(poll, |next| next.max(SHORTEST_SLEEP).min(poll))
            }
            Err(error) => {
                drop(permit);
                metrics::counter!("countersign_claim_errors_total", "queue" => Q::NAME).increment(1);
                // Once per outage, not once per poll.
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(queue = Q::NAME, error = display_chain(&error), "can't claim jobs; polling on");
                }
                Jitter::FIFTH.apply(pace.poll, &mut rand::rng())
            }
        };
        tokio::select! {
            () = stop.cancelled() => break,
            () = hint => {}
            () = tokio::time::sleep(sleep) => {}
        }
    }
    tasks.close();
    if tokio::time::timeout(pace.grace, tasks.wait()).await.is_err() {
        tracing::info!(queue = Q::NAME, jobs = tasks.len(), "the grace is over: giving back what is in flight");
        give_up.cancel();
        // Giving back is one statement; a Postgres that is away must not keep the process.
        let _ = tokio::time::timeout(Duration::from_secs(3), tasks.wait()).await;
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
