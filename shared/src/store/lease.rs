//! Jobs of any kind: who holds one, and until when; the results of claims and finishes.

use std::time::{Duration, Instant, SystemTime};

use time::OffsetDateTime;
use uuid::Uuid;

use super::Result;
use crate::telemetry::display_chain;

/// The kind of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobKind {
    /// Get a message signed.
    Sign,
    /// Send a webhook to a receiver.
    Webhook,
}

impl JobKind {
    /// Its name in notifications, logs and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sign => "sign",
            Self::Webhook => "webhook",
        }
    }
}

/// Identifies a job.
#[derive(Clone, Copy, Debug)]
pub(super) struct JobId(pub(super) i64);

/// The right to work on one job. Only a claim creates one, and finishing the job takes it: there is no other way to write an outcome.
///
/// The token is the fencing token: a worker that was away for longer than its lease finds that its token is no longer the job's, and
/// changes nothing.
#[derive(Debug)]
pub struct Lease {
    pub(super) job: JobId,
    pub(super) token: Uuid,
    pub(super) slot: Option<Slot>,
    ends: Instant,
    ends_at_wall_clock: SystemTime,
}

/// A slot of the upstream's budget, as a claim took it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) number: i32,
    /// When it is free if nobody frees it. With the number, this is its position in its index.
    pub(super) taken_until: OffsetDateTime,
}

/// When a claim was sent, by the monotonic and the wall clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClaimSentAt {
    steady: Instant,
    wall: SystemTime,
}

impl ClaimSentAt {
    /// Now. Must be called before the statement is sent: the machine may be suspended while the statement runs.
    pub(super) fn now() -> Self {
        Self { steady: Instant::now(), wall: SystemTime::now() }
    }
}

impl Lease {
    /// A lease of this `length`, claimed by a statement that was sent at `sent_at`. Postgres counts from when it ran the statement, which
    /// was later. So for this process the lease ends no later than for Postgres, whatever the two clocks show.
    pub(super) fn new(job: JobId, token: Uuid, sent_at: ClaimSentAt, length: Duration) -> Self {
        Self { job, token, slot: None, ends: sent_at.steady + length, ends_at_wall_clock: sent_at.wall + length }
    }

    /// The same lease, with a slot of the upstream's budget.
    pub(super) fn with_slot(self, slot: Slot) -> Self {
        Self { slot: Some(slot), ..self }
    }

    /// How much of the lease is left. Work that can take longer must not begin.
    ///
    /// Uses the clock that says less: the monotonic clock stops while a machine is suspended, and the wall clock may be set.
    #[must_use]
    pub fn left(&self) -> Duration {
        let by_the_wall = self.ends_at_wall_clock.duration_since(SystemTime::now()).unwrap_or_default();
        self.ends.saturating_duration_since(Instant::now()).min(by_the_wall)
    }
}

/// The result of a claim.
#[derive(Debug)]
pub struct Claimed<J> {
    /// The jobs to do now.
    pub jobs: Vec<J>,
    /// If there were fewer jobs than wanted: the time until another one can be claimed, as far as this statement saw. `None` if nothing
    /// else waits.
    pub next_in: Option<Duration>,
    /// If there may be jobs that this claim could not see: the time until one that can. `None` if it saw all there are.
    pub look_again_in: Option<Duration>,
}

impl<J> Claimed<J> {
    /// The time until another claim may find something. `None` if nothing else waits.
    #[must_use]
    pub fn again_in(&self) -> Option<Duration> {
        self.next_in.into_iter().chain(self.look_again_in).min()
    }
}

/// Those of the claimed `jobs` that can be read. Any other one stays leased, and must not take them with it.
pub(super) fn readable<J>(jobs: impl Iterator<Item = Result<J>>) -> Vec<J> {
    jobs.filter_map(|job| job.inspect_err(|error| tracing::error!(error = display_chain(error), "a job can't be read")).ok()).collect()
}

/// The result of a finish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// The outcome was written.
    Written,
    /// The lease had expired and another worker holds the job, or held it: nothing was written.
    LeaseLost,
    /// Somebody holds the job in a transaction, or Postgres went away, after others of the batch were written: it can be written again.
    HeldUp,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_was_suspended_while_it_claimed_has_no_lease_left() {
        const LENGTH: Duration = Duration::from_secs(40);
        let lease = |asked| Lease::new(JobId(1), Uuid::nil(), asked, LENGTH);
        assert!(lease(ClaimSentAt::now()).left() > LENGTH / 2);
        // The monotonic clock stopped.
        assert_eq!(lease(ClaimSentAt { wall: SystemTime::now() - Duration::from_mins(10), ..ClaimSentAt::now() }).left(), Duration::ZERO);
        // The wall clock was set back.
        let set_back = ClaimSentAt { steady: Instant::now().checked_sub(Duration::from_mins(10)).unwrap(), wall: SystemTime::now() };
        assert_eq!(lease(set_back).left(), Duration::ZERO);
    }
}
