//! Storing a batch of POSTs: together if possible, and one by one where a single request would fail the others.

use std::time::Duration;

use shared::batch::BatchError;
use shared::store::accept::{NewRequest, Rejection, Stored};
use shared::store::{Store, StoreError, before};
use shared::telemetry::display_chain;
use tokio::time::Instant;

/// The longest time for storing, counted from the arrival of the POST. The rest of the promised two seconds is for the answer.
pub const STORE_WITHIN: Duration = Duration::from_millis(1700);

/// Why a request was not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotStored {
    /// It can't be accepted.
    Rejected(Rejection),
    /// Postgres is unavailable or too slow.
    Unavailable,
    /// Postgres refused this request, which is a bug in this service.
    Refused,
}

impl<E> From<BatchError<E>> for NotStored {
    /// Why a batch failed is logged once for all of it.
    fn from(_: BatchError<E>) -> Self {
        Self::Unavailable
    }
}

/// Stores `requests` within [`STORE_WITHIN`]: first the new messages in one statement, then the others. If Postgres refuses a batch, or
/// another transaction holds one of its messages, each request is stored on its own, so that one cannot fail the others.
///
/// There is a deadline, so a batch whose callers have all been told 503 does not go on unseen, nor delay the next one.
pub async fn store_all(store: &Store, requests: Vec<NewRequest>, most_pending: u64) -> Vec<Result<Stored, NotStored>> {
    let deadline = Instant::now() + STORE_WITHIN;
    let new = match before(deadline, store.accept_new(&requests, most_pending)).await {
        Ok(stored) => stored,
        Err(error) if error.may_be_of_one_item() => requests.iter().map(|_| None).collect(),
        Err(error) => return not_stored(&error, requests.len()),
    };
    let left: Vec<NewRequest> = requests.into_iter().zip(&new).filter(|(_, stored)| stored.is_none()).map(|(request, _)| request).collect();
    let mut known = if left.is_empty() { Vec::new() } else { store_known(store, &left, most_pending, deadline).await }.into_iter();
    new.into_iter().map(|stored| stored.map_or_else(|| known.next().expect("one for each that is left"), Ok)).collect()
}

/// Stores requests until `deadline`, one by one if the batch fails. Each has its own timeout: the result of a slow request is uncertain,
/// but those that were stored in time are known to be stored.
async fn store_known(store: &Store, requests: &[NewRequest], most_pending: u64, deadline: Instant) -> Vec<Result<Stored, NotStored>> {
    match before(deadline, store.accept(requests, most_pending)).await {
        Ok(accepted) => accepted.into_iter().map(|accepted| accepted.map_err(NotStored::Rejected)).collect(),
        Err(error) if error.may_be_of_one_item() => {
            let alone = requests.iter().map(|request| async move {
                match before(deadline, store.accept(std::slice::from_ref(request), most_pending)).await {
                    Ok(mut accepted) => accepted.pop().expect("one for each request").map_err(NotStored::Rejected),
                    Err(StoreError::Refused(error)) => {
                        tracing::error!(error = display_chain(&error), "a request was refused");
                        Err(NotStored::Refused)
                    }
                    Err(error) => not_stored(&error, 1).remove(0),
                }
            });
            futures_util::future::join_all(alone).await
        }
        Err(error) => not_stored(&error, requests.len()),
    }
}

/// The results of `count` requests of which it is not known whether they are stored. Logs why.
fn not_stored(error: &StoreError, count: usize) -> Vec<Result<Stored, NotStored>> {
    tracing::warn!(error = display_chain(error), "can't store requests");
    vec![Err(NotStored::Unavailable); count]
}
