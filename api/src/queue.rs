//! The last look at the queue, shared by all who ask for their place soon after one another.

use std::sync::Arc;
use std::time::Duration;

use shared::forecast::{Forecast, Place, Waiting};
use shared::store::Store;
use time::OffsetDateTime;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// How long a look is good for. The queue moves as slowly as the upstream signs.
const GOOD_FOR: Duration = Duration::from_millis(250);

/// How long a look may take.
const LOOK_WITHIN: Duration = Duration::from_millis(200);

/// In a queue of this length, those that came since the last look are few beside those that it saw.
const LONG: u32 = 2000;

/// What was seen, and when.
type Look = (Instant, Forecast);

/// Looks at the queue, seldom. Clones share the last look.
#[derive(Clone)]
pub struct Queue {
    store: Store,
    last: Arc<Mutex<Option<Look>>>,
}

impl Queue {
    /// A queue that nobody has looked at yet.
    #[must_use]
    pub fn new(store: Store) -> Self {
        Self { store, last: Arc::default() }
    }

    /// The place of what was stored at `since`, by a look that is not much older. Of many who ask at once, one looks and the others wait
    /// for it. Nothing, if Postgres is not available or not fast: without a place, an answer is as true as with one.
    pub async fn place(&self, waiting: Waiting, since: OffsetDateTime) -> Option<Place> {
        tokio::time::timeout(LOOK_WITHIN, self.look(waiting, since)).await.ok().flatten()
    }

    async fn look(&self, waiting: Waiting, since: OffsetDateTime) -> Option<Place> {
        let mut last = self.last.lock().await;
        if let Some((looked, forecast)) = &*last
            && looked.elapsed() < GOOD_FOR
            && (forecast.at >= since || forecast.length() >= LONG)
        {
            return Some(forecast.place(waiting));
        }
        let forecast = self.store.forecast().await.ok()?;
        let place = forecast.place(waiting);
        *last = Some((Instant::now(), forecast));
        Some(place)
    }
}
