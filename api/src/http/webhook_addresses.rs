//! Where webhooks may go, as far as this process can tell: by its own settings, and by those of the worker that started last. The latter
//! are read only when its own settings refuse an address.

use std::time::Duration;

use shared::address_guard::{AddressSettings, Forbidden, Guard};
use shared::store::{self, Store};
use shared::telemetry::display_chain;
use url::Url;

use super::problem::ApiError;

/// How long Postgres may take to return what workers allow.
const ASK_WITHIN: Duration = Duration::from_millis(300);

/// Where webhooks may go.
pub struct WebhookAddresses {
    own: Guard,
    store: Store,
}

impl WebhookAddresses {
    /// Uses these settings, and those in `store`.
    #[must_use]
    pub fn new(settings: &AddressSettings, store: Store) -> Self {
        Self { own: Guard::new(settings), store }
    }

    /// Whether a webhook may be sent to `url`. Until the first worker has started, perhaps a moment after this process, any address and any
    /// port are allowed: the worker checks every address before it sends.
    ///
    /// # Errors
    /// `Unavailable` if only a worker can allow the address, and Postgres does not return what workers allow.
    pub(super) async fn judge(&self, url: &Url) -> Result<Result<(), Forbidden>, ApiError> {
        let judged = self.own.check(url);
        if !matches!(judged, Err(Forbidden::Port | Forbidden::Address)) {
            return Ok(judged);
        }
        let allowed = store::within(ASK_WITHIN, self.store.webhook_addresses()).await.map_err(|error| {
            tracing::warn!(error = display_chain(&error), "can't ask where workers send webhooks");
            ApiError::Unavailable
        })?;
        Ok(allowed.map_or(Ok(()), |allowed| self.own.allowing_also(&allowed).check(url)))
    }
}
