//! What nobody waits for: requests that waited too long are ended, and what ended long ago is deleted. A little at a time, by every
//! worker; two at once skip each other's requests.

use std::future::Future;
use std::time::Duration;

use shared::backoff::Jitter;
use shared::store::sign_finish::SignFinish;
use shared::store::{Store, StoreError};
use shared::telemetry::display_chain;
use tokio_util::sync::CancellationToken;

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

/// How long one step of a round may take.
const STEP_WITHIN: Duration = Duration::from_secs(30);

/// Runs until `stop`.
pub async fn run(store: Store, ages: Ages, finisher: Shared<SignFinish>, stop: CancellationToken) {
    loop {
        let full = tokio::select! {
            full = round(&store, ages, &finisher) => full,
            () = stop.cancelled() => return,
        };
        let pause = if full { NEXT_GROUP } else { Jitter::FIFTH.apply(NEXT_ROUND, &mut rand::rng()) };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// One group of everything. True if one of the groups was full, so that there may be more.
async fn round(store: &Store, ages: Ages, finisher: &Shared<SignFinish>) -> bool {
    let mut full = false;
    if let Some(deadline) = ages.deadline {
        full |= step("overdue", end_overdue(store, deadline, finisher)).await == AT_ONCE;
    }
    if let Some(age) = ages.webhooks {
        full |= step("lost receivers", store.exhaust_webhooks_of_lost_receivers(age, AT_ONCE)).await == AT_ONCE;
    }
    full |= step("old receivers", store.forget_receivers_and_secrets(ages.retention, AT_ONCE)).await == AT_ONCE;
    let deleted = step("retention", store.forget(ages.retention, AT_ONCE)).await;
    metrics::counter!("countersign_requests_deleted_total").increment(deleted.into());
    full || deleted == AT_ONCE
}

/// How many a step handled: none if it failed or took too long. That is no reason not to take the next step.
async fn step(name: &str, work: impl Future<Output = Result<u32, StoreError>>) -> u32 {
    let done = tokio::time::timeout(STEP_WITHIN, work).await.unwrap_or_else(|_| Err(StoreError::TimedOut));
    done.unwrap_or_else(|error| {
        tracing::debug!(step = name, error = display_chain(&error), "no maintenance this time");
        0
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_step_that_fails_or_never_ends_counts_nothing_and_lets_the_next_one_follow() {
        assert_eq!(step("fails", async { Err(StoreError::Corrupt("test")) }).await, 0);
        assert_eq!(step("hangs", std::future::pending()).await, 0);
        assert_eq!(step("works", async { Ok(3) }).await, 3);
    }
}
