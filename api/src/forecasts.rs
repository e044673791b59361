//! Forecasts from a snapshot of the queue, shared by all callers that ask for their place within a short time.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use shared::forecast::{Forecast, Place, Waiting};
use shared::store::low_water::Marks;
use shared::store::server_time::ServerTime;
use shared::store::{Store, within};
use time::OffsetDateTime;
use tokio::time::Instant;

/// How long a snapshot is valid. The queue moves only as fast as the upstream signs.
const GOOD_FOR: Duration = Duration::from_millis(250);

/// A snapshot that took longer than this is valid for `ONE_IN` times as long, at most half of `TOO_OLD`, and no caller waits for the next
/// one. Unless that limit applies, snapshots take at most one hundredth of the time (each process takes its own, so it adds up). A short
/// queue is read more often, because a place is worth more there.
const QUICK: Duration = Duration::from_millis(5);
const ONE_IN: u32 = 100;
const ONE_IN_OF_SHORT: u32 = 10;

/// An older snapshot is not used, however long the next one takes. The next one is started at half of this age, to be ready in time.
const TOO_OLD: Duration = Duration::from_secs(4);

/// How long a caller waits for a snapshot.
const WAIT_WITHIN: Duration = Duration::from_millis(200);

/// The longest that reading the queue may take. After that, the connection is taken for dead: the host may have vanished.
const READ_WITHIN: Duration = Duration::from_secs(4);

/// In a queue of this length, the jobs that arrived since the last snapshot are few compared with all the others.
const LONG: u32 = 2000;

/// The queue at one moment, and how long it took to read.
struct Snapshot {
    forecast: Forecast,
    clock: ServerTime,
    at: Instant,
    took: Duration,
}

impl Snapshot {
    /// Whether the snapshot is good enough for a request that was stored at `since`.
    fn is_good(&self, since: OffsetDateTime) -> bool {
        let (age, is_long) = (self.at.elapsed(), self.forecast.length() >= LONG);
        let one_in = if is_long { ONE_IN } else { ONE_IN_OF_SHORT };
        let too_dear_to_read_again = self.was_slow() && age < (self.took * one_in).min(TOO_OLD / 2);
        let holds_the_request = self.forecast.at >= since || is_long;
        too_dear_to_read_again || age < GOOD_FOR && holds_the_request
    }

    fn was_slow(&self) -> bool {
        self.took > QUICK
    }
}

/// The queue, read rarely. Clones share the last snapshot.
#[derive(Clone)]
pub struct Forecasts {
    store: Store,
    marks: Marks,
    last: Arc<Mutex<Option<Snapshot>>>,
    reading: Arc<tokio::sync::Mutex<()>>,
}

impl Forecasts {
    /// Nothing has been read yet.
    #[must_use]
    pub fn new(store: Store) -> Self {
        let marks = Marks::new(store.clone(), Arc::default());
        Self { store, marks, last: Arc::default(), reading: Arc::default() }
    }

    /// The place of a request that was stored at `since`, from a snapshot that is not much older. Of many concurrent callers, one reads and
    /// the others wait for it. `None` if Postgres is unavailable or slow: an answer without a place is still correct.
    pub async fn place(&self, waiting: Waiting, since: OffsetDateTime) -> Option<Place> {
        if let Some(place) = self.seen(waiting, |snapshot| snapshot.is_good(since)) {
            return Some(place);
        }
        if let Some(place) = self.seen(waiting, |snapshot| snapshot.was_slow() && snapshot.at.elapsed() < TOO_OLD) {
            let forecasts = self.clone();
            tokio::spawn(async move {
                if let Ok(_alone) = forecasts.reading.try_lock() {
                    forecasts.refresh().await;
                }
            });
            return Some(place);
        }
        // A task that reads continues when its caller gives up: another caller will soon need the snapshot. One that only waits ends.
        let forecasts = self.clone();
        let read = tokio::spawn(async move {
            let Ok(_alone) = tokio::time::timeout(WAIT_WITHIN, forecasts.reading.lock()).await else { return };
            if forecasts.seen(waiting, |snapshot| snapshot.is_good(since)).is_none() {
                forecasts.refresh().await;
            }
        });
        tokio::time::timeout(WAIT_WITHIN, read).await.ok()?.ok()?;
        self.seen(waiting, |snapshot| snapshot.at.elapsed() < GOOD_FOR)
    }

    /// Postgres's clock, by which the estimates are made. `None` before the first snapshot.
    pub fn now(&self) -> Option<OffsetDateTime> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref().map(|snapshot| snapshot.clock.now())
    }

    /// The place in the last snapshot. `None` if there is no snapshot or it is not `good`.
    fn seen(&self, waiting: Waiting, good: impl FnOnce(&Snapshot) -> bool) -> Option<Place> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref().filter(|snapshot| good(snapshot)).map(|snapshot| snapshot.forecast.place(waiting))
    }

    async fn refresh(&self) {
        let (asked, mut scan) = (Instant::now(), self.marks.scan());
        if let Ok((forecast, reached)) = within(READ_WITHIN, self.store.forecast(scan.start())).await {
            scan.reached(reached);
            let clock = ServerTime::heard(forecast.at);
            let snapshot = Snapshot { forecast, clock, at: Instant::now(), took: asked.elapsed() };
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(snapshot);
        }
    }
}
