//! What nobody waits for: requests that waited too long are ended, and what ended long ago is deleted. A little at a time, by every
//! worker; two at once skip each other's rows.

use std::time::Duration;

use rand::RngExt;
use shared::store::sign_finish::SignFinish;
use shared::store::{Store, StoreError};
use tokio_util::sync::CancellationToken;

use crate::driver::display_chain;
use crate::finisher::Shared;

/// Jobs and requests are handled in groups of this size, so that each transaction is short.
const AT_ONCE: u32 = 500;

/// The pause between two groups, and the one after the last.
const NEXT_GROUP: Duration = Duration::from_millis(50);
const NEXT_ROUND: Duration = Duration::from_mins(1);

/// How long ending a group of overdue jobs may take.
const LEASE: Duration = Duration::from_mins(1);

/// What is too old.
#[derive(Clone, Copy, Debug)]
pub struct Ages {
    /// For a request to be still waiting; nothing where this process does not sign.
    pub deadline: Option<Duration>,
    /// For a webhook to be still waiting for a receiver that is down; nothing where this process does not deliver.
    pub webhooks: Option<Duration>,
    /// For a finished request to be kept.
    pub retention: Duration,
}

/// Runs until `stop`.
pub async fn run(store: Store, ages: Ages, finisher: Shared<SignFinish>, stop: CancellationToken) {
    loop {
        let round = async {
            let ended = match ages.deadline {
                Some(deadline) => end_overdue(&store, deadline, &finisher).await?,
                None => 0,
            };
            let lost = match ages.webhooks {
                Some(age) => store.exhaust_webhooks_of_lost_receivers(age, AT_ONCE).await?,
                None => 0,
            };
            store.forget_receivers_and_secrets(ages.retention).await?;
            let deleted = store.forget(ages.retention, AT_ONCE).await?;
            metrics::counter!("countersign_requests_deleted_total").increment(deleted.into());
            Ok::<bool, StoreError>([ended, lost, deleted].contains(&AT_ONCE))
        };
        let done = tokio::select! {
            done = round => done,
            () = stop.cancelled() => return,
        };
        let pause = match done {
            Ok(true) => NEXT_GROUP,
            Ok(false) => NEXT_ROUND.mul_f64(rand::rng().random_range(0.8..1.2)),
            Err(error) => {
                tracing::debug!(error = display_chain(&error), "no maintenance this time");
                NEXT_ROUND
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

async fn end_overdue(store: &Store, deadline: Duration, finisher: &Shared<SignFinish>) -> Result<u32, StoreError> {
    let overdue = store.claim_overdue_sign_jobs(deadline, AT_ONCE, LEASE).await?;
    let count = u32::try_from(overdue.len()).unwrap_or(AT_ONCE);
    let ends = overdue.into_iter().map(|(lease, digest)| finisher.finish(SignFinish::past_deadline(lease, digest)));
    futures_util::future::join_all(ends).await;
    if count > 0 {
        tracing::warn!(count, "requests were not signed before their deadline");
    }
    Ok(count)
}
