//! Between a claim and a finish: the attempt to deliver one webhook.

use std::time::{Duration, Instant};

use shared::store::webhook_jobs::{Delivery, WebhookFinish, WebhookJob};
use shared::store::{Claimed, Store, StoreError};
use shared::telemetry::{continue_trace, traceparent};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, field};

use super::delivery::{Answer, Sender, decide};
use crate::driver::Queue;
use crate::finisher::Shared;
use crate::settings::Schedule;

/// A lease is longer than the delivery it is for by this: time to start it, and to write its outcome.
const MARGIN: Duration = Duration::from_secs(10);

/// Webhook jobs.
pub struct WebhookQueue {
    /// Where jobs are.
    pub store: Store,
    /// Who sends.
    pub sender: Sender,
    /// When a delivery is tried again.
    pub schedule: Schedule,
    /// Where outcomes go.
    pub finisher: Shared<WebhookFinish>,
}

impl Queue for WebhookQueue {
    type Job = WebhookJob;
    const NAME: &'static str = "webhook";

    async fn claim(&self, most: usize) -> Result<Claimed<WebhookJob>, StoreError> {
        self.store.claim_webhook_jobs(most, self.sender.timeout() + MARGIN).await
    }

    async fn work(&self, job: WebhookJob, give_up: CancellationToken) {
        let span = tracing::info_span!(
            "webhook.attempt",
            otel.kind = "producer",
            attempt = job.attempt,
            http.response.status_code = field::Empty,
            otel.status_code = field::Empty,
        );
        continue_trace(&span, job.traceparent.as_deref());
        let finish = self.attempt(job, give_up).instrument(span.clone()).await;
        self.finisher.finish(finish).instrument(span).await;
    }
}

impl WebhookQueue {
    async fn attempt(&self, job: WebhookJob, give_up: CancellationToken) -> WebhookFinish {
        let started = Instant::now();
        let answer = tokio::select! {
            answer = async { self.sender.send(&job, traceparent().or_else(|| job.traceparent.clone()).as_deref()).await } => Some(answer),
            () = give_up.cancelled() => None,
        };
        let Some(answer) = answer else {
            return WebhookFinish { lease: job.lease, ending: Delivery::Released, status: None, error: Some("stopped") };
        };
        metrics::histogram!("countersign_webhook_seconds").record(started.elapsed());
        let ending = decide(answer, job.attempt, &self.schedule, &mut rand::rng());
        report(ending, answer);
        let error = match ending {
            Delivery::Delivered => None,
            _ => answer.error.or(Some("status")),
        };
        WebhookFinish { lease: job.lease, ending, status: answer.status, error }
    }
}

fn report(ending: Delivery, answer: Answer) {
    let Answer { status, error, .. } = answer;
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
