//! Where webhooks may go, as far as this process can say: by its own settings, and by those of the worker that started last, which is asked
//! for only when the own ones refuse an address.

use std::time::Duration;

use shared::address_guard::{AddressSettings, Forbidden, Guard};
use shared::store::{Store, StoreError};
use shared::telemetry::display_chain;
use url::Url;

use super::problem::ApiError;

/// How long Postgres may take to say what workers allow.
const ASK_WITHIN: Duration = Duration::from_millis(300);

/// Where webhooks may go.
pub struct Receivers {
    settings: AddressSettings,
    own: Guard,
    store: Store,
}

impl Receivers {
    /// By these settings, and those that are in `store`.
    #[must_use]
    pub fn new(settings: AddressSettings, store: Store) -> Self {
        Self { own: Guard::new(&settings), settings, store }
    }

    /// Whether a webhook may be sent to `url`. Before the first worker has started, perhaps a moment after this process, everything may: the
    /// worker judges every address before it sends.
    ///
    /// # Errors
    /// `Unavailable` if only a worker can allow it, and Postgres does not say what workers allow.
    pub(super) async fn judge(&self, url: &Url) -> Result<Result<(), Forbidden>, ApiError> {
        let judged = self.own.check(url);
        if !matches!(judged, Err(Forbidden::Port | Forbidden::Address)) {
            return Ok(judged);
        }
        let asked = tokio::time::timeout(ASK_WITHIN, self.store.webhook_addresses()).await;
        let allowed = asked.unwrap_or_else(|_| Err(StoreError::TimedOut)).map_err(|error| {
            tracing::warn!(error = display_chain(&error), "can't ask where workers send webhooks");
            ApiError::Unavailable
        })?;
        Ok(Guard::new(&self.settings.with(&allowed.unwrap_or_else(AddressSettings::everything))).check(url))
    }
}
