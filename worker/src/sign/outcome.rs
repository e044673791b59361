//! Decides what a reply means and what happens next. Pure: a table, and a decision that takes the time and the random
//! generator as arguments.

use std::time::Duration;

use rand::{Rng, RngExt};
use shared::backoff::{Backoff, FailedAttempt, Jitter, doubling};
use shared::call_error::CallError;
use shared::store::sign_finish::{Call, Failure, SignEnding, UpstreamNews};
use tokio::time::Instant;

use super::upstream::{BodyError, Reply};
use crate::settings::{SignSettings, Statuses};

/// What a reply means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The signature.
    Signed(String),
    /// The message failed this time.
    TryAgain,
    /// The message will never be signed.
    Refused,
    /// The upstream does not work for any message.
    Unavailable {
        /// Whether it said so itself.
        answered: bool,
    },
    /// The budget is also spent by others: all workers wait, for this long if the upstream says so.
    Throttled(Option<Duration>),
}

/// An outcome, and what is recorded of the reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What the reply means.
    pub outcome: Outcome,
    /// HTTP status, if the upstream answered.
    pub status: Option<u16>,
    /// What went wrong, if something did.
    pub error: Option<CallError>,
    /// What is known of the call.
    pub call: Call,
}

/// The table of outcomes. `retryable` takes precedence over the rules for single statuses.
#[must_use]
pub fn judge(reply: Reply, retryable: &Statuses) -> Verdict {
    let verdict = |outcome, status, error| Verdict { outcome, status, error: Some(error), call: Call::Ended };
    match reply {
        Reply::NotConnected(why) => Verdict { call: Call::NotMade, ..verdict(Outcome::Unavailable { answered: false }, None, why) },
        Reply::TimedOut => verdict(Outcome::TryAgain, None, CallError::Timeout),
        Reply::Broken => verdict(Outcome::TryAgain, None, CallError::Reset),
        Reply::Answered { status: 200, body, .. } => match body.map(String::from_utf8) {
            Ok(Ok(signature)) if !signature.is_empty() => {
                Verdict { outcome: Outcome::Signed(signature), status: Some(200), error: None, call: Call::Ended }
            }
            Ok(_) | Err(BodyError::Truncated | BodyError::TooLarge) => verdict(Outcome::TryAgain, Some(200), CallError::Body),
        },
        Reply::Answered { status, retry_after, .. } => {
            let outcome = match status {
                429 if retryable.contains(429) => Outcome::Throttled(retry_after),
                _ if retryable.contains(status) => Outcome::TryAgain,
                // The key or the address is wrong, which affects every message.
                300..=399 | 401 | 403 | 404 | 405 | 407 => Outcome::Unavailable { answered: true },
                // A success without a signature.
                ..=299 => Outcome::TryAgain,
                _ => Outcome::Refused,
            };
            verdict(outcome, Some(status), CallError::Status)
        }
    }
}

/// When a message is tried again, and for how long.
#[derive(Clone, Debug)]
pub struct RetryPolicy {
    backoff: Backoff,
    initial_delay: Duration,
    max_attempts: u32,
    deadline: Duration,
}

/// When an upstream that is down is first probed, and the longest delay between two probes.
const FIRST_PROBE_AFTER: Duration = Duration::from_secs(1);
const PROBE_EVERY: Duration = Duration::from_secs(15);

/// The longest pause that an upstream can ask for. A longer one is a mistake, and would stop everything.
const LONGEST_PAUSE: Duration = Duration::from_hours(1);

/// A message with less time than this before its deadline is not tried again.
const SHORTEST_CHANCE: Duration = Duration::from_secs(1);

impl RetryPolicy {
    /// Creates the policy from the settings.
    ///
    /// # Errors
    /// One line that names the variables.
    pub fn new(settings: &SignSettings) -> Result<Self, String> {
        Ok(Self {
            backoff: settings.backoff()?,
            initial_delay: settings.sign_initial_delay,
            max_attempts: settings.sign_max_attempts,
            deadline: settings.sign_deadline,
        })
    }

    /// Whether a message of this age is too old to be tried.
    #[must_use]
    pub fn is_overdue(&self, age: Duration) -> bool {
        age >= self.deadline
    }

    /// Decides what becomes of a job after `outcome`, which came at `now`, and what this says about the upstream, which had failed
    /// `breaker_failures` times in a row. `attempt` is what a delay is computed from.
    pub fn decide(
        &self,
        attempt: FailedAttempt,
        breaker_failures: u32,
        outcome: Outcome,
        now: Instant,
        rng: &mut impl Rng,
    ) -> (SignEnding, UpstreamNews) {
        let probed = breaker_failures > 0;
        let up = if probed { UpstreamNews::Up } else { UpstreamNews::None };
        match outcome {
            Outcome::Signed(signature) => (SignEnding::Signed(signature), up),
            Outcome::Refused => (SignEnding::Failed(Failure::Refused), up),
            Outcome::TryAgain => (self.retry(attempt, rng), up),
            Outcome::Unavailable { answered } => {
                let failures = breaker_failures + 1;
                let probe_in = Jitter::FIFTH.apply(doubling(FIRST_PROBE_AFTER, PROBE_EVERY, failures), rng).min(PROBE_EVERY);
                let again_in = answered.then(|| self.behind_others(self.backoff.delay(attempt, rng), attempt));
                (SignEnding::Unavailable { again_in }, UpstreamNews::Down { probe_in, failures })
            }
            Outcome::Throttled(wait) => {
                let (asked, interval) = (wait.unwrap_or_default(), attempt.interval);
                let pause = asked.clamp(interval, LONGEST_PAUSE.max(interval));
                // Unless it is told how long, the message waits as after a failure.
                let delay = if asked.is_zero() { self.backoff.delay(attempt, rng).max(pause) } else { pause };
                let again_in = Some(self.behind_others(delay, attempt));
                (SignEnding::Unavailable { again_in }, UpstreamNews::Pause { until: now + pause, probed })
            }
        }
    }

    /// How long a message waits with the retries after an answer that says something of everybody. It may be about this message after all,
    /// and no other must wait behind it.
    fn behind_others(&self, delay: Duration, attempt: FailedAttempt) -> Duration {
        let left = self.left(attempt);
        before_deadline(delay, left).unwrap_or(left)
    }

    fn retry(&self, attempt: FailedAttempt, rng: &mut impl Rng) -> SignEnding {
        if attempt.attempt >= self.max_attempts {
            return SignEnding::Failed(Failure::AttemptsExhausted);
        }
        let delay = if attempt.attempt == 1 && !self.initial_delay.is_zero() {
            self.initial_delay.mul_f64(rng.random_range(0.0..=1.0))
        } else {
            self.backoff.delay(attempt, rng)
        };
        match before_deadline(delay, self.left(attempt)) {
            Some(delay) => SignEnding::Retry(delay),
            None => SignEnding::Failed(Failure::DeadlineExceeded),
        }
    }

    fn left(&self, attempt: FailedAttempt) -> Duration {
        self.deadline.saturating_sub(attempt.age)
    }
}

/// Returns the delay, or a shorter one if the delay would end after the deadline: a message does not fail while there is time to try it
/// again. `None` if hardly any time is left.
fn before_deadline(delay: Duration, left: Duration) -> Option<Duration> {
    (left >= SHORTEST_CHANCE).then(|| if delay < left { delay } else { left / 2 })
}

#[cfg(test)]
mod tests;
