//! The last look at the queue, shared by all who ask for their place soon after one another.

use std::sync::Arc;
use std::time::Duration;

use shared::forecast::Forecast;
use shared::store::{Store, StoreError};
use time::OffsetDateTime;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// How long a look is good for. The queue moves as slowly as the upstream signs.
const GOOD_FOR: Duration = Duration::from_millis(250);

/// What was seen, and when.
type Look = (Instant, Arc<Forecast>);

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

    /// A look at the queue that was taken after `since`, so that it holds what was stored until then. Of many who ask at once, one
    /// looks and the others wait for it.
    ///
    /// # Errors
    /// If Postgres is not available.
    pub async fn forecast(&self, since: OffsetDateTime) -> Result<Arc<Forecast>, StoreError> {
        let mut last = self.last.lock().await;
        if let Some((looked, forecast)) = &*last
            && looked.elapsed() < GOOD_FOR
            && forecast.at >= since
        {
            return Ok(Arc::clone(forecast));
        }
        let forecast = Arc::new(self.store.forecast().await?);
        *last = Some((Instant::now(), Arc::clone(&forecast)));
        Ok(forecast)
    }
}
