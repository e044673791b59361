//! Deliveries, their outcomes, and their log.

use super::*;

#[tokio::test]
async fn a_delivery_is_retried_and_then_delivered_and_the_last_answer_is_kept() {
    let f = Fixture::new().await;
    let id = told(&f).await;
    let job = claim(&f).await.remove(0);
    assert!(claim(&f).await.is_empty(), "it is leased");
    finish(&f, job, WebhookEnding::Retry(Duration::ZERO), 500).await;
    let waiting = state(&f, id).await;
    assert_eq!((waiting.status, waiting.attempts, waiting.last_status), (WebhookStatus::Pending, 1, Some(500)));
    assert!(waiting.next_attempt_at.is_some() && waiting.last_attempt_at.is_some());
    let job = claim(&f).await.remove(0);
    assert_eq!(job.attempt, 2);
    finish(&f, job, WebhookEnding::Delivered, 204).await;
    let done = state(&f, id).await;
    assert_eq!((done.status, done.attempts, done.last_status, done.next_attempt_at), (WebhookStatus::Delivered, 2, Some(204), None));
}

#[tokio::test]
async fn an_exhausted_delivery_is_kept() {
    let f = Fixture::new().await;
    let id = told(&f).await;
    let job = claim(&f).await.remove(0);
    finish(&f, job, WebhookEnding::Exhausted(WebhookFailure::Gone), 410).await;
    assert_eq!(state(&f, id).await.status, WebhookStatus::Exhausted);
    assert!(claim(&f).await.is_empty());
}

#[tokio::test]
async fn a_worker_killed_between_sending_and_finishing_leads_to_a_second_delivery_and_is_fenced_off() {
    let f = Fixture::new().await;
    let request = told(&f).await;
    let killed = claim(&f).await.remove(0);
    f.run(
        "update jobs set leased_until = now() - interval '1 s' where lease_token is not null;
        update receivers set probe_at = now() - interval '1 s'",
    )
    .await;
    let second = claim(&f).await.remove(0);
    assert_eq!(second.request.id, killed.request.id, "the webhook-id follows from the request: it is the same");
    assert_eq!(finish(&f, killed, WebhookEnding::Exhausted(WebhookFailure::AttemptsExhausted), 500).await, Finished::LeaseLost);
    assert_eq!(finish(&f, second, WebhookEnding::Delivered, 200).await, Finished::Written);
    let log = f.store.deliveries(request, None).await.unwrap().unwrap().deliveries;
    let outcomes: Vec<_> = log.iter().map(|attempt| attempt.outcome).collect();
    assert_eq!(outcomes, [DeliveryOutcome::Unknown, DeliveryOutcome::Delivered]);
}

#[tokio::test]
async fn workers_that_die_again_and_again_use_up_no_try_of_the_schedule() {
    let f = Fixture::new().await;
    let id = told(&f).await;
    for _ in 0..20 {
        let killed = claim(&f).await.remove(0);
        assert_eq!(killed.attempt, 1);
        f.run(
            "update jobs set leased_until = now() - interval '1 s' where lease_token is not null;
            update receivers set probe_at = now() - interval '1 s'",
        )
        .await;
    }
    let job = claim(&f).await.remove(0);
    finish(&f, job, WebhookEnding::Retry(Duration::ZERO), 500).await;
    assert_eq!(state(&f, id).await.attempts, 1);
    assert_eq!(claim(&f).await[0].attempt, 2);
    assert_eq!(f.store.deliveries(id, None).await.unwrap().unwrap().deliveries.len(), 22, "the log has each of them");
}

#[tokio::test]
async fn a_receiver_that_is_given_up_keeps_the_attempt_that_a_crash_cut() {
    let f = Fixture::new().await;
    let id = told(&f).await;
    let job = claim(&f).await.remove(0);
    fail(&f, job, Duration::ZERO).await;
    let cut = claim(&f).await.remove(0);
    let log = f.store.deliveries(id, None).await.unwrap().unwrap().deliveries;
    assert_eq!(log.iter().map(|entry| entry.outcome).collect::<Vec<_>>(), [DeliveryOutcome::Failed, DeliveryOutcome::Sending]);
    let long_ago = "update receivers set failing_since = now() - interval '3 days', probe_at = now();
        update jobs set next_run_at = next_run_at - interval '3 days', leased_at = leased_at - interval '2 days' where kind = 'webhook';";
    f.run(long_ago).await;
    let age = Duration::from_hours(24);
    assert_eq!(f.store.exhaust_webhooks_of_lost_receivers(age, 10).await.unwrap(), 0, "it is being sent");
    f.run("update jobs set leased_until = now() - interval '1 min' where kind = 'webhook'").await;
    assert_eq!(f.store.exhaust_webhooks_of_lost_receivers(age, 10).await.unwrap(), 0, "its worker may still write what became of it");
    f.run("update jobs set leased_until = now() - interval '25 h' where kind = 'webhook'").await;
    assert_eq!(f.store.exhaust_webhooks_of_lost_receivers(age, 10).await.unwrap(), 1);
    let log = f.store.deliveries(id, None).await.unwrap().unwrap().deliveries;
    let log: Vec<_> = log.iter().map(|entry| (entry.number, entry.outcome)).collect();
    assert_eq!(log, [(1, DeliveryOutcome::Failed), (2, DeliveryOutcome::Unknown)]);
    drop(cut);
}

#[tokio::test]
async fn the_delivery_log_of_a_request_has_a_bound() {
    let f = Fixture::new().await;
    let id = told(&f).await;
    for _ in 0..3 {
        deliver(&f).await;
        f.store.replay(id, None).await.unwrap();
    }
    f.run(
        "update jobs set attempt = 250, excused = 250 where kind = 'webhook';
        insert into attempts (job_id, number, finished_at, outcome)
        select j.id, n, now(), 'try_again' from jobs j, generate_series(4, 250) n where j.kind = 'webhook'",
    )
    .await;
    deliver(&f).await;
    let log = f.store.deliveries(id, None).await.unwrap().unwrap().deliveries;
    assert_eq!((log.len(), log[0].number, log[99].number), (100, 152, 251));
    assert_eq!(f.number("select count(*) from attempts a join jobs j on j.id = a.job_id where j.kind = 'webhook'").await, 100);
}
