//! Stores POSTs in batches. New messages go first, in one statement; those that may be known go in batches of their own, so that whoever
//! holds one of them in a transaction delays no new one.

use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt};
use shared::batch::BatchError;
use shared::store::accept::{Accepted, NewRequest, Rejection, Stored};
use shared::store::{Store, StoreError, before, within};
use shared::telemetry::display_chain;
use tokio::time::Instant;

/// The longest time for storing, counted from the arrival of the POST. The rest of the promised two seconds is for the answer.
pub const STORE_WITHIN: Duration = Duration::from_millis(1700);

/// Why a request was not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotStored {
    /// It can't be accepted.
    Rejected(Rejection),
    /// Too many others wait to be stored, or Postgres refused it, which is a bug in this service.
    Unavailable,
    /// Postgres is unavailable or too slow: it may be stored.
    Unknown,
}

impl<E> From<BatchError<E>> for NotStored {
    /// Why a batch failed is logged once for all of it.
    fn from(error: BatchError<E>) -> Self {
        match error {
            BatchError::Full | BatchError::Stopped => Self::Unavailable,
            BatchError::Panicked | BatchError::Failed(_) => Self::Unknown,
        }
    }
}

/// What became of a POST in the statement for new messages.
pub enum FirstTry {
    /// It is stored.
    Stored(Stored),
    /// Its message or its idempotency key is known: [`store_known`] has to decide.
    Known(NewRequest),
    /// It is not known whether it is stored.
    Failed,
}

/// Stores those `requests` whose message is new, in one statement, within [`STORE_WITHIN`].
pub async fn store_new(store: &Store, requests: Vec<NewRequest>, most_pending: u64) -> Vec<FirstTry> {
    match within(STORE_WITHIN, store.accept_new(&requests, most_pending)).await {
        Ok(stored) => {
            let stored = requests.into_iter().zip(stored);
            stored.map(|(request, stored)| stored.map_or_else(|| FirstTry::Known(request), FirstTry::Stored)).collect()
        }
        Err(error) if error.may_be_of_one_item() => requests.into_iter().map(FirstTry::Known).collect(),
        Err(error) => {
            warn(&error);
            requests.iter().map(|_| FirstTry::Failed).collect()
        }
    }
}

/// What became of a POST whose message or idempotency key may be known.
pub enum SecondTry {
    /// It is stored, or it is known why not.
    Done(Result<Stored, NotStored>),
    /// Another transaction holds its message, or its job: [`store_held`] waits for it.
    Held(NewRequest),
}

/// Stores `requests` that may be known already, within [`STORE_WITHIN`]. If Postgres refuses them, or one of their messages is held, they
/// are stored in parts, down to single messages, so that one cannot fail the others, and nobody waits for one that is held.
pub async fn store_known(store: &Store, requests: Vec<NewRequest>, most_pending: u64) -> Vec<SecondTry> {
    let target = Target { store, most_pending, deadline: Instant::now() + STORE_WITHIN, waits_for_held: false };
    target.store_all(requests).await
}

/// Stores `requests` whose messages are held by others, within [`STORE_WITHIN`]. Those of each message are stored on their own: the result
/// of one that is held for long is uncertain, but those that were stored in time are known to be stored.
pub async fn store_held(store: &Store, requests: Vec<NewRequest>, most_pending: u64) -> Vec<Result<Stored, NotStored>> {
    let target = Target { store, most_pending, deadline: Instant::now() + STORE_WITHIN, waits_for_held: true };
    let tried = target.store_all(requests).await.into_iter();
    tried.map(|tried| if let SecondTry::Done(stored) = tried { stored } else { Err(NotStored::Unknown) }).collect()
}

/// In how many parts requests are stored that can't be stored together. Of a batch of 96 messages, one that is held is told from the others
/// in three steps, and the others need few commits.
const PARTS: usize = 8;

/// How many of the parts are stored at the same time. One that is held has a connection while it is waited for, and new messages need some,
/// too.
const PARTS_AT_ONCE: usize = 2;

/// Where requests are stored, and until when.
#[derive(Clone, Copy)]
struct Target<'a> {
    store: &'a Store,
    most_pending: u64,
    deadline: Instant,
    waits_for_held: bool,
}

/// What became of a request. `None`: its message is held.
type Tried = Option<Result<Stored, NotStored>>;

impl Target<'_> {
    async fn store_all(self, requests: Vec<NewRequest>) -> Vec<SecondTry> {
        let mut requests: Vec<(usize, NewRequest)> = requests.into_iter().enumerate().collect();
        requests.sort_by_key(|(_, request)| request.message.digest());
        let (places, requests): (Vec<usize>, Vec<NewRequest>) = requests.into_iter().unzip();
        let tried = self.store_in_parts(&requests).await;
        let tried = requests.into_iter().zip(tried);
        let tried = tried.map(|(request, tried)| tried.map_or_else(|| SecondTry::Held(request), SecondTry::Done));
        let mut tried: Vec<(usize, SecondTry)> = places.into_iter().zip(tried).collect();
        tried.sort_unstable_by_key(|(place, _)| *place);
        tried.into_iter().map(|(_, tried)| tried).collect()
    }

    /// Stores requests, sorted by message, together, or else in parts. Those whose messages are held are stored message by message at once.
    fn store_in_parts<'b>(self, requests: &'b [NewRequest]) -> BoxFuture<'b, Vec<Tried>>
    where
        Self: 'b,
    {
        Box::pin(async move {
            let messages: Vec<&[NewRequest]> = requests.chunk_by(|one, next| one.message.digest() == next.message.digest()).collect();
            if messages.len() == 1 {
                return self.store_message(requests).await;
            }
            if !self.waits_for_held {
                match self.store(requests).await {
                    Err(error) if error.may_be_of_one_item() => {}
                    stored => return self.tried(stored, requests.len()),
                }
            }
            let in_a_part = if self.waits_for_held { 1 } else { messages.len().div_ceil(PARTS) };
            let mut rest = requests;
            let mut parts = Vec::new();
            for messages in messages.chunks(in_a_part) {
                let (part, others) = rest.split_at(messages.iter().map(|message| message.len()).sum());
                rest = others;
                parts.push(self.store_in_parts(part));
            }
            stream::iter(parts).buffered(PARTS_AT_ONCE).concat().await
        })
    }

    /// Stores the requests for one message. Who waited in vain for others to release it does not wait again for each request.
    async fn store_message(self, requests: &[NewRequest]) -> Vec<Tried> {
        match self.store(requests).await {
            Err(error) if requests.len() > 1 && error.may_be_of_one_item() && !matches!(error, StoreError::Contended(_)) => {
                let mut tried = Vec::with_capacity(requests.len());
                for request in requests.chunks(1) {
                    tried.extend(self.tried(self.store(request).await, 1));
                }
                tried
            }
            stored => self.tried(stored, requests.len()),
        }
    }

    async fn store(self, requests: &[NewRequest]) -> Result<Vec<Accepted>, StoreError> {
        if self.waits_for_held {
            before(self.deadline, self.store.accept(requests, self.most_pending)).await
        } else {
            before(self.deadline, self.store.accept_unless_held(requests, self.most_pending)).await
        }
    }

    /// What became of `count` requests that were stored together.
    fn tried(self, stored: Result<Vec<Accepted>, StoreError>, count: usize) -> Vec<Tried> {
        match stored {
            Ok(stored) => stored.into_iter().map(|accepted| Some(accepted.map_err(NotStored::Rejected))).collect(),
            Err(StoreError::Contended(_)) if !self.waits_for_held => vec![None; count],
            Err(error) => vec![Some(Err(not_stored(&error))); count],
        }
    }
}

/// Why requests are not stored, or may not be.
fn not_stored(error: &StoreError) -> NotStored {
    if let StoreError::Refused(_) | StoreError::NotAllowed(_) = error {
        tracing::error!(error = display_chain(error), "a request was refused");
        return NotStored::Unavailable;
    }
    warn(error);
    NotStored::Unknown
}

fn warn(error: &StoreError) {
    tracing::warn!(error = display_chain(error), "can't store requests");
}
