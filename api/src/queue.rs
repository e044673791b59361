//! The last look at the queue, shared by all who ask for their place soon after one another.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use shared::forecast::{Forecast, Place, Waiting};
use shared::store::Store;
use shared::store::low_water::Marks;
use time::OffsetDateTime;
use tokio::time::Instant;

/// How long a look is good for. The queue moves as slowly as the upstream signs.
const GOOD_FOR: Duration = Duration::from_millis(250);

/// A look that takes longer than this is good for so many times as long, lest looking becomes what the service does: each process looks for
/// itself, so it adds up. And nobody waits for the next one. A short queue is looked at more often: there, a place is worth more.
const QUICK: Duration = Duration::from_millis(5);
const ONE_IN: u32 = 100;
const ONE_IN_OF_SHORT: u32 = 10;

/// Nothing is said by a look that is older, however long the next one takes. That one begins at half of this age, so that it is there in time.
const TOO_OLD: Duration = Duration::from_secs(4);

/// How long somebody waits for a look.
const LOOK_WITHIN: Duration = Duration::from_millis(200);

/// In a queue of this length, those that came since the last look are few beside those that it saw.
const LONG: u32 = 2000;

/// What was seen, when, and how long it took.
struct Look {
    forecast: Forecast,
    at: Instant,
    took: Duration,
}

impl Look {
    /// Whether it says enough about what was stored at `since`.
    fn is_good(&self, since: OffsetDateTime) -> bool {
        let (age, is_long) = (self.at.elapsed(), self.forecast.length() >= LONG);
        let one_in = if is_long { ONE_IN } else { ONE_IN_OF_SHORT };
        self.was_slow() && age < (self.took * one_in).min(TOO_OLD / 2) || age < GOOD_FOR && (self.forecast.at >= since || is_long)
    }

    fn was_slow(&self) -> bool {
        self.took > QUICK
    }
}

/// Looks at the queue, seldom. Clones share the last look.
#[derive(Clone)]
pub struct Queue {
    store: Store,
    marks: Marks,
    last: Arc<Mutex<Option<Look>>>,
    looking: Arc<tokio::sync::Mutex<()>>,
}

impl Queue {
    /// A queue that nobody has looked at yet.
    #[must_use]
    pub fn new(store: Store) -> Self {
        let marks = Marks::new(store.clone(), Arc::default());
        Self { store, marks, last: Arc::default(), looking: Arc::default() }
    }

    /// The place of what was stored at `since`, by a look that is not much older. Of many who ask at once, one looks and the others wait
    /// for it. Nothing, if Postgres is not available or not fast: without a place, an answer is as true as with one.
    pub async fn place(&self, waiting: Waiting, since: OffsetDateTime) -> Option<Place> {
        if let Some(place) = self.seen(waiting, |look| look.is_good(since)) {
            return Some(place);
        }
        if let Some(place) = self.seen(waiting, |look| look.was_slow() && look.at.elapsed() < TOO_OLD) {
            let queue = self.clone();
            tokio::spawn(async move {
                if let Ok(_alone) = queue.looking.try_lock() {
                    queue.look().await;
                }
            });
            return Some(place);
        }
        // It goes on when nobody waits for it any more: somebody will ask soon, and then it is there.
        let queue = self.clone();
        let look = tokio::spawn(async move {
            let _alone = queue.looking.lock().await;
            if queue.seen(waiting, |look| look.is_good(since)).is_none() {
                queue.look().await;
            }
        });
        tokio::time::timeout(LOOK_WITHIN, look).await.ok()?.ok()?;
        self.seen(waiting, |look| look.at.elapsed() < GOOD_FOR)
    }

    /// The place by the last look, if that is as is wanted.
    fn seen(&self, waiting: Waiting, wanted: impl FnOnce(&Look) -> bool) -> Option<Place> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref().filter(|look| wanted(look)).map(|look| look.forecast.place(waiting))
    }

    async fn look(&self) {
        let (asked, mut look) = (Instant::now(), self.marks.look());
        if let Ok((forecast, reached)) = self.store.forecast(look.from()).await {
            look.has_reached(reached);
            let look = Look { forecast, at: Instant::now(), took: asked.elapsed() };
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(look);
        }
    }
}
