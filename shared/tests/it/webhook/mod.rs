//! Webhook jobs: the helpers that the tests share.

mod claim;
mod delivery;
mod receivers;
mod replay;

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use shared::contract::{DeliveryOutcome, WebhookStatus};
use shared::store::accept::NewRequest;
use shared::store::deliveries::Replay;
use shared::store::receivers::{Held, ReceiverId, Room, Wanted};
use shared::store::webhook_claim::WebhookJob;
use shared::store::webhook_finish::{ReceiverNews, WebhookEnding, WebhookFailure, WebhookFinish};
use shared::store::{Claimed, Finished, StoreError};
use uuid::Uuid;

use crate::fixture::{ANY_NUMBER, Fixture, LEASE, any_receiver, webhook_to};

/// Stores a request with a webhook to `url`, for a message that is signed already.
async fn told_at(f: &Fixture, url: &str) -> Uuid {
    if f.number("select count(*) from jobs where signature is not null").await == 0 {
        f.signed("a").await;
    }
    let webhook = webhook_to(url, [("x".to_owned(), "y".to_owned())].into());
    let request = NewRequest { webhook: Some(webhook), ..f.request("a") };
    f.accept(request).await.id
}

async fn told(f: &Fixture) -> Uuid {
    told_at(f, "http://example.com/").await
}

/// Adds `count` webhooks to `url` that have been due for an hour; each to a different receiver if `scattered`.
async fn flood(f: &Fixture, url: &str, count: usize, scattered: bool) {
    let request = told_at(f, url).await;
    let receiver = if scattered { "gen_random_uuid()" } else { "receiver_of(api_key_id, webhook_url)" };
    f.run(&format!(
        "with copies as (
            insert into requests (id, api_key_id, sign_job_id, payload_digest, webhook_url)
            select gen_random_uuid(), api_key_id, sign_job_id, payload_digest, webhook_url from requests, generate_series(1, {count})
            where id = '{request}'
            returning id, api_key_id, webhook_url
        )
        insert into jobs (kind, request_id, receiver, next_run_at) select 'webhook', id, {receiver}, now() - interval '1 h' from copies;
        analyze"
    ))
    .await;
}

fn held(receiver: ReceiverId, jobs: u32) -> Held {
    Held { receiver, jobs, as_new: 0, as_troubled: 0 }
}

fn room(in_all: u32) -> Room {
    Room { in_all, ..ANY_NUMBER }
}

async fn claimed(f: &Fixture, wanted: &Wanted) -> Claimed<WebhookJob> {
    claimed_after(f, wanted, None).await.0
}

/// What a claim finds that begins after this receiver, and where it stopped.
async fn claimed_after(f: &Fixture, wanted: &Wanted, after: Option<ReceiverId>) -> (Claimed<WebhookJob>, Option<ReceiverId>) {
    f.store.claim_webhook_jobs(wanted, after, LEASE).await.unwrap()
}

async fn claim(f: &Fixture) -> Vec<WebhookJob> {
    claimed(f, &any_receiver(10)).await.jobs
}

fn finish_of(job: WebhookJob, ending: WebhookEnding, status: u16, receiver: ReceiverNews) -> WebhookFinish {
    let took = Duration::from_millis(7);
    WebhookFinish { lease: job.lease, ending, status: Some(status), error: None, took, response: Some(b"answer".to_vec()), receiver }
}

async fn finish(f: &Fixture, job: WebhookJob, ending: WebhookEnding, status: u16) -> Finished {
    f.store.finish_webhook_jobs(&[finish_of(job, ending, status, ReceiverNews::Works { slow: false })]).await.unwrap()[0]
}

/// Records that the receiver failed; the next probe may follow after `pause`.
async fn fail(f: &Fixture, job: WebhookJob, pause: Duration) {
    let news = ReceiverNews::Fails { before: job.failures, pause };
    f.store.finish_webhook_jobs(&[finish_of(job, WebhookEnding::Retry(Duration::ZERO), 500, news)]).await.unwrap();
}

/// Claims a webhook and delivers it.
pub(crate) async fn deliver(f: &Fixture) {
    let job = claim(f).await.remove(0);
    assert_eq!(finish(f, job, WebhookEnding::Delivered, 200).await, Finished::Written);
}

/// Makes the receiver of `url` known to work.
async fn proven(f: &Fixture, url: &str) {
    told_at(f, url).await;
    deliver(f).await;
}

async fn state(f: &Fixture, id: Uuid) -> shared::contract::WebhookState {
    f.state(id).await.webhook.unwrap()
}
