//! Which messages the upstream fails, and until when. Pure: time and randomness are arguments.

use std::collections::{BTreeMap, HashMap};
use std::ops::RangeInclusive;
use std::time::Duration;

use rand::{Rng, RngExt};

use super::Digest;
use super::audit::millis;
use crate::hex::hex;

/// When a message's outage begins and ends, relative to the start of the simulator. Empty for a message that never failed.
pub type Outage = std::ops::Range<Duration>;

/// The outage of every message seen so far, decided at its first call.
#[derive(Debug)]
pub(super) struct Outages {
    probability: f64,
    length: RangeInclusive<Duration>,
    fates: HashMap<Digest, Outage>,
}

impl Outages {
    pub(super) fn new(probability: f64, length: RangeInclusive<Duration>) -> Self {
        Self { probability, length, fates: HashMap::new() }
    }

    /// Returns whether a call for the message that arrives now fails.
    pub(super) fn fails(&mut self, message: Digest, now: Duration, rng: &mut impl Rng) -> bool {
        let fate = self.fates.entry(message).or_insert_with(|| {
            let length = if rng.random_bool(self.probability) { rng.random_range(self.length.clone()) } else { Duration::ZERO };
            now..now + length
        });
        fate.contains(&now)
    }

    /// The length of each outage that began at `since` or later, in milliseconds, by the message's digest in hexadecimal.
    pub(super) fn lengths_ms(&self, since: Duration) -> BTreeMap<String, u64> {
        let began = self.fates.iter().filter(|(_, outage)| outage.start >= since && !outage.is_empty());
        began.map(|(message, outage)| (hex(message), millis(outage.end.saturating_sub(outage.start)))).collect()
    }

    pub(super) fn fates(&self) -> &HashMap<Digest, Outage> {
        &self.fates
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn about_the_given_share_of_messages_fails_at_first() {
        let mut rng = StdRng::seed_from_u64(7);
        let mut outages = Outages::new(0.5, SECOND..=SECOND * 2);
        let failed = (0..200u8).filter(|n| outages.fails([*n; 32], SECOND, &mut rng)).count();
        assert!((70..130).contains(&failed), "{failed}");
    }

    proptest! {
        #[test]
        fn an_outage_lasts_as_long_as_drawn_and_never_comes_back(seed: u64, calls in prop::collection::vec(0u64..1_000, 1..50)) {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut outages = Outages::new(1.0, SECOND * 60..=SECOND * 300);
            let mut now = Duration::ZERO;
            let mut worked = false;
            for pause in calls {
                let failed = outages.fails([1; 32], now, &mut rng);
                prop_assert!(!(worked && failed), "failed again at {:?}", now);
                prop_assert!(!failed || now < SECOND * 300);
                prop_assert!(failed || now >= SECOND * 60);
                worked = !failed;
                now += SECOND * u32::try_from(pause).unwrap() / 10;
            }
        }
    }
}
