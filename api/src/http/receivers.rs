//! Where webhooks may go, as far as this process can say: by its own settings, and by those of the worker that started last, which is asked
//! for only when the own ones refuse an address.

use std::time::Duration;

use shared::address_guard::{AddressSettings, Guard};
use shared::store::Store;

/// How long Postgres may take to say what workers allow; beyond, the own settings decide.
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

    /// By what a worker allows as well.
    pub(super) async fn asked(&self) -> Guard {
        match tokio::time::timeout(ASK_WITHIN, self.store.webhook_addresses()).await {
            Ok(Ok(allowed)) => Guard::new(&self.settings.with(&allowed)),
            Ok(Err(error)) => {
                tracing::warn!(%error, "can't ask where workers send webhooks");
                self.own.clone()
            }
            Err(_) => self.own.clone(),
        }
    }
}
