//! Stores a request and waits for its outcome, within the time that the caller was promised.
//!
//! Only workers call the upstream; this side inserts, waits and reads. A waiter is registered before the insert, and what wakes it is
//! never believed: the row is read again. Should no notification come, the row is read once more when the time is up, and every
//! [`LOOK_EVERY`] before that; where none can come at all, more often.

use std::sync::Arc;
use std::time::Duration;

use shared::batch::{BatchError, Batcher, Batches, Callers};
use shared::contract::{SigningRequest, Status};
use shared::forecast::Place;
use shared::message::Message;
use shared::store::accept::{Accepted, NewRequest};
use shared::store::keys::KeyId;
use shared::store::requests::RequestState;
use shared::store::{Store, StoreError};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::accept::{NotStored, STORE_WITHIN, store_all, warn};
use crate::queue::Queue;
use crate::waiters::{Waiter, Waiters};

/// Most POSTs that are stored in one transaction, and most requests that are read by one statement.
const LARGEST_GROUP: usize = 256;

/// Groups that are stored, or read, at the same time.
const AT_ONCE: usize = 2;

/// Most reads that wait for their turn: one for each caller that may wait, and those that ask.
const MOST_READS: usize = 65_536;

/// Most POSTs that wait to be stored; more are refused, because they would not be answered in time.
const MOST_WAITING: usize = 4096;

/// The longest that reading may go on after the caller's time is up. Beyond, the answer is what is known.
const READ_AFTERWARDS: Duration = Duration::from_millis(300);

/// A POST that asked for no longer wait is answered by then, counted from its arrival: the more time storing took, the less is left for
/// reading. The rest of two seconds is for a machine that has other things to do as well.
const ANSWER_WITHIN: Duration = Duration::from_millis(1800);

/// The longest that a read may take when there is time.
const READ_WITHIN: Duration = Duration::from_millis(1500);

/// The pause after a read that failed, while there is time for another.
const READ_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// How often a waiter looks by itself while notifications arrive.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How soon it looks while none can arrive (Postgres restarts, or is behind a proxy that keeps no sessions), at first and at last.
const POLL_WITHOUT_NOTIFY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Why a request could not be read: Postgres is not available, or not fast enough.
pub type ReadError = BatchError<StoreError>;

/// How much is taken on.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Most callers that wait at a time; more are answered at once.
    pub waiters: usize,
    /// Most unfinished requests; more are refused.
    pub pending: u64,
}

/// A request that is stored, and what is left to do for its answer.
pub struct Stored {
    /// The answer, unless something is learned while it is waited for.
    known: SigningRequest,
    wait: Option<Wait>,
    /// Whether a wait that was asked for is granted.
    pub may_wait: bool,
}

/// Waiting for a request that is stored. Small: there are many who wait.
struct Wait {
    id: Uuid,
    waiter: Waiter,
    /// Waited for until then.
    deadline: Instant,
    /// Read until then, but at least once.
    latest: Instant,
    /// Nothing can have changed before the first wake-up, so the first read can wait for it.
    fresh: bool,
}

/// Stores, waits, reads.
pub struct Answers {
    store: Store,
    waiters: Waiters,
    accepts: Batcher<NewRequest, Result<Accepted, NotStored>, StoreError>,
    reads: Batcher<Uuid, Option<RequestState>, StoreError>,
    queue: Queue,
    bounds: Bounds,
    stop: CancellationToken,
}

impl Answers {
    /// Starts the task that stores. Once `stop` is cancelled nobody waits any more: who does is answered with the state as it is.
    #[must_use]
    pub fn new(store: Store, waiters: Waiters, bounds: Bounds, stop: CancellationToken) -> Self {
        let posts = Batches { largest: LARGEST_GROUP, waiting: MOST_WAITING, at_once: AT_ONCE, callers: Callers::ComeBack };
        let looks = Batches { waiting: MOST_READS, callers: Callers::Leave, ..posts };
        let accepting = store.clone();
        let accepts = Batcher::spawn(posts, move |requests: Vec<NewRequest>| {
            let store = accepting.clone();
            // A group whose callers have all been told 503 must not go on in the dark, and must not keep the next one waiting.
            async move { store_all(&store, requests, bounds.pending).await.inspect_err(warn) }
        });
        let reading = store.clone();
        let reads = Batcher::spawn(looks, move |ids: Vec<Uuid>| {
            let store = reading.clone();
            async move {
                let read = tokio::time::timeout(READ_WITHIN, store.requests(&ids)).await;
                let states = read.unwrap_or_else(|_| Err(StoreError::TimedOut))?;
                Ok(ids.iter().map(|id| states.get(id).cloned()).collect())
            }
        });
        let queue = Queue::new(store.clone());
        Self { store, waiters, accepts, reads, queue, bounds, stop }
    }

    /// Stores `request`; its [outcome](Self::outcome) can be waited for until `wait` after `arrived`.
    ///
    /// # Errors
    /// If it was not stored.
    pub async fn post(&self, request: NewRequest, arrived: Instant, wait: Duration) -> Result<Stored, NotStored> {
        let waiter = self.waiters.register(request.message.digest());
        let may_wait = self.may_wait();
        let wait = if may_wait { wait } else { Duration::ZERO };
        let receipt = Receipt::of(&request);
        let stored = timeout_at(arrived + STORE_WITHIN, self.accepts.submit(request)).await;
        let (id, created_at, settled, waiting) = match stored {
            Ok(Ok(Ok(Accepted::Stored { id, created_at, settled, waiting }))) => (id, created_at, settled, waiting),
            Ok(Ok(Ok(Accepted::Mismatch))) => return Err(NotStored::Mismatch),
            Ok(Ok(Ok(Accepted::Full))) => return Err(NotStored::Full),
            Ok(Ok(Ok(Accepted::Collision))) => return Err(NotStored::Refused),
            Ok(Ok(Err(reason))) => return Err(reason),
            Ok(Err(BatchError::Full | BatchError::Stopped | BatchError::Failed(_))) | Err(_) => return Err(NotStored::Unavailable),
        };
        let deadline = if settled { arrived } else { arrived + wait };
        // Who does not wait, and is the first to ask for this message, learns nothing more by reading.
        if let Some(waiting) = waiting
            && deadline <= Instant::now()
        {
            let place = self.queue.place(waiting, created_at).await;
            return Ok(Stored { known: receipt.pending(id, created_at, place), wait: None, may_wait });
        }
        let latest = arrived + ANSWER_WITHIN.max(wait + READ_AFTERWARDS);
        let wait = Wait { id, waiter, deadline, latest, fresh: !settled };
        Ok(Stored { known: receipt.pending(id, created_at, None), wait: Some(wait), may_wait })
    }

    /// The state of a request once it is final, or when its time is up. `None` if it is gone: it is a repetition of one that was old enough to be
    /// deleted in this moment.
    pub async fn outcome(&self, stored: Stored) -> Option<SigningRequest> {
        let Some(wait) = stored.wait else { return Some(stored.known) };
        // It is stored: whatever else happened since, the caller gets a receipt.
        self.wait(wait).await.map_or(Some(stored.known), |state| state.map(|state| state.request))
    }

    /// A request that `owner` (nothing: everybody) may see, whose [state](Self::state) can be waited for; nothing if there is none.
    ///
    /// # Errors
    /// If Postgres is not available.
    pub async fn get(&self, id: Uuid, owner: Option<KeyId>, wait: Duration) -> Result<Option<Stored>, ReadError> {
        let deadline = Instant::now() + wait;
        let Some(first) = self.read(id, READ_WITHIN).await?.filter(|state| owner.is_none_or(|owner| owner == state.owner)) else {
            return Ok(None);
        };
        let digest = Message::new(first.request.message.clone()).digest();
        let waiter = self.waiters.register(digest);
        let may_wait = self.may_wait();
        if first.request.status != Status::Pending || wait.is_zero() || !may_wait {
            return Ok(Some(Stored { known: first.request, wait: None, may_wait }));
        }
        let wait = Wait { id, waiter, deadline, latest: deadline + READ_AFTERWARDS, fresh: false };
        Ok(Some(Stored { known: first.request, wait: Some(wait), may_wait }))
    }

    /// The state of a request once it is final, or when its time is up; nothing if it is gone.
    ///
    /// # Errors
    /// If Postgres is not available.
    pub async fn state(&self, stored: Stored) -> Result<Option<SigningRequest>, ReadError> {
        let Some(wait) = stored.wait else { return Ok(Some(stored.known)) };
        Ok(self.wait(wait).await?.map(|state| state.request))
    }

    /// Whether a caller that is registered may wait: there may be too many.
    fn may_wait(&self) -> bool {
        self.waiters.count() <= self.bounds.waiters
    }

    /// Reads until the state is final or the deadline has come.
    async fn wait(&self, Wait { id, mut waiter, deadline, latest, mut fresh }: Wait) -> Result<Option<RequestState>, ReadError> {
        let mut deaf = POLL_WITHOUT_NOTIFY.0;
        loop {
            let over = Instant::now() >= deadline || self.stop.is_cancelled();
            if over || !fresh {
                let left = latest.saturating_duration_since(Instant::now());
                match self.read(id, if over { READ_AFTERWARDS.min(left) } else { READ_WITHIN.min(left) }).await {
                    Ok(state) if over || state.as_ref().is_none_or(|state| state.request.status != Status::Pending) => return Ok(state),
                    Err(error) if over => return Err(error),
                    Ok(_) => {}
                    Err(_) => tokio::time::sleep_until(deadline.min(Instant::now() + READ_AGAIN_AFTER)).await,
                }
            }
            fresh = false;
            let pause = if self.store.is_listening() { LOOK_EVERY } else { deaf };
            deaf = deaf.mul_f64(1.5).min(POLL_WITHOUT_NOTIFY.1);
            tokio::select! {
                () = waiter.woken() => {}
                () = self.stop.cancelled() => {}
                () = tokio::time::sleep_until(deadline.min(Instant::now() + pause)) => {}
            }
        }
    }

    /// The state of one request, read together with those that others ask for at this moment.
    async fn read(&self, id: Uuid, within: Duration) -> Result<Option<RequestState>, ReadError> {
        let read = async {
            let Some(mut state) = self.reads.submit(id).await? else { return Ok(None) };
            if let Some(waiting) = state.waiting {
                let place = self.queue.place(waiting, state.request.created_at).await;
                let place = place.unwrap_or(unknown(state.request.next_attempt_at.unwrap_or(state.request.created_at)));
                state.request.queue_position = Some(place.position);
                state.request.estimated_completion_at = Some(place.expected_at);
                state.request.status_url = Some(status_url(id));
            }
            Ok(Some(state))
        };
        tokio::time::timeout(within, read).await.unwrap_or(Err(ReadError::Failed(Arc::new(StoreError::TimedOut))))
    }
}

/// Where to ask for the state of a request.
#[must_use]
pub fn status_url(id: Uuid) -> String {
    format!("/crypto/sign/{id}")
}

/// What is said of a place in the queue that could not be had in time; `next` is when the job may be tried.
fn unknown(next: time::OffsetDateTime) -> Place {
    Place { position: 1, expected_at: next }
}

/// What a receipt says of a request, and is known without reading it.
struct Receipt {
    message: String,
    client_request_id: Option<String>,
}

impl Receipt {
    fn of(request: &NewRequest) -> Self {
        Self { message: request.message.text().to_owned(), client_request_id: request.client_request_id.clone() }
    }

    fn pending(self, id: Uuid, created_at: time::OffsetDateTime, place: Option<Place>) -> SigningRequest {
        let place = place.unwrap_or(unknown(created_at));
        SigningRequest {
            id,
            status: Status::Pending,
            message: self.message,
            signature: None,
            client_request_id: self.client_request_id,
            attempts: 0,
            created_at,
            signed_at: None,
            failed_at: None,
            next_attempt_at: Some(created_at),
            queue_position: Some(place.position),
            estimated_completion_at: Some(place.expected_at),
            status_url: Some(status_url(id)),
            last_error: None,
            webhook: None,
        }
    }
}
