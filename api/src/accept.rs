//! Storing a batch of POSTs: together if possible, and one by one where a single request would fail the others.

use std::time::Duration;

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

/// Stores `requests` within [`STORE_WITHIN`]: first the new messages in one statement, then the others. If Postgres refuses a batch, or
/// another transaction holds one of its messages, each request is stored on its own, so that one cannot fail the others.
pub async fn store_all(store: &Store, requests: Vec<NewRequest>, most_pending: u64) -> Result<Vec<Result<Stored, NotStored>>, StoreError> {
    let deadline = Instant::now() + STORE_WITHIN;
    let new = before(deadline, store.accept_new(&requests, most_pending)).await;
    let new = match new {
        Ok(stored) => stored,
        Err(error) if error.may_be_of_one_item() => requests.iter().map(|_| None).collect(),
        Err(error) => return Err(error),
    };
    let left: Vec<NewRequest> = requests.into_iter().zip(&new).filter(|(_, stored)| stored.is_none()).map(|(request, _)| request).collect();
    if left.is_empty() {
        return Ok(new.into_iter().flatten().map(Ok).collect());
    }
    let known = store_known(store, &left, most_pending, deadline).await.unwrap_or_else(|error| {
        warn(&error);
        left.iter().map(|_| Err(NotStored::Unavailable)).collect()
    });
    let mut known = known.into_iter();
    Ok(new.into_iter().map(|stored| stored.map_or_else(|| known.next().expect("one for each that is left"), Ok)).collect())
}

/// Stores requests until `deadline`, one by one if the batch fails. Each has its own timeout: the result of a slow request is uncertain,
/// but those that were stored in time are known to be stored.
async fn store_known(
    store: &Store,
    requests: &[NewRequest],
    most_pending: u64,
    deadline: Instant,
) -> Result<Vec<Result<Stored, NotStored>>, StoreError> {
    match before(deadline, store.accept(requests, most_pending)).await {
        Ok(accepted) => Ok(accepted.into_iter().map(|accepted| accepted.map_err(NotStored::Rejected)).collect()),
        Err(error) if error.may_be_of_one_item() => {
            let alone = requests.iter().map(|request| async move {
                match before(deadline, store.accept(std::slice::from_ref(request), most_pending)).await {
                    Ok(mut accepted) => accepted.pop().expect("one for each request").map_err(NotStored::Rejected),
                    Err(StoreError::Refused(error)) => {
                        tracing::error!(error = display_chain(&error), "a request was refused");
                        Err(NotStored::Refused)
                    }
                    Err(error) => {
                        warn(&error);
                        Err(NotStored::Unavailable)
                    }
                }
            });
            Ok(futures_util::future::join_all(alone).await)
        }
        Err(error) => Err(error),
    }
}

/// Logs why requests were not stored.
pub fn warn(error: &StoreError) {
    tracing::warn!(error = display_chain(error), "can't store requests");
}
