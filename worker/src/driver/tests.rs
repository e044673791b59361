//! Tests of the loop with an in-memory queue.

use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use tokio::sync::Semaphore;

use super::*;

/// An in-memory queue. A job runs until the test gives it a permit, or until it is told to give up.
#[derive(Default)]
struct Memory {
    due: Mutex<Vec<u32>>,
    asked_for: Mutex<Vec<usize>>,
    claims: Notify,
    /// A permit for each job that may end.
    finish: Permits,
    done: Mutex<Vec<u32>>,
    given_back: AtomicUsize,
    next_in: Mutex<Option<Duration>>,
    look_again_in: Mutex<Option<Duration>>,
    fail: AtomicUsize,
    panics: AtomicBool,
    /// How long a claim takes after it has taken its jobs.
    takes: Mutex<Duration>,
    most_leased: AtomicUsize,
}

struct Permits(Semaphore);

impl Default for Permits {
    fn default() -> Self {
        Self(Semaphore::new(0))
    }
}

/// Jobs with this number or a higher one are due again when they end.
const TRIED_AGAIN: u32 = 100;

impl Queue for Memory {
    type Job = u32;
    const NAME: &'static str = "memory";

    fn most_leased(&self) -> usize {
        self.most_leased.load(Ordering::SeqCst)
    }

    async fn claim(&self, most: usize) -> Result<Claimed<u32>, StoreError> {
        self.asked_for.lock().unwrap().push(most);
        self.claims.notify_one();
        assert!(!self.panics.load(Ordering::SeqCst), "as a bug would");
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
        let look_again_in = *self.look_again_in.lock().unwrap();
        tokio::time::sleep(takes).await;
        Ok(Claimed { jobs, next_in, look_again_in })
    }

    async fn work(&self, job: u32, stop: Stop) -> NextClaim {
        tokio::select! {
            permit = self.finish.0.acquire() => {
                permit.unwrap().forget();
                self.done.lock().unwrap().push(job);
                if job < TRIED_AGAIN { NextClaim::AsPlanned } else { NextClaim::AtOnce }
            }
            () = stop.give_up.cancelled() => {
                self.given_back.fetch_add(1, Ordering::SeqCst);
                NextClaim::AtOnce
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
async fn after_a_panic_all_is_stopped_and_what_is_in_flight_has_its_end() {
    let running = start(vec![1], PACE);
    running.queue.claims.notified().await;
    until(|| running.queue.due.lock().unwrap().is_empty()).await;
    running.queue.panics.store(true, Ordering::SeqCst);
    running.wake.notify_one();
    running.stop.cancelled().await;
    running.queue.finish.0.add_permits(1);
    assert!(running.task.await.unwrap_err().is_panic());
    assert_eq!(*running.queue.done.lock().unwrap(), [1]);
}

#[tokio::test(start_paused = true)]
async fn where_fewer_may_be_leased_than_are_no_claim_is_made_until_enough_have_ended() {
    let running = start((0..9).collect(), PACE);
    let asked_for = || running.queue.asked_for.lock().unwrap().clone();
    running.queue.claims.notified().await;
    running.queue.most_leased.store(1, Ordering::SeqCst);
    // Now the loop waits for a single permit, not only for a group of them.
    tokio::time::sleep(2 * *GATHER_FOR.start()).await;
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
async fn sleeps_exactly_until_the_next_job_is_due_or_may_be_seen() {
    let in_half_a_minute = Some(Duration::from_secs(30));
    for (next_in, look_again_in) in [(in_half_a_minute, None), (None, in_half_a_minute)] {
        let running = start(vec![], PACE);
        *running.queue.next_in.lock().unwrap() = next_in;
        *running.queue.look_again_in.lock().unwrap() = look_again_in;
        running.wake.notify_one();
        tokio::time::sleep(Duration::from_secs(29)).await;
        let before = running.queue.asked_for.lock().unwrap().len();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(running.queue.asked_for.lock().unwrap().len(), before + 1);
        running.stop.cancel();
        running.task.await.unwrap();
    }
}

/// The number of claims made when `jobs` end after a claim that reported `next_in` and `look_again_in`.
async fn claims_for(jobs: Vec<u32>, next_in: Option<Duration>, look_again_in: Option<Duration>) -> usize {
    let count = jobs.len();
    let running = start(jobs, PACE);
    *running.queue.next_in.lock().unwrap() = next_in;
    *running.queue.look_again_in.lock().unwrap() = look_again_in;
    until(|| running.queue.due.lock().unwrap().is_empty()).await;
    running.queue.finish.0.add_permits(count);
    until(|| running.queue.done.lock().unwrap().len() == count).await;
    tokio::time::sleep(Duration::from_millis(1)).await;
    running.queue.asked_for.lock().unwrap().len()
}

#[tokio::test(start_paused = true)]
async fn a_job_that_ends_is_a_reason_to_claim_only_if_something_waits_or_it_is_tried_again() {
    assert_eq!(claims_for(vec![1], None, None).await, 1);
    assert_eq!(claims_for(vec![1], Some(Duration::from_mins(1)), None).await, 2);
    assert_eq!(claims_for(vec![1], None, Some(Duration::from_mins(1))).await, 1);
    assert_eq!(claims_for(vec![TRIED_AGAIN], None, None).await, 2);
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
