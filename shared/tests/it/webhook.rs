use std::time::Duration;

use shared::contract::WebhookStatus;
use shared::store::Finished;
use shared::store::sign_finish::Ending;
use shared::store::webhook_jobs::{Delivery, WebhookFinish, WebhookJob};
use uuid::Uuid;

use crate::fixture::{Fixture, LEASE, id};

async fn told(f: &Fixture) -> Uuid {
    let id = id(&f.accept(f.with_webhook("a")).await);
    let job = f.claim(1).await.remove(0);
    f.finish(job, Ending::Signed("s".to_owned())).await;
    id
}

async fn claim(f: &Fixture) -> Vec<WebhookJob> {
    f.store.claim_webhook_jobs(10, LEASE).await.unwrap().jobs
}

async fn finish(f: &Fixture, job: WebhookJob, ending: Delivery, status: u16) -> Finished {
    let finish = WebhookFinish { lease: job.lease, ending, status: Some(status), error: None };
    f.store.finish_webhook_jobs(&[finish]).await.unwrap()[0]
}

async fn state(f: &Fixture, id: Uuid) -> shared::contract::WebhookState {
    f.store.requests(&[id]).await.unwrap()[&id].request.webhook.clone().unwrap()
}

#[tokio::test]
async fn a_delivery_is_retried_and_then_delivered_and_the_last_answer_is_kept() {
    let f = Fixture::new().await;
    let id = told(&f).await;
    let job = claim(&f).await.remove(0);
    assert!(claim(&f).await.is_empty(), "it is leased");
    finish(&f, job, Delivery::Retry(Duration::ZERO), 500).await;
    let waiting = state(&f, id).await;
    assert_eq!((waiting.status, waiting.attempts, waiting.last_status), (WebhookStatus::Pending, 1, Some(500)));
    assert!(waiting.next_attempt_at.is_some() && waiting.last_attempt_at.is_some());
    let job = claim(&f).await.remove(0);
    assert_eq!(job.attempt, 2);
    finish(&f, job, Delivery::Delivered, 204).await;
    let done = state(&f, id).await;
    assert_eq!((done.status, done.attempts, done.last_status, done.next_attempt_at), (WebhookStatus::Delivered, 2, Some(204), None));
}

#[tokio::test]
async fn an_exhausted_delivery_is_kept() {
    let f = Fixture::new().await;
    let id = told(&f).await;
    let job = claim(&f).await.remove(0);
    finish(&f, job, Delivery::Exhausted("gone"), 410).await;
    assert_eq!(state(&f, id).await.status, WebhookStatus::Exhausted);
    assert!(claim(&f).await.is_empty());
}

#[tokio::test]
async fn a_worker_killed_between_sending_and_finishing_leads_to_a_second_delivery_and_is_fenced_off() {
    let f = Fixture::new().await;
    told(&f).await;
    let killed = claim(&f).await.remove(0);
    f.run("update jobs set next_run_at = now() - interval '1 s' where lease_token is not null").await;
    let second = claim(&f).await.remove(0);
    assert_eq!(second.request.id, killed.request.id, "the webhook-id follows from the request: it is the same");
    assert_eq!(finish(&f, killed, Delivery::Exhausted("exhausted"), 500).await, Finished::LeaseLost);
    assert_eq!(finish(&f, second, Delivery::Delivered, 200).await, Finished::Written);
}
