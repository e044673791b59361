//! Who has a job, and until when.

use std::time::{Duration, Instant};

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
    ends: Instant,
}

impl Lease {
    /// A lease that was claimed by a statement sent at `asked`, for `length`. Postgres counts from when it ran the statement, which
    /// was later; so this process thinks the lease ends no later than Postgres does, whatever the two clocks show.
    pub(super) fn new(job: JobId, token: Uuid, asked: Instant, length: Duration) -> Self {
        Self { job, token, ends: asked + length }
    }

    /// The job.
    #[must_use]
    pub fn job(&self) -> JobId {
        self.job
    }

    /// How much of the lease is left. Work that can take longer must not begin.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.ends.saturating_duration_since(Instant::now())
    }
}
