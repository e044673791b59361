//! Writes outcomes in batches, and keeps trying while Postgres is unavailable: a signature is worth more than the lease under which it was
//! obtained. If the lease has expired meanwhile and another worker has the job, the fencing token rejects the write.

use std::convert::Infallible;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use shared::backoff::{Jitter, doubling};
use shared::batch::{Batcher, Batches, Callers};
use shared::store::sign_finish::SignFinish;
use shared::store::webhook_finish::WebhookFinish;
use shared::store::{Finished, JobKind, Store, StoreError, within};
use shared::telemetry::display_chain;
use tokio::sync::Semaphore;

/// The outcome of a job, as a finisher writes it.
pub trait Finish: Send + Sync + Sized + 'static {
    /// The queue's name in logs and metrics.
    const QUEUE: &'static str;

    /// Writes `outcomes` together.
    fn write(store: &Store, outcomes: &[Self]) -> impl Future<Output = Result<Vec<Finished>, StoreError>> + Send;
}

impl Finish for SignFinish {
    const QUEUE: &'static str = JobKind::Sign.name();

    async fn write(store: &Store, outcomes: &[Self]) -> Result<Vec<Finished>, StoreError> {
        store.finish_sign_jobs(outcomes).await
    }
}

impl Finish for WebhookFinish {
    const QUEUE: &'static str = JobKind::Webhook.name();

    async fn write(store: &Store, outcomes: &[Self]) -> Result<Vec<Finished>, StoreError> {
        store.finish_webhook_jobs(outcomes).await
    }
}

/// Queues outcomes and writes them in batches.
pub struct Finisher<O: Finish> {
    store: Store,
    batches: Batcher<O, Write<O>, Infallible>,
    /// A permit to write an outcome that was held up.
    held_up: Semaphore,
}

/// What became of an outcome in its batch.
enum Write<O> {
    Done(Finished),
    /// Postgres refuses it: its job is due again when its lease expires.
    Refused,
    /// Somebody else holds its job. It is written outside of the batch, which it must not hold up.
    HeldUp(Box<O>),
}

impl<O> Write<O> {
    fn of(outcome: O, finished: Finished) -> Self {
        match finished {
            Finished::HeldUp => Self::HeldUp(Box::new(outcome)),
            finished => Self::Done(finished),
        }
    }
}

/// Maximum number of outcomes in one transaction, of concurrent transactions, and of waiting outcomes. Even with the largest settings, no
/// more outcomes are in flight than may wait.
///
/// Two transactions run at a time if one is full or takes long, so that Postgres works on one while it flushes the other to disk. They
/// concern different jobs, so they wait for each other only if both report on the same receiver, or on the upstream. None begins while jobs
/// that are about to end are ready to run: those that were claimed together mostly end together.
const LARGEST: usize = 2048;
const AT_ONCE: usize = 2;
const WAITING: usize = 65_536;

/// How many outcomes are written at the same time, of a batch that can't be written as one, and of those that are held up. Each may wait
/// for a lock, and claims need connections, too.
const ALONE_AT_ONCE: usize = 3;
const HELD_UP_AT_ONCE: usize = 2;

/// The longest that a write may take. After that, the connection is taken for dead.
const WRITE_WITHIN: Duration = Duration::from_secs(15);

/// Pauses between attempts to write while Postgres is unavailable.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

impl<O: Finish> Finisher<O> {
    /// Starts the tasks that write.
    #[must_use]
    pub fn new(store: Store) -> Self {
        let batches = Batches { largest: LARGEST, worthwhile: LARGEST, waiting: WAITING, at_once: AT_ONCE, callers: Callers::Leave };
        let for_batches = store.clone();
        let batches = Batcher::spawn(batches, move |outcomes: Vec<O>| {
            let store = for_batches.clone();
            async move { Ok(write_all(&store, outcomes).await) }
        });
        Self { store, batches, held_up: Semaphore::new(HELD_UP_AT_ONCE) }
    }

    /// Writes one outcome as soon as possible.
    pub async fn finish(&self, outcome: O) {
        let mut written = self.batches.submit(outcome).await;
        if let Ok(Write::HeldUp(outcome)) = written {
            // Boxed: thousands of jobs wait for their batch at a time, and few are ever held up.
            written = Ok(Box::pin(self.write_held_up(*outcome)).await);
        }
        match written {
            Ok(Write::Done(Finished::LeaseLost)) => {
                metrics::counter!("countersign_leases_lost_total", "queue" => O::QUEUE).increment(1);
                tracing::warn!(queue = O::QUEUE, "the lease had run out: nothing was changed");
            }
            Ok(_) => {}
            Err(error) => tracing::error!(queue = O::QUEUE, error = display_chain(&error), "an outcome is lost"),
        }
    }

    /// Writes an outcome whose job somebody else holds, as soon as it is let go.
    async fn write_held_up(&self, mut outcome: O) -> Write<O> {
        tracing::warn!(queue = O::QUEUE, "somebody holds the job of an outcome; trying until it works");
        let mut failures = 0;
        loop {
            failures += 1;
            pause_after(failures).await;
            let _permit = self.held_up.acquire().await;
            match write_alone(&self.store, outcome).await {
                Write::HeldUp(again) => outcome = *again,
                written => return written,
            }
        }
    }
}

/// Writes `outcomes` together. If Postgres refuses them, or somebody holds a lock on one of the rows, each one is written alone, so that one
/// bad outcome spoils no other.
async fn write_all<O: Finish>(store: &Store, outcomes: Vec<O>) -> Vec<Write<O>> {
    if outcomes.len() > 1
        && let Ok(written) = write(store, &outcomes).await
    {
        return outcomes.into_iter().zip(written).map(|(outcome, finished)| Write::of(outcome, finished)).collect();
    }
    stream::iter(outcomes).map(|outcome| write_alone(store, outcome)).buffered(ALONE_AT_ONCE).collect().await
}

async fn write_alone<O: Finish>(store: &Store, outcome: O) -> Write<O> {
    match write(store, std::slice::from_ref(&outcome)).await {
        Ok(written) => Write::of(outcome, written[0]),
        Err(StoreError::Contended(_)) => Write::of(outcome, Finished::HeldUp),
        Err(error) => {
            tracing::error!(queue = O::QUEUE, error = display_chain(&error), "an outcome was refused");
            Write::Refused
        }
    }
}

/// Writes `outcomes` in one transaction, and tries again for as long as Postgres is unavailable.
async fn write<O: Finish>(store: &Store, outcomes: &[O]) -> Result<Vec<Finished>, StoreError> {
    let mut failures = 0;
    loop {
        match within(WRITE_WITHIN, O::write(store, outcomes)).await {
            Err(error) if error.is_transient() && !matches!(error, StoreError::Contended(_)) => {
                failures += 1;
                if failures == 1 {
                    tracing::warn!(queue = O::QUEUE, error = display_chain(&error), "can't write outcomes; trying until it works");
                }
                pause_after(failures).await;
            }
            other => return other,
        }
    }
}

async fn pause_after(failures: u32) {
    let pause = Jitter::FIFTH.apply(doubling(SHORTEST_PAUSE, LONGEST_PAUSE, failures), &mut rand::rng());
    tokio::time::sleep(pause).await;
}
