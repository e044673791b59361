//! Writes outcomes in groups, and keeps trying while Postgres is away: a signature that was obtained is worth more than the lease it
//! was obtained under. Should the lease have run out meanwhile and somebody else have the job, the fence refuses the write.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use shared::backoff::{Jitter, doubling};
use shared::batch::{Batcher, Batches, Callers};
use shared::store::sign_finish::SignFinish;
use shared::store::webhook_finish::WebhookFinish;
use shared::store::{Finished, Store, StoreError};
use shared::telemetry::display_chain;

/// What a finisher writes.
pub trait Outcome: Send + Sync + Sized + 'static {
    /// The queue's name in logs and metrics.
    const QUEUE: &'static str;

    /// Writes `outcomes` together.
    fn write(store: &Store, outcomes: &[Self]) -> impl Future<Output = Result<Vec<Finished>, StoreError>> + Send;
}

impl Outcome for SignFinish {
    const QUEUE: &'static str = "sign";

    async fn write(store: &Store, outcomes: &[Self]) -> Result<Vec<Finished>, StoreError> {
        store.finish_sign_jobs(outcomes).await
    }
}

impl Outcome for WebhookFinish {
    const QUEUE: &'static str = "webhook";

    async fn write(store: &Store, outcomes: &[Self]) -> Result<Vec<Finished>, StoreError> {
        store.finish_webhook_jobs(outcomes).await
    }
}

/// A queue in front of the writes.
pub struct Finisher<O: Outcome> {
    batches: Batcher<O, Option<Finished>, StoreError>,
}

/// Most outcomes in one transaction, transactions at a time, and most outcomes that wait for one: more are never in flight, with the largest
/// settings.
///
/// Two at a time where one is full or takes long, so that one is being worked on by Postgres while the other is being forced to the disk. They
/// are about different jobs, so that they wait for each other only where both tell of the same receiver, or of the upstream.
const LARGEST: usize = 2048;
const AT_ONCE: usize = 2;
const WAITING: usize = 65_536;

/// The longest a write may take; beyond, the connection is taken for dead.
const WRITE_WITHIN: Duration = Duration::from_secs(15);

/// Pauses between tries to write while Postgres is away.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

impl<O: Outcome> Finisher<O> {
    /// Starts the task that writes.
    #[must_use]
    pub fn new(store: Store) -> Self {
        let batches = Batches { largest: LARGEST, waiting: WAITING, at_once: AT_ONCE, callers: Callers::Leave };
        let batches = Batcher::spawn(batches, move |outcomes: Vec<O>| {
            let store = store.clone();
            async move { Ok(write_all(&store, outcomes).await) }
        });
        Self { batches }
    }

    /// Writes one outcome, as soon as it can be.
    pub async fn finish(&self, outcome: O) {
        if let Ok(Some(Finished::LeaseLost)) = self.batches.submit(outcome).await {
            metrics::counter!("countersign_leases_lost_total", "queue" => O::QUEUE).increment(1);
            tracing::warn!(queue = O::QUEUE, "the lease had run out: nothing was changed");
        }
    }
}

/// Writes `outcomes` together, again and again while Postgres is away. What Postgres refuses is written one by one, so that one bad
/// outcome spoils no other; its job is due again when the lease runs out. So is what somebody holds a row of.
async fn write_all<O: Outcome>(store: &Store, outcomes: Vec<O>) -> Vec<Option<Finished>> {
    match write_patiently(store, &outcomes).await {
        Ok(written) => written.into_iter().map(Some).collect(),
        Err(error) if outcomes.len() == 1 => {
            tracing::error!(queue = O::QUEUE, error = display_chain(&error), "an outcome was refused");
            vec![None]
        }
        Err(_) => {
            let alone = outcomes.into_iter().map(|outcome| async move {
                let written = write_patiently(store, std::slice::from_ref(&outcome)).await;
                if let Err(error) = &written {
                    tracing::error!(queue = O::QUEUE, error = display_chain(error), "an outcome was refused");
                }
                written.ok().and_then(|written| written.first().copied())
            });
            // Those that are held up must not hold up the others.
            join_all(alone).await
        }
    }
}

async fn write_patiently<O: Outcome>(store: &Store, outcomes: &[O]) -> Result<Vec<Finished>, StoreError> {
    let mut failures = 0_u32;
    loop {
        let written = tokio::time::timeout(WRITE_WITHIN, O::write(store, outcomes)).await;
        match written.unwrap_or_else(|_| Err(StoreError::TimedOut)) {
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

/// A finisher that drivers share.
pub type Shared<O> = Arc<Finisher<O>>;
