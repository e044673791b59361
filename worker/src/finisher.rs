//! Writes outcomes in batches, and keeps trying while Postgres is unavailable: a signature is worth more than the lease under which it was
//! obtained. If the lease has expired meanwhile and another worker has the job, the fencing token rejects the write.

use std::convert::Infallible;
use std::time::Duration;

use futures_util::future::join_all;
use shared::backoff::{Jitter, doubling};
use shared::batch::{Batcher, Batches, Callers};
use shared::store::sign_finish::SignFinish;
use shared::store::webhook_finish::WebhookFinish;
use shared::store::{Finished, Store, StoreError, within};
use shared::telemetry::display_chain;

/// The outcome of a job, as a finisher writes it.
pub trait Finish: Send + Sync + Sized + 'static {
    /// The queue's name in logs and metrics.
    const QUEUE: &'static str;

    /// Writes `outcomes` together.
    fn write(store: &Store, outcomes: &[Self]) -> impl Future<Output = Result<Vec<Finished>, StoreError>> + Send;
}

impl Finish for SignFinish {
    const QUEUE: &'static str = "sign";

    async fn write(store: &Store, outcomes: &[Self]) -> Result<Vec<Finished>, StoreError> {
        store.finish_sign_jobs(outcomes).await
    }
}

impl Finish for WebhookFinish {
    const QUEUE: &'static str = "webhook";

    async fn write(store: &Store, outcomes: &[Self]) -> Result<Vec<Finished>, StoreError> {
        store.finish_webhook_jobs(outcomes).await
    }
}

/// Queues outcomes and writes them in batches.
pub struct Finisher<O: Finish> {
    batches: Batcher<O, Option<Finished>, Infallible>,
}

/// Maximum number of outcomes in one transaction, of concurrent transactions, and of waiting outcomes. Even with the largest settings, no
/// more outcomes are in flight than may wait.
///
/// Two transactions run at a time if one is full or takes long, so that Postgres works on one while it flushes the other to disk. They
/// concern different jobs, so they wait for each other only if both report on the same receiver, or on the upstream.
const LARGEST: usize = 2048;
const AT_ONCE: usize = 2;
const WAITING: usize = 65_536;

/// The longest that a write may take. After that, the connection is taken for dead.
const WRITE_WITHIN: Duration = Duration::from_secs(15);

/// Pauses between attempts to write while Postgres is unavailable.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

impl<O: Finish> Finisher<O> {
    /// Starts the tasks that write.
    #[must_use]
    pub fn new(store: Store) -> Self {
        let batches = Batches { largest: LARGEST, waiting: WAITING, at_once: AT_ONCE, callers: Callers::Leave };
        let batches = Batcher::spawn(batches, move |outcomes: Vec<O>| {
            let store = store.clone();
            async move { Ok(write_all(&store, outcomes).await) }
        });
        Self { batches }
    }

    /// Writes one outcome as soon as possible.
    pub async fn finish(&self, outcome: O) {
        match self.batches.submit(outcome).await {
            Ok(Some(Finished::LeaseLost)) => {
                metrics::counter!("countersign_leases_lost_total", "queue" => O::QUEUE).increment(1);
                tracing::warn!(queue = O::QUEUE, "the lease had run out: nothing was changed");
            }
            Ok(_) => {}
            Err(error) => tracing::error!(queue = O::QUEUE, error = display_chain(&error), "an outcome is lost"),
        }
    }
}

/// Writes `outcomes` together, and retries while Postgres is unavailable. If Postgres refuses them, or somebody holds a lock on one of the
/// rows, each one is written alone, so that one bad outcome spoils no other.
async fn write_all<O: Finish>(store: &Store, outcomes: Vec<O>) -> Vec<Option<Finished>> {
    if outcomes.len() > 1
        && let Ok(written) = write_patiently(store, &outcomes).await
    {
        return written.into_iter().map(Some).collect();
    }
    // Writes that are held up must not hold up the others.
    join_all(outcomes.iter().map(|outcome| write_alone(store, outcome))).await
}

/// Writes one outcome. `None` if Postgres refuses it: then its job is due again when its lease expires.
async fn write_alone<O: Finish>(store: &Store, outcome: &O) -> Option<Finished> {
    match write_patiently(store, std::slice::from_ref(outcome)).await {
        Ok(written) => written.first().copied(),
        Err(error) => {
            tracing::error!(queue = O::QUEUE, error = display_chain(&error), "an outcome was refused");
            None
        }
    }
}

async fn write_patiently<O: Finish>(store: &Store, outcomes: &[O]) -> Result<Vec<Finished>, StoreError> {
    let mut failures = 0_u32;
    loop {
        match within(WRITE_WITHIN, O::write(store, outcomes)).await {
            Err(error @ StoreError::Contended(_)) if outcomes.len() > 1 => return Err(error),
            Err(error) if error.is_transient() => {
                failures = failures.saturating_add(1);
                if failures == 1 {
                    tracing::warn!(queue = O::QUEUE, error = display_chain(&error), "can't write outcomes; trying until it works");
                }
                let pause = Jitter::FIFTH.apply(doubling(SHORTEST_PAUSE, LONGEST_PAUSE, failures), &mut rand::rng());
                tokio::time::sleep(pause).await;
            }
            other => return other,
        }
    }
}
