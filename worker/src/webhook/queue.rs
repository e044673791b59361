//! The attempt to deliver one webhook, between a claim and a finish.

use std::time::Duration;

use shared::call_error::CallError;
use shared::store::webhook_claim::WebhookJob;
use shared::store::webhook_finish::{WebhookEnding, WebhookFinish};
use shared::store::{Claimed, JobKind, Store, StoreError};
use shared::telemetry::{continue_trace, traceparent};
use tracing::{Instrument, field};

use super::outcome::{decide, news};
use super::seats::{Seat, Seats};
use super::sender::Sender;
use super::walk::{Circle, Cursor};
use crate::driver::{NextClaim, Queue, Stop};
use crate::finisher::Finisher;
use crate::settings::Schedule;

/// The part of a lease that is not for deliveries: time to start the delivery, and to write its outcome, half of it for each.
const MARGIN: Duration = Duration::from_secs(10);

/// How long a job is leased for a delivery that takes up to `timeout`. Twice that: before its own delivery begins, a job may wait for as
/// long as another one's takes.
fn lease(timeout: Duration) -> Duration {
    timeout * 2 + MARGIN
}

/// The queue of webhook jobs.
pub struct WebhookQueue {
    /// Where the jobs are stored.
    pub store: Store,
    /// Sends the webhooks.
    pub sender: Sender,
    /// Decides which job may send now.
    pub seats: Seats,
    /// Where the last claim stopped.
    pub cursor: Cursor,
    /// When a delivery is tried again.
    pub schedule: Schedule,
    /// Writes the outcomes.
    pub finisher: Finisher<WebhookFinish>,
}

/// A job and its seat.
pub struct Seated {
    job: WebhookJob,
    seat: Seat,
}

impl Queue for WebhookQueue {
    type Job = Seated;
    const NAME: &'static str = JobKind::Webhook.name();

    fn most_leased(&self) -> usize {
        self.seats.most_leased()
    }

    async fn claim(&self, most: usize) -> Result<Claimed<Seated>, StoreError> {
        let lease = lease(self.sender.timeout());
        let mut circle = Circle::after(self.cursor.get());
        let mut soonest: Option<Duration> = None;
        loop {
            let (found, stopped_at) = self.store.claim_webhook_jobs(&self.seats.wanted(most), self.cursor.get(), lease).await?;
            self.cursor.set(stopped_at);
            let Claimed { jobs, next_in, .. } = found;
            soonest = soonest.into_iter().chain(next_in).min();
            // These receivers have no job to claim: go on to the next ones, until the circle is complete.
            if jobs.is_empty() && !circle.completes_at(stopped_at) {
                continue;
            }
            let seat = |job: WebhookJob| Seated { seat: self.seats.take(job.receiver, job.standing), job };
            return Ok(Claimed { jobs: jobs.into_iter().map(seat).collect(), next_in: soonest, look_again_in: None });
        }
    }

    async fn work(&self, Seated { job, seat }: Seated, stop: Stop) -> NextClaim {
        let span = tracing::info_span!(
            "webhook.attempt",
            otel.kind = "producer",
            attempt = job.attempt,
            http.response.status_code = field::Empty,
            otel.status_code = field::Empty,
        );
        continue_trace(&span, job.traceparent.as_deref());
        let attempt = job.attempt;
        let finish = self.attempt(job, &seat, stop).instrument(span.clone()).await;
        span.in_scope(|| report(&finish, attempt));
        self.finisher.finish(finish).instrument(span).await;
        // Free the seat only now, so that the next claim does not count on an outcome that is not written yet. Other jobs may wait for the
        // seat.
        drop(seat);
        NextClaim::AtOnce
    }
}

impl WebhookQueue {
    async fn attempt(&self, job: WebhookJob, seat: &Seat, stop: Stop) -> WebhookFinish {
        let sending = async {
            let _permit = tokio::select! {
                biased;
                permit = seat.permit() => permit,
                () = stop.begin_nothing.cancelled() => return None,
            };
            // Give back a job that has waited so long that another worker could take it before the delivery ends.
            if job.lease.left() < self.sender.timeout() + MARGIN / 2 {
                return None;
            }
            Some(self.sender.send(&job, traceparent().or_else(|| job.traceparent.clone()).as_deref()).await)
        };
        let answer = tokio::select! {
            answer = sending => answer,
            () = stop.give_up.cancelled() => None,
        };
        let before = job.failures;
        let Some(answer) = answer else { return WebhookFinish::released(job.lease, before) };
        if let Err(error) = &job.confidential {
            tracing::error!(%error, "ENCRYPTION_KEY: a webhook can't be signed");
        }
        metrics::histogram!("countersign_webhook_seconds").record(answer.took);
        let ending = decide(&answer, job.attempt, &self.schedule, &mut rand::rng());
        let error = match ending {
            WebhookEnding::Delivered => answer.error,
            _ => answer.error.or(Some(CallError::Status)),
        };
        let receiver = news(&answer, before, &self.schedule);
        let response = answer.status.map(|_| answer.body);
        WebhookFinish { lease: job.lease, ending, status: answer.status, error, took: answer.took, response, receiver }
    }
}

fn report(finish: &WebhookFinish, attempt: u32) {
    let (status, error) = (finish.status, finish.error.map(CallError::code));
    let outcome = match finish.ending {
        WebhookEnding::Delivered => "delivered",
        WebhookEnding::Retry(_) => "try_again",
        WebhookEnding::Exhausted(failure) => failure.code(),
        WebhookEnding::Released => "released",
    };
    metrics::counter!("countersign_attempts_total", "queue" => WebhookQueue::NAME, "outcome" => outcome).increment(1);
    let span = tracing::Span::current();
    span.record("http.response.status_code", status);
    if error.is_some() && finish.ending != WebhookEnding::Delivered {
        span.record("otel.status_code", "ERROR");
    }
    match finish.ending {
        WebhookEnding::Delivered => tracing::debug!(attempt, "delivered"),
        WebhookEnding::Retry(delay) => tracing::info!(attempt, status, error, retry_in = ?delay, "webhook not delivered; will try again"),
        WebhookEnding::Exhausted(failure) => tracing::warn!(attempt, status, error, code = failure.code(), "webhook not delivered; kept"),
        WebhookEnding::Released => tracing::debug!(attempt, "given back"),
    }
}
