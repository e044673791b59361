//! Who has a job, and until when; what a claim gives and what a finish answers, for any kind of job.

use std::time::{Duration, Instant, SystemTime};

use time::OffsetDateTime;
use uuid::Uuid;

/// Identifies a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct JobId(pub(super) i64);

/// The right to work on one job. Only a claim makes one, and finishing the job takes it: there is no second way to write an outcome.
///
/// The token is the fence: a worker that was away for longer than its lease finds that its token is not the job's any more, and
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
    /// When it would be free if nobody freed it. With the number, that is where it stands in its index.
    pub(super) taken_until: OffsetDateTime,
}

/// When a claim was sent, by both clocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClaimSentAt {
    steady: Instant,
    wall: SystemTime,
}

impl ClaimSentAt {
    /// Now. To be called before the statement is sent: a machine may be suspended while it runs.
    pub(super) fn now() -> Self {
        Self { steady: Instant::now(), wall: SystemTime::now() }
    }
}

impl Lease {
    /// A lease that was claimed by a statement sent at `sent_at`, for `length`. Postgres counts from when it ran the statement, which
    /// was later; so this process thinks the lease ends no later than Postgres does, whatever the two clocks show.
    pub(super) fn new(job: JobId, token: Uuid, sent_at: ClaimSentAt, length: Duration) -> Self {
        Self { job, token, slot: None, ends: sent_at.steady + length, ends_at_wall_clock: sent_at.wall + length }
    }

    /// The same, with a slot of the upstream's budget.
    pub(super) fn with_slot(self, slot: Slot) -> Self {
        Self { slot: Some(slot), ..self }
    }

    /// The same, whose slot stays taken for as long as if nobody had freed it: a window after the lease has ended. For a call of which nobody knows
    /// whether it has arrived yet.
    #[must_use]
    pub fn leaving_its_slot(self) -> Self {
        Self { slot: None, ..self }
    }

    /// The job.
    #[must_use]
    pub fn job(&self) -> JobId {
        self.job
    }

    /// How much of the lease is left. Work that can take longer must not begin.
    ///
    /// By the clock that says less: the steady one stands still while a machine is suspended, the other one may be set.
    #[must_use]
    pub fn left(&self) -> Duration {
        let by_the_wall = self.ends_at_wall_clock.duration_since(SystemTime::now()).unwrap_or_default();
        self.ends.saturating_duration_since(Instant::now()).min(by_the_wall)
    }
}

/// What a claim found.
#[derive(Debug)]
pub struct Claimed<J> {
    /// The jobs to do now.
    pub jobs: Vec<J>,
    /// If there were fewer than were wanted: after how long something else can be claimed, as far as this statement saw. Nothing: nothing
    /// else waits.
    pub next_in: Option<Duration>,
}

/// What became of a finish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// It is written.
    Written,
    /// The lease had run out and somebody else has the job, or had it: nothing of it was written.
    LeaseLost,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_was_suspended_while_it_claimed_has_no_lease_left() {
        const LENGTH: Duration = Duration::from_secs(40);
        let lease = |asked| Lease::new(JobId(1), Uuid::nil(), asked, LENGTH);
        assert!(lease(ClaimSentAt::now()).left() > LENGTH / 2);
        // The steady clock stood still.
        assert_eq!(lease(ClaimSentAt { wall: SystemTime::now() - Duration::from_mins(10), ..ClaimSentAt::now() }).left(), Duration::ZERO);
        // The clock on the wall was set back.
        let set_back = ClaimSentAt { steady: Instant::now().checked_sub(Duration::from_mins(10)).unwrap(), wall: SystemTime::now() };
        assert_eq!(lease(set_back).left(), Duration::ZERO);
    }
}
