//! Claims that skip what is already leased or done: see [`low_water`](shared::store::low_water).

use std::time::Duration;

use shared::store::low_water::Marks;
use shared::store::sign_claim::SignJob;
use shared::store::{Claimed, Store, StoreError};
use shared::units::Rate;

/// Claims sign jobs for one process.
pub struct Claims {
    store: Store,
    marks: Marks,
    rate: Rate,
    lease: Duration,
}

impl Claims {
    /// Creates claims with a budget of `rate`, each for a lease of length `lease`.
    #[must_use]
    pub fn new(store: Store, marks: Marks, rate: Rate, lease: Duration) -> Self {
        Self { store, marks, rate, lease }
    }

    /// Whether notifications of new jobs currently arrive.
    #[must_use]
    pub fn is_listening(&self) -> bool {
        self.store.is_listening()
    }

    /// Claims up to `most` jobs.
    ///
    /// # Errors
    /// If the statement fails.
    pub async fn claim(&self, most: usize) -> Result<Claimed<SignJob>, StoreError> {
        let mut scan = self.marks.scan();
        let (mut claimed, reached) = self.store.claim_sign_jobs(most, self.lease, self.rate, scan.start()).await?;
        scan.reached(reached);
        if !scan.is_full() && claimed.jobs.len() < most {
            // There may be something behind the mark.
            claimed.look_again_in = self.marks.next_full_scan_in();
        }
        Ok(claimed)
    }
}
