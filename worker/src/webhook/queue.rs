//! Between a claim and a finish: the attempt to deliver one webhook.

use std::time::Duration;

use shared::store::webhook_claim::WebhookJob;
use shared::store::webhook_jobs::{Delivery, ReceiverNews, WebhookFinish};
use shared::store::{Claimed, Store, StoreError};
use shared::telemetry::{continue_trace, traceparent};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, field};

use super::delivery::{Answer, Sender, decide, news};
use super::seats::{Seat, Seats};
use crate::driver::Queue;
use crate::finisher::Shared;
use crate::settings::Schedule;

/// What a lease has beside the delivery it is for: time to start it, and to write its outcome.
const MARGIN: Duration = Duration::from_secs(10);

/// Webhook jobs.
pub struct WebhookQueue {
    /// Where jobs are.
    pub store: Store,
    /// Who sends.
    pub sender: Sender,
    /// Who may send now.
    pub seats: Seats,
    /// When a delivery is tried again.
    pub schedule: Schedule,
    /// Where outcomes go.
    pub finisher: Shared<WebhookFinish>,
}

/// A job and its seat.
pub struct Seated {
    job: WebhookJob,
    seat: Seat,
}

impl Queue for WebhookQueue {
    type Job = Seated;
    const NAME: &'static str = "webhook";

    async fn claim(&self, most: usize) -> Result<Claimed<Seated>, StoreError> {
        // Twice the time limit: a job may wait for as long as another one's delivery takes before its own begins.
        let lease = self.sender.timeout() * 2 + MARGIN;
        loop {
            let wanted = self.seats.wanted(most);
            let found = self.store.claim_webhook_jobs(&wanted, lease).await?;
            self.seats.stopped_at(found.stopped_at);
            let (jobs, next_in) = (found.claimed.jobs, found.claimed.next_in);
            // Nothing among the receivers that were looked at: on to the next ones, until the circle is complete.
            if jobs.is_empty() && (found.stopped_at.is_some() || wanted.after.is_some()) {
                continue;
            }
            let seat = |job: WebhookJob| Seated { seat: self.seats.take(job.receiver, job.failures > 0), job };
            return Ok(Claimed { jobs: jobs.into_iter().map(seat).collect(), next_in });
        }
    }

    async fn work(&self, Seated { job, seat }: Seated, give_up: CancellationToken) {
        let span = tracing::info_span!(
            "webhook.attempt",
            otel.kind = "producer",
            attempt = job.attempt,
            http.response.status_code = field::Empty,
            otel.status_code = field::Empty,
        );
        continue_trace(&span, job.traceparent.as_deref());
        let finish = self.attempt(job, &seat, give_up).instrument(span.clone()).await;
        self.finisher.finish(finish).instrument(span).await;
        // Its seat is free only now, so that the next claim does not count on what is not written yet.
        drop(seat);
    }
}

impl WebhookQueue {
    async fn attempt(&self, job: WebhookJob, seat: &Seat, give_up: CancellationToken) -> WebhookFinish {
        let sending = async {
            let _call = seat.call().await;
            // What waited for so long that somebody else could take the job before the delivery ends is given back.
            if job.lease.left() < self.sender.timeout() + MARGIN / 2 {
                return None;
            }
            Some(self.sender.send(&job, traceparent().or_else(|| job.traceparent.clone()).as_deref()).await)
        };
        let answer = tokio::select! {
            answer = sending => answer,
            () = give_up.cancelled() => None,
        };
        let before = job.failures;
        let Some(answer) = answer else {
            let (took, receiver) = (Duration::ZERO, ReceiverNews::None { before });
            return WebhookFinish {
                lease: job.lease,
                ending: Delivery::Released,
                status: None,
                error: None,
                took,
                response: None,
                receiver,
            };
        };
        if let Err(error) = &job.confidential {
            tracing::error!(%error, "ENCRYPTION_KEY: a webhook can't be signed");
        }
        metrics::histogram!("countersign_webhook_seconds").record(answer.took);
        let ending = decide(&answer, job.attempt, &self.schedule, &mut rand::rng());
        report(ending, &answer);
        let error = match ending {
            Delivery::Delivered => answer.error,
            _ => answer.error.or(Some("status")),
        };
        let receiver = news(&answer, before);
        let response = answer.status.map(|_| answer.body);
        WebhookFinish { lease: job.lease, ending, status: answer.status, error, took: answer.took, response, receiver }
    }
}

fn report(ending: Delivery, answer: &Answer) {
    let Answer { status, error, .. } = *answer;
    let span = tracing::Span::current();
    span.record("http.response.status_code", status);
    if ending != Delivery::Delivered {
        span.record("otel.status_code", "ERROR");
    }
    let outcome = match ending {
        Delivery::Delivered => "delivered",
        Delivery::Retry(_) => "try_again",
        Delivery::Exhausted(code) => code,
        Delivery::Released => "released",
    };
    metrics::counter!("countersign_attempts_total", "queue" => "webhook", "outcome" => outcome).increment(1);
    match ending {
        Delivery::Delivered => tracing::debug!("delivered"),
        Delivery::Retry(delay) => tracing::info!(status, error, retry_in = ?delay, "webhook not delivered; will try again"),
        Delivery::Exhausted(code) => tracing::warn!(status, error, code, "webhook not delivered; kept"),
        Delivery::Released => {}
    }
}
