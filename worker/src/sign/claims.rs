//! Claims that step over what is leased or done already.
//!
//! The index of the queue begins with what is leased at present, and with what was done and no vacuum has taken away. A claim need not look
//! there again and again: the last one says how far it came ([`LowWater`]). But now and then a job appears before that point, so every so
//! often a claim looks at all: as soon as one that did not finds nothing, and whenever that takes no more than a share of the time. That is
//! always, while it is quick; and seldom enough not to matter, while some transaction holds back the vacuum and it takes a second.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use shared::store::sign_claim::{LowWater, SignJob};
use shared::store::{Claimed, Store, StoreError};
use shared::units::Rate;

/// Looking at all takes no more than this share of the time.
const ONE_IN: u32 = 10;

/// Claims for one process.
pub struct Claims {
    store: Store,
    rate: Rate,
    lease: Duration,
    come: Mutex<Come>,
}

/// How far, and when all may be looked at again.
#[derive(Clone, Copy, Debug)]
struct Come {
    mark: LowWater,
    all_again: Instant,
}

impl Claims {
    /// Claims with a budget of `rate`, for `lease`.
    #[must_use]
    pub fn new(store: Store, rate: Rate, lease: Duration) -> Self {
        Self { store, rate, lease, come: Mutex::new(Come { mark: LowWater::default(), all_again: Instant::now() }) }
    }

    /// Claims up to `most` jobs.
    ///
    /// # Errors
    /// Those of the statement.
    pub async fn claim(&self, most: usize) -> Result<Claimed<SignJob>, StoreError> {
        let Come { mark, all_again } = *self.come.lock().unwrap_or_else(PoisonError::into_inner);
        let asked = Instant::now();
        let all = all_again <= asked;
        let from = if all { LowWater::default() } else { mark };
        let (mut claimed, reached) = self.store.claim_sign_jobs(most, self.lease, self.rate, from).await?;
        let mut come = self.come.lock().unwrap_or_else(PoisonError::into_inner);
        if all {
            *come = Come { mark: reached, all_again: Instant::now() + asked.elapsed() * ONE_IN };
        } else {
            come.mark = reached;
            if claimed.jobs.is_empty() {
                // There may be something where it did not look.
                let wait = come.all_again.saturating_duration_since(Instant::now());
                claimed.next_in = Some(claimed.next_in.map_or(wait, |next| next.min(wait)));
            }
        }
        Ok(claimed)
    }
}
