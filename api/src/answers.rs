//! Stores a request and waits for its outcome, within the time that the caller was promised.
//!
//! Only workers call the upstream; this side inserts, waits and reads. A waiter is registered before the insert. A wake-up is only a hint:
//! the row is always read again. In case a notification is lost, the row is also read when the time is up, and every [`LOOK_EVERY`] before
//! that; more often while notifications cannot arrive at all.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use shared::batch::{BatchError, Batcher, Batches, Callers};
use shared::contract::{SigningRequest, Status};
use shared::forecast::Place;
use shared::message::Message;
use shared::store::accept::{NewRequest, Stored};
use shared::store::keys::KeyId;
use shared::store::requests::RequestState;
use shared::store::{self, Store, StoreError};
use shared::telemetry::display_chain;
use time::OffsetDateTime;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::accept::{FirstTry, NotStored, STORE_WITHIN, SecondTry, store_held, store_known, store_new};
use crate::forecasts::Forecasts;
use crate::waiters::{Waiter, Waiters};

/// Maximum number of POSTs that one transaction stores, except of those whose message is held, and of requests that one statement reads.
/// With so many, the fixed cost of a batch is a sixth of it; where there are more, a second batch runs beside the first.
const LARGEST_GROUP: usize = 96;

/// A batch with this many items begins at once. With fewer, its fixed cost is the larger part of it.
const WORTHWHILE: usize = 16;

/// Number of batches that are stored, or read, at the same time.
const AT_ONCE: usize = 2;

/// Maximum number of queued reads, of callers that wait and of those that ask for a state; more are refused.
const MOST_READS: usize = 65_536;

/// Maximum number of queued POSTs; more are refused, because they could not be answered in time.
const MOST_WAITING: usize = 4096;

/// The longest that a read may take after the caller's time is up. After that, the answer is what is already known.
const READ_AFTERWARDS: Duration = Duration::from_millis(300);

/// When a POST that asked for no longer wait is answered, counted from its arrival: the longer storing took, the less time is left for
/// reading. The rest of the two seconds is a reserve for a machine that is busy with other work.
const ANSWER_WITHIN: Duration = Duration::from_millis(1800);

/// The longest that a read may take while there is time.
const READ_WITHIN: Duration = Duration::from_millis(1500);

/// How often a waiter reads on its own while notifications arrive.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How often it reads while reads fail, or notifications cannot arrive (Postgres restarts, or is behind a proxy that keeps no sessions): the
/// first and the longest pause.
const POLL_WITHOUT_NOTIFY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Why a request could not be read: Postgres is unavailable or too slow, or too many callers read.
pub type ReadError = BatchError<StoreError>;

/// The limits on what is accepted.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Maximum number of callers that wait at a time; others are answered at once.
    pub waiters: usize,
    /// Maximum number of unfinished requests; more are refused.
    pub pending: u64,
}

/// A stored request, and what is left to do for its answer.
pub struct Unanswered {
    /// The answer, unless waiting brings a newer state.
    known: SigningRequest,
    wait: Option<Wait>,
    /// Whether a requested wait is granted.
    pub may_wait: bool,
}

/// A wait for the outcome of a stored request. Small, because there are many waiters.
struct Wait {
    id: Uuid,
    waiter: Waiter,
    /// When the caller's wait ends.
    deadline: Instant,
    /// When reading ends; at least one read is attempted.
    latest: Instant,
    /// Whether the state cannot have changed before the first wake-up, so that the first read can wait for it.
    fresh: bool,
}

/// Stores requests, waits for their outcome, and reads their state.
pub struct Answers {
    store: Store,
    waiters: Waiters,
    new: Batcher<NewRequest, FirstTry, Infallible>,
    known: Batcher<NewRequest, SecondTry, Infallible>,
    held: Batcher<NewRequest, Result<Stored, NotStored>, Infallible>,
    reads: Batcher<Uuid, Option<Result<RequestState, StoreError>>, StoreError>,
    forecasts: Forecasts,
    bounds: Bounds,
    stop: CancellationToken,
}

impl Answers {
    /// Starts the tasks that store and read. Once `stop` is cancelled, no caller waits any longer: each is answered with the current state.
    #[must_use]
    pub fn new(store: Store, waiters: Waiters, bounds: Bounds, stop: CancellationToken) -> Self {
        let posts =
            Batches { largest: LARGEST_GROUP, worthwhile: WORTHWHILE, waiting: MOST_WAITING, at_once: AT_ONCE, callers: Callers::ComeBack };
        let looks = Batches { waiting: MOST_READS, callers: Callers::Leave, ..posts };
        let accepting = store.clone();
        let new = Batcher::spawn(posts, move |requests: Vec<NewRequest>| {
            let store = accepting.clone();
            async move { Ok(store_new(&store, requests, bounds.pending).await) }
        });
        let accepting = store.clone();
        let known = Batcher::spawn(posts, move |requests: Vec<NewRequest>| {
            let store = accepting.clone();
            async move { Ok(store_known(&store, requests, bounds.pending).await) }
        });
        let accepting = store.clone();
        // One batch at a time, because it keeps its connections while it waits; so it is larger.
        let held = Batches { largest: 4 * LARGEST_GROUP, at_once: 1, ..posts };
        let held = Batcher::spawn(held, move |requests: Vec<NewRequest>| {
            let store = accepting.clone();
            async move { Ok(store_held(&store, requests, bounds.pending).await) }
        });
        let reading = store.clone();
        let reads = Batcher::spawn(looks, move |ids: Vec<Uuid>| {
            let store = reading.clone();
            async move {
                let states = store::within(READ_WITHIN, store.requests(&ids)).await.inspect_err(|error| {
                    tracing::debug!(error = display_chain(error), "can't read the state of requests");
                })?;
                Ok(ids.iter().map(|id| states.get(id).map(copy)).collect())
            }
        });
        let forecasts = Forecasts::new(store.clone());
        Self { store, waiters, new, known, held, reads, forecasts, bounds, stop }
    }

    /// Stores `request`. Its [outcome](Self::outcome) can be waited for until `wait` after `arrived`.
    ///
    /// # Errors
    /// If it was not stored.
    pub async fn post(&self, request: NewRequest, arrived: Instant, wait: Duration) -> Result<Unanswered, NotStored> {
        let waiter = self.waiters.register(request.message.digest());
        let may_wait = self.may_wait();
        let wait = if may_wait { wait } else { Duration::ZERO };
        let receipt = Receipt::of(&request);
        let stored = timeout_at(arrived + STORE_WITHIN, self.accept(request)).await.map_err(|_| NotStored::Unknown)?;
        let Stored { id, created_at, settled, waiting } = stored?;
        let deadline = if settled { arrived } else { arrived + wait };
        // A caller that does not wait, and is the first to ask for this message, learns nothing more from a read.
        if let Some(waiting) = waiting
            && deadline <= Instant::now()
        {
            let place = self.forecasts.place(waiting, created_at).await;
            return Ok(Unanswered { known: receipt.pending(id, created_at, place), wait: None, may_wait });
        }
        let latest = arrived + ANSWER_WITHIN.max(wait + READ_AFTERWARDS);
        let wait = Wait { id, waiter, deadline, latest, fresh: !settled };
        Ok(Unanswered { known: receipt.pending(id, created_at, None), wait: Some(wait), may_wait })
    }

    async fn accept(&self, request: NewRequest) -> Result<Stored, NotStored> {
        match self.new.submit(request).await? {
            FirstTry::Stored(stored) => Ok(stored),
            FirstTry::Known(request) => match self.known.submit(request).await? {
                SecondTry::Done(stored) => stored,
                SecondTry::Held(request) => self.held.submit(request).await?,
            },
            FirstTry::Failed => Err(NotStored::Unknown),
        }
    }

    /// The state of a request once it is final, or when its time is up. `None` if the request is gone: it repeated an old one that was
    /// deleted at this moment.
    pub async fn outcome(&self, stored: Unanswered) -> Option<SigningRequest> {
        let Some(wait) = stored.wait else { return Some(stored.known) };
        // The request is stored: whatever has failed since, the caller gets a receipt.
        self.wait(wait).await.map_or(Some(stored.known), |state| state.map(|state| state.request))
    }

    /// The time from now until `then`, a time of Postgres's clock. Zero if it is over, or if this process has made no estimate yet.
    pub fn time_until(&self, then: OffsetDateTime) -> Duration {
        self.forecasts.now().and_then(|now| (then - now).try_into().ok()).unwrap_or_default()
    }

    /// Finds a request that `owner` may see (`None`: any request); its [state](Self::state) can be waited for. `None` if there is no such
    /// request.
    ///
    /// # Errors
    /// If Postgres is not available.
    pub async fn get(&self, id: Uuid, owner: Option<KeyId>, wait: Duration) -> Result<Option<Unanswered>, ReadError> {
        let deadline = Instant::now() + wait;
        let Some(first) = self.read(id, READ_WITHIN).await?.filter(|state| owner.is_none_or(|owner| owner == state.owner)) else {
            return Ok(None);
        };
        if first.request.status != Status::Pending || wait.is_zero() {
            return Ok(Some(Unanswered { known: first.request, wait: None, may_wait: true }));
        }
        let waiter = self.waiters.register(Message::new(first.request.message.clone()).digest());
        let may_wait = self.may_wait();
        if !may_wait {
            return Ok(Some(Unanswered { known: first.request, wait: None, may_wait }));
        }
        let wait = Wait { id, waiter, deadline, latest: deadline + READ_AFTERWARDS, fresh: false };
        Ok(Some(Unanswered { known: first.request, wait: Some(wait), may_wait }))
    }

    /// The state of a request once it is final, or when its time is up. `None` if the request is gone.
    ///
    /// # Errors
    /// If Postgres is not available.
    pub async fn state(&self, stored: Unanswered) -> Result<Option<SigningRequest>, ReadError> {
        let Some(wait) = stored.wait else { return Ok(Some(stored.known)) };
        Ok(self.wait(wait).await?.map(|state| state.request))
    }

    /// Whether a registered caller may wait: there may be too many waiters.
    fn may_wait(&self) -> bool {
        self.waiters.count() <= self.bounds.waiters
    }

    /// Reads until the state is final or the deadline has passed.
    async fn wait(&self, Wait { id, mut waiter, deadline, latest, fresh }: Wait) -> Result<Option<RequestState>, ReadError> {
        let left = || latest.saturating_duration_since(Instant::now());
        let mut poll = Poll::default();
        if fresh {
            self.hint(&mut waiter, deadline, &mut poll).await;
        }
        while Instant::now() < deadline && !self.stop.is_cancelled() {
            match self.read(id, READ_WITHIN.min(left())).await {
                Ok(Some(state)) if state.request.status == Status::Pending => self.hint(&mut waiter, deadline, &mut poll).await,
                Ok(ended) => return Ok(ended),
                // The wake-up that caused this read does not come again.
                Err(_) => {
                    let again = deadline.min(Instant::now() + poll.next());
                    self.stop.run_until_cancelled(tokio::time::sleep_until(again)).await;
                }
            }
        }
        self.read(id, READ_AFTERWARDS.min(left())).await
    }

    /// Waits for a reason to read again: a wake-up, the stop of the process, or the time for it.
    async fn hint(&self, waiter: &mut Waiter, deadline: Instant, poll: &mut Poll) {
        let pause = if self.store.is_listening() { LOOK_EVERY } else { poll.next() };
        tokio::select! {
            () = waiter.woken() => {}
            () = self.stop.cancelled() => {}
            () = tokio::time::sleep_until(deadline.min(Instant::now() + pause)) => {}
        }
    }

    /// The state of one request, read together with those that others ask for at the same time.
    async fn read(&self, id: Uuid, within: Duration) -> Result<Option<RequestState>, ReadError> {
        let read = async {
            let Some(state) = self.reads.submit(id).await? else { return Ok(None) };
            let mut state = state.map_err(|error| ReadError::Failed(Arc::new(error)))?;
            if let Some(waiting) = state.waiting {
                let next = state.request.next_attempt_at.unwrap_or(state.request.created_at);
                let place = self.forecasts.place(waiting, state.request.created_at).await.unwrap_or(unknown(next));
                state.request.queue_position = Some(place.position);
                // The place is reckoned from a snapshot, which is a little older than the state.
                state.request.estimated_completion_at = Some(place.expected_at.max(next));
                state.request.next_attempt_at = Some(place.not_before.max(next));
                state.request.status_url = Some(status_url(id));
            }
            Ok(Some(state))
        };
        tokio::time::timeout(within, read).await.unwrap_or(Err(ReadError::Failed(Arc::new(StoreError::TimedOut))))
    }
}

/// A copy of what was read, for one of those who asked for it. That it can't be read is logged.
fn copy(state: &Result<RequestState, StoreError>) -> Result<RequestState, StoreError> {
    match state {
        Ok(state) => Ok(state.clone()),
        Err(error) => {
            tracing::error!(error = display_chain(error), "a request can't be read");
            Err(StoreError::Corrupt("request"))
        }
    }
}

/// The pauses of one waiter between reads that are not caused by a notification: each is longer than the last.
struct Poll(Duration);

impl Default for Poll {
    fn default() -> Self {
        Self(POLL_WITHOUT_NOTIFY.0)
    }
}

impl Poll {
    fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = pause.mul_f64(1.5).min(POLL_WITHOUT_NOTIFY.1);
        pause
    }
}

/// The path that returns the state of a request.
#[must_use]
pub fn status_url(id: Uuid) -> String {
    format!("/crypto/sign/{id}")
}

/// A placeholder for a place that could not be found out in time; `next` is when the job may be tried.
fn unknown(next: OffsetDateTime) -> Place {
    Place { position: 1, expected_at: next, not_before: next }
}

/// The part of a receipt that is known without reading the request.
struct Receipt {
    message: String,
    client_request_id: Option<String>,
}

impl Receipt {
    fn of(request: &NewRequest) -> Self {
        Self { message: request.message.text().to_owned(), client_request_id: request.client_request_id.clone() }
    }

    fn pending(self, id: Uuid, created_at: OffsetDateTime, place: Option<Place>) -> SigningRequest {
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
            next_attempt_at: Some(place.not_before.max(created_at)),
            queue_position: Some(place.position),
            estimated_completion_at: Some(place.expected_at),
            status_url: Some(status_url(id)),
            last_error: None,
            webhook: None,
        }
    }
}
