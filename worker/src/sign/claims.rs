//! Claims that step over what is leased or done already.
//!
//! The index of the queue begins with what is leased at present, and with what was done and no vacuum has taken away. A claim need not look
//! there again and again: the last one says how far it came ([`LowWater`]). But now and then a job appears before that point, so every so
//! often a claim looks at all: as soon as one that did not finds nothing, and whenever that takes no more than a share of the time. That is
//! always, while it is quick; and seldom enough not to matter, while some transaction holds back the vacuum and it takes a second.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shared::store::sign_claim::{LowWater, SignJob};
use shared::store::{Claimed, Store, StoreError};
use shared::units::Rate;

/// Looking at all takes no more than this share of the time.
const ONE_IN: u32 = 10;

/// Longer than a claim may take: for one that was given up.
const GIVEN_UP: Duration = Duration::from_secs(20);

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
        let asked = Instant::now();
        let (mark, all) = {
            let mut come = self.come();
            let all = come.all_again <= asked;
            if all {
                come.all_again = asked + GIVEN_UP * ONE_IN;
            }
            (come.mark, all)
        };
        let from = if all { LowWater::default() } else { mark };
        let claimed = self.store.claim_sign_jobs(most, self.lease, self.rate, from).await;
        let mut come = self.come();
        if all {
            // Whatever became of it: one that takes so long that Postgres ends it must not be all that is tried.
            come.all_again = Instant::now() + asked.elapsed() * ONE_IN;
        }
        let (mut claimed, reached) = claimed?;
        // Where nothing was found, nothing is known about where to go on.
        come.mark = reached.or(mark);
        if !all && claimed.jobs.is_empty() {
            // There may be something where it did not look.
            let wait = come.all_again.saturating_duration_since(Instant::now());
            claimed.next_in = Some(claimed.next_in.map_or(wait, |next| next.min(wait)));
        }
        Ok(claimed)
    }

    fn come(&self) -> MutexGuard<'_, Come> {
        self.come.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
