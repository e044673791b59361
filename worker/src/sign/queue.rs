//! The attempt to sign one message, between a claim and a finish.

use std::sync::Arc;
use std::time::Duration;

use shared::backoff::FailedAttempt;
use shared::call_error::CallError;
use shared::store::sign_claim::SignJob;
use shared::store::sign_finish::{Call, Failure, SignEnding, SignFinish, UpstreamNews};
use shared::store::{Claimed, JobKind, StoreError};
use shared::telemetry::{continue_trace, traceparent};
use tokio::time::Instant;
use tracing::{Instrument, field};

use super::calls::Calls;
use super::claims::Claims;
use super::outcome::{RetryPolicy, judge};
use super::upstream::{Reply, Upstream};
use crate::driver::{NextClaim, Queue, Stop};
use crate::finisher::Finisher;
use crate::settings::Statuses;

/// How much longer a lease is than its call: time to start the call, and to write its outcome.
const MARGIN: Duration = Duration::from_secs(10);

/// How long a job is leased for a call that takes up to `timeout`.
#[must_use]
pub fn lease(timeout: Duration) -> Duration {
    timeout + MARGIN
}

/// The queue of sign jobs.
pub struct SignQueue {
    /// Claims the jobs.
    pub claims: Claims,
    /// Signs the messages.
    pub upstream: Upstream,
    /// Limits the calls.
    pub calls: Calls,
    /// The statuses after which a message is tried again.
    pub retryable: Statuses,
    /// When and how often a message is tried again.
    pub policy: RetryPolicy,
    /// Writes the outcomes.
    pub finisher: Arc<Finisher<SignFinish>>,
}

impl Queue for SignQueue {
    type Job = SignJob;
    const NAME: &'static str = JobKind::Sign.name();

    fn most_leased(&self) -> usize {
        self.calls.most_leased()
    }

    async fn claim(&self, most: usize) -> Result<Claimed<SignJob>, StoreError> {
        self.claims.claim(most).await
    }

    async fn work(&self, job: SignJob, stop: Stop) -> NextClaim {
        let span = tracing::info_span!(
            "sign.attempt",
            otel.kind = "consumer",
            attempt = job.attempt,
            outcome = field::Empty,
            otel.status_code = field::Empty,
        );
        continue_trace(&span, job.traceparent.as_deref());
        let attempt = job.attempt;
        let finish = self.attempt(job, stop).instrument(span.clone()).await;
        span.in_scope(|| report(&finish, attempt));
        // A used slot is not free before a window has passed, so the end of this job is no reason to claim. But a worker that receives no
        // notifications must claim whenever there may be a reason.
        let next = match finish.ending {
            SignEnding::Signed(_) | SignEnding::Failed(_) if finish.call == Call::Ended && self.claims.is_listening() => {
                NextClaim::AsPlanned
            }
            _ => NextClaim::AtOnce,
        };
        self.finisher.finish(finish).instrument(span).await;
        next
    }
}

impl SignQueue {
    async fn attempt(&self, job: SignJob, stop: Stop) -> SignFinish {
        let began = Instant::now();
        let digest = job.message.digest();
        let not_probed = match job.breaker_failures {
            0 => UpstreamNews::None,
            failures => UpstreamNews::NotProbed { failures },
        };
        let without_call = |job: SignJob, ending| SignFinish::without_call(job.lease, digest, ending, not_probed);
        if self.policy.is_overdue(job.age) {
            return without_call(job, SignEnding::Failed(Failure::DeadlineExceeded));
        }
        let permit = tokio::select! {
            biased;
            permit = self.calls.permit() => permit,
            () = stop.begin_nothing.cancelled() => return without_call(job, SignEnding::Released),
        };
        // A job that waited long for its permit, or was claimed by a process that then stood still, could end when its slot already belongs
        // to another job. So a call that can't end within the lease is not begun.
        if job.lease.left() < self.upstream.timeout() {
            tracing::warn!("too late for a call within the lease");
            return without_call(job, SignEnding::Released);
        }
        let called = Instant::now();
        let reply = tokio::select! {
            reply = self.call(&job) => reply,
            () = stop.give_up.cancelled() => {
                let given_back = SignFinish::without_call(job.lease, digest, SignEnding::Released, UpstreamNews::None);
                return SignFinish { call: Call::Abandoned, ..given_back };
            }
        };
        permit.ended(called);
        // The age was measured at the claim.
        let age = job.age + began.elapsed();
        let attempt = FailedAttempt { attempt: job.attempt, competing: job.competing, interval: job.interval, age };
        let verdict = judge(reply, &self.retryable);
        let (ending, upstream) = self.policy.decide(attempt, job.breaker_failures, verdict.outcome, Instant::now(), &mut rand::rng());
        SignFinish { lease: job.lease, digest, ending, call: verdict.call, status: verdict.status, error: verdict.error, upstream }
    }

    async fn call(&self, job: &SignJob) -> Reply {
        let span = tracing::info_span!("upstream.sign", otel.kind = "client", http.response.status_code = field::Empty);
        async {
            let started = Instant::now();
            let reply = self.upstream.sign(&job.message, traceparent().or_else(|| job.traceparent.clone()).as_deref()).await;
            metrics::histogram!("countersign_upstream_seconds").record(started.elapsed());
            if let Reply::Answered { status, .. } = &reply {
                tracing::Span::current().record("http.response.status_code", status);
            }
            reply
        }
        .instrument(span)
        .await
    }
}

fn report(finish: &SignFinish, attempt: u32) {
    let (status, error) = (finish.status, finish.error.map(CallError::code));
    let outcome = match &finish.ending {
        SignEnding::Signed(_) => "signed",
        SignEnding::Retry(_) => "try_again",
        SignEnding::Unavailable { .. } => "unavailable",
        SignEnding::Released => "released",
        SignEnding::Failed(failure) => failure.code(),
    };
    metrics::counter!("countersign_attempts_total", "queue" => SignQueue::NAME, "outcome" => outcome).increment(1);
    let span = tracing::Span::current();
    span.record("outcome", outcome);
    if error.is_some() {
        span.record("otel.status_code", "ERROR");
    }
    match &finish.ending {
        SignEnding::Signed(_) => tracing::debug!(attempt, "signed"),
        SignEnding::Released => tracing::debug!(attempt, "given back"),
        SignEnding::Retry(delay) => tracing::info!(attempt, status, error, retry_in = ?delay, "not signed; will try again"),
        _ => tracing::warn!(attempt, status, error, outcome, "not signed"),
    }
}
