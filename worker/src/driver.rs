//! Claim, work, finish: the loop, for any kind of job. Knows nothing of Postgres; tested without it.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::RngExt;
use shared::store::{Claimed, StoreError};
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
            claimed = claim => claimed.unwrap_or_else(|_| Err(StoreError::timed_out())),
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
                let poll = around(pace.poll);
                next_in.map_or(poll, |next| next.max(SHORTEST_SLEEP).min(poll))
            }
            Err(error) => {
                drop(permit);
                metrics::counter!("countersign_claim_errors_total", "queue" => Q::NAME).increment(1);
                // Once per outage, not once per poll.
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(queue = Q::NAME, error = display_chain(&error), "can't claim jobs; polling on");
                }
                around(pace.poll)
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

/// `interval`, give or take a fifth, so that many processes do not poll in step.
fn around(interval: Duration) -> Duration {
    interval.mul_f64(rand::rng().random_range(0.8..1.2))
}

/// An error with its causes in one line.
#[must_use]
pub fn display_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// A queue in memory. A job works until the test gives it a permit, or until it is told to give up.
    #[derive(Default)]
    struct Memory {
        due: Mutex<Vec<u32>>,
        asked_for: Mutex<Vec<usize>>,
        claims: Notify,
        finish: Semaphore2,
        done: Mutex<Vec<u32>>,
        given_back: AtomicUsize,
        next_in: Mutex<Option<Duration>>,
        fail: AtomicUsize,
        /// How long a claim takes after it has looked.
        takes: Mutex<Duration>,
        most_leased: AtomicUsize,
    }

    /// Jobs with such a number are due again when they end.
    const TRIED_AGAIN: u32 = 100;

    struct Semaphore2(Semaphore);
    impl Default for Semaphore2 {
        fn default() -> Self {
            Self(Semaphore::new(0))
        }
    }

    impl Queue for Memory {
        type Job = u32;
        const NAME: &'static str = "memory";

        fn most_leased(&self) -> usize {
            self.most_leased.load(Ordering::SeqCst)
        }

        async fn claim(&self, most: usize) -> Result<Claimed<u32>, StoreError> {
            self.asked_for.lock().unwrap().push(most);
            self.claims.notify_one();
            if self.fail.load(Ordering::SeqCst) > 0 {
                self.fail.fetch_sub(1, Ordering::SeqCst);
                return Err(StoreError::Corrupt("test"));
            }
            let jobs = {
                let mut due = self.due.lock().unwrap();
                let count = most.min(due.len());
                due.drain(..count).collect()
            };
            let (takes, next_in) = (*self.takes.lock().unwrap(), *self.next_in.lock().unwrap());
            tokio::time::sleep(takes).await;
            Ok(Claimed { jobs, next_in })
        }

        async fn work(&self, job: u32, give_up: CancellationToken) -> Ended {
            tokio::select! {
                permit = self.finish.0.acquire() => {
                    permit.unwrap().forget();
                    self.done.lock().unwrap().push(job);
                    if job < TRIED_AGAIN { Ended::ForGood } else { Ended::GivenBack }
                }
                () = give_up.cancelled() => {
                    self.given_back.fetch_add(1, Ordering::SeqCst);
                    Ended::GivenBack
                }
            }
        }
    }

    struct Running {
        queue: Arc<Memory>,
        wake: Arc<Notify>,
        stop: CancellationToken,
        task: tokio::task::JoinHandle<()>,
    }

    fn start(due: Vec<u32>, pace: Pace) -> Running {
        let queue = Arc::new(Memory { due: Mutex::new(due), most_leased: 3.into(), ..Memory::default() });
        let (wake, stop) = (Arc::new(Notify::new()), CancellationToken::new());
        let task = tokio::spawn(run(Arc::clone(&queue), pace, Arc::clone(&wake), stop.clone()));
        Running { queue, wake, stop, task }
    }

    const PACE: Pace = Pace { poll: Duration::from_hours(1), grace: Duration::from_hours(1) };

    async fn until(condition: impl Fn() -> bool) {
        while !condition() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn claims_no_more_than_may_be_leased() {
        let running = start((0..5).collect(), PACE);
        running.queue.claims.notified().await;
        running.queue.finish.0.add_permits(1);
        until(|| running.queue.asked_for.lock().unwrap().len() == 2).await;
        assert_eq!(*running.queue.asked_for.lock().unwrap(), [3, 1]);
        running.queue.finish.0.add_permits(4);
        until(|| running.queue.done.lock().unwrap().len() == 5).await;
        running.stop.cancel();
        running.task.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn where_fewer_may_be_leased_than_are_no_claim_is_made_until_enough_have_ended() {
        let running = start((0..9).collect(), PACE);
        let asked_for = || running.queue.asked_for.lock().unwrap().clone();
        running.queue.claims.notified().await;
        running.queue.most_leased.store(1, Ordering::SeqCst);
        // It waits for a permit now, not only for a group of them.
        tokio::time::sleep(2 * GATHER_FOR).await;
        running.queue.finish.0.add_permits(2);
        until(|| running.queue.done.lock().unwrap().len() == 2).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(asked_for(), [3]);
        running.queue.finish.0.add_permits(1);
        until(|| asked_for().len() == 2).await;
        running.queue.most_leased.store(4, Ordering::SeqCst);
        running.queue.finish.0.add_permits(1);
        until(|| asked_for().len() == 3).await;
        assert_eq!(asked_for(), [3, 1, 4]);
    }

    #[tokio::test]
    async fn a_hint_ends_the_sleep_and_no_poll_is_needed() {
        let running = start(vec![], PACE);
        running.queue.claims.notified().await;
        running.queue.due.lock().unwrap().push(7);
        running.wake.notify_one();
        running.queue.finish.0.add_permits(1);
        until(|| *running.queue.done.lock().unwrap() == [7]).await;
        running.stop.cancel();
        running.task.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_hint_it_polls() {
        let running = start(vec![], Pace { poll: Duration::from_secs(1), ..PACE });
        running.queue.claims.notified().await;
        running.queue.due.lock().unwrap().push(7);
        running.queue.finish.0.add_permits(1);
        tokio::time::sleep(Duration::from_millis(1300)).await;
        assert_eq!(*running.queue.done.lock().unwrap(), [7]);
        running.stop.cancel();
        running.task.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn sleeps_exactly_until_the_next_job_is_due() {
        let running = start(vec![], PACE);
        *running.queue.next_in.lock().unwrap() = Some(Duration::from_secs(30));
        running.wake.notify_one();
        tokio::time::sleep(Duration::from_secs(29)).await;
        let before = running.queue.asked_for.lock().unwrap().len();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(running.queue.asked_for.lock().unwrap().len(), before + 1);
        running.stop.cancel();
        running.task.await.unwrap();
    }

    /// How many claims are made for jobs that end, while the last claim said so much of those that wait.
    async fn claims_for(jobs: Vec<u32>, next_in: Option<Duration>) -> usize {
        let count = jobs.len();
        let running = start(jobs, PACE);
        *running.queue.next_in.lock().unwrap() = next_in;
        until(|| running.queue.due.lock().unwrap().is_empty()).await;
        running.queue.finish.0.add_permits(count);
        until(|| running.queue.done.lock().unwrap().len() == count).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
        running.queue.asked_for.lock().unwrap().len()
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_that_ends_is_a_reason_to_claim_only_if_something_waits_or_it_is_tried_again() {
        assert_eq!(claims_for(vec![1], None).await, 1);
        assert_eq!(claims_for(vec![1], Some(Duration::from_mins(1))).await, 2);
        assert_eq!(claims_for(vec![TRIED_AGAIN], None).await, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_that_ends_while_a_claim_is_under_way_is_a_reason_for_another() {
        let running = start(vec![1], PACE);
        until(|| running.queue.due.lock().unwrap().is_empty()).await;
        *running.queue.takes.lock().unwrap() = Duration::from_secs(1);
        running.wake.notify_one();
        until(|| running.queue.asked_for.lock().unwrap().len() == 2).await;
        running.queue.finish.0.add_permits(1);
        until(|| running.queue.done.lock().unwrap().len() == 1).await;
        tokio::time::sleep(Duration::from_millis(2500)).await;
        assert_eq!(running.queue.asked_for.lock().unwrap().len(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_of_the_store_is_outlived() {
        let running = start(vec![1], Pace { poll: Duration::from_secs(1), ..PACE });
        running.queue.fail.store(3, Ordering::SeqCst);
        running.queue.finish.0.add_permits(1);
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(*running.queue.done.lock().unwrap(), [1]);
        running.stop.cancel();
        running.task.await.unwrap();
    }

    #[tokio::test]
    async fn told_to_stop_it_finishes_what_is_in_flight_and_claims_nothing_more() {
        let running = start(vec![1, 2], PACE);
        until(|| running.queue.due.lock().unwrap().is_empty()).await;
        running.stop.cancel();
        running.queue.due.lock().unwrap().push(3);
        running.queue.finish.0.add_permits(2);
        running.task.await.unwrap();
        assert_eq!(running.queue.done.lock().unwrap().len(), 2);
        assert_eq!(*running.queue.due.lock().unwrap(), [3]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_longer_than_the_grace_is_given_back() {
        let running = start(vec![1, 2], Pace { grace: Duration::from_secs(5), ..PACE });
        until(|| running.queue.due.lock().unwrap().is_empty()).await;
        running.stop.cancel();
        running.task.await.unwrap();
        assert_eq!(running.queue.given_back.load(Ordering::SeqCst), 2);
    }
}
