//! How long to wait before the next attempt.
//!
//! Pure: the random generator is an argument, and delays are computed from values that their constructors have validated.

use std::time::Duration;

use rand::{Rng, RngExt};

/// The fraction, from 0 to 1, by which a delay may be shorter or longer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Jitter(f64);

impl Jitter {
    /// No jitter: exactly the nominal delay.
    pub const NONE: Self = Self(0.0);

    /// Up to a fifth shorter or longer, so that many processes do not act in lockstep.
    pub const FIFTH: Self = Self(0.2);

    /// Creates a jitter of `fraction`.
    ///
    /// # Errors
    /// A sentence that says what is accepted.
    pub fn new(fraction: f64) -> Result<Self, String> {
        if (0.0..=1.0).contains(&fraction) { Ok(Self(fraction)) } else { Err("accepted: a number from 0 to 1".to_owned()) }
    }

    /// Multiplies `delay` by a factor drawn uniformly from `1 - jitter` to `1 + jitter`.
    pub fn apply(self, delay: Duration, rng: &mut impl Rng) -> Duration {
        if self.0 == 0.0 {
            return delay;
        }
        delay.mul_f64(1.0 + rng.random_range(-self.0..=self.0))
    }
}

impl std::str::FromStr for Jitter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        crate::units::fraction(text).map(Self)
    }
}

/// The delay after the `attempt`-th failure in a row, counted from 1: `base`, doubled with each further failure, up to `max`.
#[must_use]
pub fn doubling(base: Duration, max: Duration, attempt: u32) -> Duration {
    base.saturating_mul(1 << attempt.saturating_sub(1).min(31)).min(max)
}

/// How the delay after a failed attempt is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Strategy {
    /// Grows with the number of messages that compete for the upstream's budget.
    Adaptive,
    /// Doubles with every try.
    Exponential,
    /// Always the same.
    Fixed,
}

/// A retry strategy with a smallest and a largest delay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backoff {
    strategy: Strategy,
    base: Duration,
    max: Duration,
    jitter: Jitter,
}

/// What a delay is computed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailedAttempt {
    /// The number of the failed attempt, counted from 1.
    pub attempt: u32,
    /// The number of messages that wait for a signature, this one included.
    pub competing: u32,
    /// The mean time between two calls when the whole budget is spent.
    pub interval: Duration,
    /// How long the message has been waiting for a signature.
    pub age: Duration,
}

/// `adaptive` waits for at least a message's age divided by this: a message that has failed for hours can wait for minutes.
const SHARE_OF_AGE: u32 = 50;

/// After a message's first failure, `adaptive` lets at least this many calls pass. While a burst is still arriving, few messages compete. A
/// turn among these few would spend calls on a message that has just failed, although the next arrivals need them. In the simulation (`make
/// simulate`), 60 messages over a minute end at 1.135 times the earliest possible end with this minimum, and at 1.156 without it. Any value
/// from 2 to 30 works about as well; a smaller one delays a lone message less.
const FEWEST_TURNS_AT_FIRST: u32 = 5;

impl Backoff {
    /// Creates a backoff of `strategy` with delays between `base` and `max`.
    ///
    /// # Errors
    /// A sentence that says what is accepted.
    pub fn new(strategy: Strategy, base: Duration, max: Duration, jitter: Jitter) -> Result<Self, String> {
        if base.is_zero() || base > max {
            return Err("accepted: a base delay above 0 and not above the maximum delay".to_owned());
        }
        Ok(Self { strategy, base, max, jitter })
    }

    /// Returns the delay after `failure`: between the base and the maximum, then jittered.
    ///
    /// `adaptive` waits one fair turn: when `competing` messages share the budget, each gets a call every `competing × interval`. A shorter
    /// delay would take a call from another message to retry one that failed a moment ago; a longer one would leave calls unused. With few
    /// messages left, the turn is short and spare calls are spent as they come. Only a message that has been failing for long is retried
    /// less and less often, so that an outage of hours neither uses up its attempts nor goes unnoticed when it ends. After a first failure,
    /// the turn is one among at least five messages.
    pub fn delay(&self, failure: FailedAttempt, rng: &mut impl Rng) -> Duration {
        let nominal = match self.strategy {
            Strategy::Fixed => self.base,
            Strategy::Exponential => doubling(self.base, self.max, failure.attempt),
            Strategy::Adaptive => {
                let turns = if failure.attempt <= 1 { failure.competing.max(FEWEST_TURNS_AT_FIRST) } else { failure.competing };
                failure.interval.saturating_mul(turns).max(failure.age / SHARE_OF_AGE)
            }
        };
        self.jitter.apply(nominal.clamp(self.base, self.max), rng)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::SmallRng};

    use super::Strategy;
    use super::*;

    fn backoff(strategy: Strategy, jitter: f64) -> Backoff {
        Backoff::new(strategy, Duration::from_secs(2), Duration::from_mins(10), Jitter::new(jitter).unwrap()).unwrap()
    }

    fn failure(attempt: u32, competing: u32) -> FailedAttempt {
        FailedAttempt { attempt, competing, interval: Duration::from_secs(6), age: Duration::from_mins(1) }
    }

    #[test]
    fn exponential_doubles_until_the_maximum() {
        let backoff = backoff(Strategy::Exponential, 0.0);
        let rng = &mut SmallRng::seed_from_u64(1);
        let seconds: Vec<u64> = (1..=11).map(|n| backoff.delay(failure(n, 1), rng).as_secs()).collect();
        assert_eq!(seconds, [2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600]);
    }

    #[test]
    fn fixed_never_changes() {
        let backoff = backoff(Strategy::Fixed, 0.0);
        let rng = &mut SmallRng::seed_from_u64(1);
        assert!((1..50).all(|n| backoff.delay(failure(n, n), rng) == Duration::from_secs(2)));
    }

    #[test]
    fn adaptive_waits_one_fair_turn() {
        let backoff = backoff(Strategy::Adaptive, 0.0);
        let rng = &mut SmallRng::seed_from_u64(1);
        assert_eq!(backoff.delay(failure(9, 1), rng), Duration::from_secs(6));
        assert_eq!(backoff.delay(failure(1, 30), rng), Duration::from_mins(3));
        assert_eq!(backoff.delay(failure(1, 1_000_000), rng), Duration::from_mins(10));
    }

    #[test]
    fn adaptive_lets_five_calls_pass_after_a_first_failure_even_if_few_compete() {
        let backoff = backoff(Strategy::Adaptive, 0.0);
        let rng = &mut SmallRng::seed_from_u64(1);
        assert_eq!([1, 2].map(|attempt| backoff.delay(failure(attempt, 2), rng).as_secs()), [30, 12]);
    }

    #[test]
    fn adaptive_asks_less_often_for_what_has_failed_for_long() {
        let backoff = backoff(Strategy::Adaptive, 0.0);
        let rng = &mut SmallRng::seed_from_u64(1);
        let old = FailedAttempt { age: Duration::from_hours(1), ..failure(50, 1) };
        assert_eq!(backoff.delay(old, rng), Duration::from_secs(72));
    }

    #[test]
    fn a_backoff_that_could_spin_is_refused() {
        let jitter = Jitter::NONE;
        assert!(Backoff::new(Strategy::Fixed, Duration::ZERO, Duration::MAX, jitter).is_err());
        assert!(Backoff::new(Strategy::Fixed, Duration::from_secs(2), Duration::from_secs(1), jitter).is_err());
        assert!(Jitter::new(1.1).is_err() && Jitter::new(-0.1).is_err() && Jitter::new(f64::NAN).is_err());
    }

    proptest! {
        #[test]
        fn a_delay_stays_within_the_jitter_of_its_bounds(
            attempt in 0u32.., competing in 0u32.., interval_ms in 0u64..10_000_000, age_s in 0u64..1_000_000, jitter in 0.0f64..=1.0, seed: u64,
            strategy in prop_oneof![Just(Strategy::Adaptive), Just(Strategy::Exponential), Just(Strategy::Fixed)],
        ) {
            let delay = backoff(strategy, jitter).delay(
                FailedAttempt { attempt, competing, interval: Duration::from_millis(interval_ms), age: Duration::from_secs(age_s) },
                &mut SmallRng::seed_from_u64(seed),
            );
            prop_assert!(delay.as_secs_f64() >= 2.0 * (1.0 - jitter) - 1e-6);
            prop_assert!(delay.as_secs_f64() <= 600.0 * (1.0 + jitter) + 1e-6);
        }

        #[test]
        fn the_same_seed_gives_the_same_delay(attempt in 1u32..40, competing in 1u32..100, seed: u64) {
            let one = || backoff(Strategy::Adaptive, 0.5).delay(failure(attempt, competing), &mut SmallRng::seed_from_u64(seed));
            prop_assert_eq!(one(), one());
        }
    }
}
