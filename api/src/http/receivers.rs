//! Where webhooks may go, as far as this process can say: by its own settings, and by those of the worker that started last, which is asked
//! for only when the own ones refuse an address.

use std::time::Duration;

use shared::address_guard::{AddressSettings, Guard};
use shared::store::{Store, StoreError};

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

    /// By the own settings.
    pub(super) fn known(&self) -> &Guard {
        &self.own
    }

    /// By what a worker allows as well; nothing if that can't be had, and so nobody can say that an address is refused. Nor can anybody before the
    /// first worker has started, perhaps a moment after this process: the one that sends judges every address in any case.
    pub(super) async fn asked(&self) -> Option<Guard> {
        let asked = tokio::time::timeout(ASK_WITHIN, self.store.webhook_addresses()).await;
        let allowed = asked.unwrap_or_else(|_| Err(StoreError::timed_out()));
        let allowed = allowed.inspect_err(|error| tracing::warn!(%error, "can't ask where workers send webhooks")).ok()?;
        Some(Guard::new(&self.settings.with(&allowed.unwrap_or_else(AddressSettings::everything))))
    }
}
