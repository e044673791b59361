//! Decides what a reply means and what happens next. Pure: a table, and a decision that takes the time and the random
//! generator as arguments.

use std::time::Duration;

use rand::{Rng, RngExt};
use shared::backoff::{Backoff, FailedAttempt, Jitter, doubling};
use shared::call_error::CallError;
use shared::store::sign_claim::SignJob;
use shared::store::sign_finish::{Failure, SignEnding, UpstreamNews};
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
    /// Whether the call may have reached the upstream.
    pub called: bool,
}

/// The table of outcomes. `retryable` takes precedence over the rules for single statuses.
#[must_use]
pub fn judge(reply: Reply, retryable: &Statuses) -> Verdict {
    let verdict = |outcome, status, error| Verdict { outcome, status, error: Some(error), called: true };
    match reply {
        Reply::NotConnected => Verdict { called: false, ..verdict(Outcome::Unavailable { answered: false }, None, CallError::Connection) },
        Reply::TimedOut => verdict(Outcome::TryAgain, None, CallError::Timeout),
        Reply::Broken => verdict(Outcome::TryAgain, None, CallError::Reset),
        Reply::Answered { status: 200, body, .. } => match body.map(String::from_utf8) {
            Ok(Ok(signature)) if !signature.is_empty() => {
                Verdict { outcome: Outcome::Signed(signature), status: Some(200), error: None, called: true }
            }
            Ok(_) | Err(BodyError::Truncated | BodyError::TooLarge) => verdict(Outcome::TryAgain, Some(200), CallError::Body),
        },
        Reply::Answered { status, retry_after, .. } => {
            let outcome = match status {
                429 if retryable.contains(429) => Outcome::Throttled(retry_after),
                _ if retryable.contains(status) => Outcome::TryAgain,
                // The key or the address is wrong, which affects every message.
                300..=399 | 401 | 403 | 407 => Outcome::Unavailable { answered: true },
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

    /// Whether a job is too old to be tried.
    #[must_use]
    pub fn is_overdue(&self, job: &SignJob) -> bool {
        job.age >= self.deadline
    }

    /// Decides what becomes of a job after `outcome`, which came at `now`, and what this says about the upstream.
    pub fn decide(&self, job: &SignJob, outcome: Outcome, now: Instant, rng: &mut impl Rng) -> (SignEnding, UpstreamNews) {
        let up = if job.breaker_failures > 0 { UpstreamNews::Up } else { UpstreamNews::None };
        match outcome {
            Outcome::Signed(signature) => (SignEnding::Signed(signature), up),
            Outcome::Refused => (SignEnding::Failed(Failure::Refused), up),
            Outcome::TryAgain => (self.retry(job, rng), up),
            Outcome::Unavailable { answered } => {
                let failures = job.breaker_failures + 1;
                let probe_in = Jitter::FIFTH.apply(doubling(FIRST_PROBE_AFTER, PROBE_EVERY, failures), rng).min(PROBE_EVERY);
                // What the upstream says of everything may be about this message after all. Others must not wait behind it.
                let again_in = answered.then(|| {
                    let (delay, left) = (self.delay(job, rng), self.deadline.saturating_sub(job.age));
                    before_deadline(delay, left).unwrap_or(left)
                });
                (SignEnding::Unavailable { again_in }, UpstreamNews::Down { probe_in, failures })
            }
            Outcome::Throttled(wait) => {
                let pause = wait.unwrap_or(job.interval).clamp(job.interval, LONGEST_PAUSE.max(job.interval));
                (SignEnding::Unavailable { again_in: None }, UpstreamNews::Pause { until: now + pause, probed: job.breaker_failures > 0 })
            }
        }
    }

    fn retry(&self, job: &SignJob, rng: &mut impl Rng) -> SignEnding {
        if job.attempt >= self.max_attempts {
            return SignEnding::Failed(Failure::AttemptsExhausted);
        }
        let delay = if job.attempt == 1 && !self.initial_delay.is_zero() {
            self.initial_delay.mul_f64(rng.random_range(0.0..=1.0))
        } else {
            self.delay(job, rng)
        };
        match before_deadline(delay, self.deadline.saturating_sub(job.age)) {
            Some(delay) => SignEnding::Retry(delay),
            None => SignEnding::Failed(Failure::DeadlineExceeded),
        }
    }

    fn delay(&self, job: &SignJob, rng: &mut impl Rng) -> Duration {
        let failure = FailedAttempt { attempt: job.attempt, competing: job.competing, interval: job.interval, age: job.age };
        self.backoff.delay(failure, rng)
    }
}

/// Returns the delay, or a shorter one if the delay would end after the deadline: a message does not fail while there is time to try it
/// again. `None` if hardly any time is left.
fn before_deadline(delay: Duration, left: Duration) -> Option<Duration> {
    (left >= SHORTEST_CHANCE).then(|| if delay < left { delay } else { left / 2 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn while_there_is_time_a_message_is_tried_again_however_long_the_delay_would_be() {
        let [second, minute, hour] = [Duration::from_secs(1), Duration::from_mins(1), Duration::from_hours(1)];
        assert_eq!(before_deadline(second, minute), Some(second));
        assert_eq!(before_deadline(hour, minute), Some(minute / 2));
        assert_eq!(before_deadline(second, second / 2), None);
        let mut left = minute;
        let mut tries = 0;
        while let Some(delay) = before_deadline(hour, left) {
            left -= delay;
            tries += 1;
        }
        assert_eq!(tries, 6, "it ends");
    }

    fn answered(status: u16, body: &str) -> Reply {
        Reply::Answered { status, body: Ok(body.as_bytes().to_vec()), retry_after: None }
    }

    fn outcome(reply: Reply) -> Outcome {
        judge(reply, &"408,425,429,500,502,503,504".parse().unwrap()).outcome
    }

    #[test]
    fn a_signature_is_taken_byte_for_byte() {
        assert_eq!(outcome(answered(200, " c2ln\n")), Outcome::Signed(" c2ln\n".to_owned()));
    }

    #[test]
    fn what_is_no_signature_is_tried_again() {
        assert_eq!(outcome(answered(200, "")), Outcome::TryAgain);
        assert_eq!(outcome(answered(204, "")), Outcome::TryAgain);
        for body in [Err(BodyError::Truncated), Err(BodyError::TooLarge), Ok(vec![0xff])] {
            assert_eq!(outcome(Reply::Answered { status: 200, body, retry_after: None }), Outcome::TryAgain);
        }
    }

    #[test]
    fn failures_of_a_message_are_tried_again_and_refusals_are_final() {
        for status in [408, 425, 500, 502, 503, 504] {
            assert_eq!(outcome(answered(status, "no")), Outcome::TryAgain, "{status}");
        }
        for status in [400, 404, 413, 422, 501] {
            assert_eq!(outcome(answered(status, "no")), Outcome::Refused, "{status}");
        }
        assert_eq!(outcome(Reply::TimedOut), Outcome::TryAgain);
        assert_eq!(outcome(Reply::Broken), Outcome::TryAgain);
    }

    #[test]
    fn failures_of_the_upstream_are_told_from_failures_of_a_message() {
        for status in [302, 401, 403] {
            assert_eq!(outcome(answered(status, "no")), Outcome::Unavailable { answered: true }, "{status}");
        }
        let refused = judge(Reply::NotConnected, &"500".parse().unwrap());
        assert_eq!((refused.outcome, refused.called), (Outcome::Unavailable { answered: false }, false));
    }

    #[test]
    fn the_configured_statuses_win() {
        let judged = |status, list: &str| judge(answered(status, ""), &list.parse().unwrap()).outcome;
        assert_eq!(judged(403, "403"), Outcome::TryAgain);
        assert_eq!(judged(502, "503"), Outcome::Refused);
        assert_eq!(judged(429, "503"), Outcome::Refused);
        assert_eq!(judged(429, "429"), Outcome::Throttled(None));
    }
}
