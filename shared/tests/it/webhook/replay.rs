//! Sending a webhook again on request.

use super::*;

/// Makes all that is finished two days old.
const OLD: &str = "update requests set created_at = now() - interval '2 days';
    update jobs set finished_at = now() - interval '2 days' where state <> 'pending'";

#[tokio::test]
async fn asked_twice_at_once_a_webhook_is_sent_again_once_with_its_whole_schedule() {
    let f = Fixture::new().await;
    let id = told(&f).await;
    let job = claim(&f).await.remove(0);
    finish(&f, job, WebhookEnding::Exhausted(WebhookFailure::Gone), 410).await;
    let asked = join_all((0..8).map(|_| f.store.replay(id, Some(f.key)))).await;
    assert!(asked.into_iter().all(|answer| answer.unwrap() == Replay::Sending));
    let jobs = claim(&f).await;
    assert_eq!((jobs.len(), jobs[0].attempt), (1, 1));
    assert_eq!(f.store.replay(id, None).await.unwrap(), Replay::Sending, "while it is in flight, nothing changes");
    finish(&f, jobs.into_iter().next().unwrap(), WebhookEnding::Delivered, 200).await;
    assert!(claim(&f).await.is_empty());
    let log = f.store.deliveries(id, Some(f.key)).await.unwrap().unwrap();
    assert_eq!(log.deliveries.iter().map(|entry| entry.number).collect::<Vec<_>>(), [1, 2]);
    let first = &log.deliveries[0];
    assert_eq!((first.outcome, first.status, first.duration_ms), (DeliveryOutcome::Failed, Some(410), Some(7)));
    assert_eq!(first.response.as_deref(), Some("answer"));
    assert_eq!((log.webhook.unwrap().status, log.webhook_id), (WebhookStatus::Delivered, format!("msg_{}", id.simple())));
}

#[tokio::test]
async fn a_webhook_that_waits_for_its_next_try_is_sent_now_when_asked_for() {
    let f = Fixture::new().await;
    let id = told(&f).await;
    let job = claim(&f).await.remove(0);
    finish(&f, job, WebhookEnding::Retry(Duration::from_hours(2)), 500).await;
    assert!(claim(&f).await.is_empty());
    assert_eq!(f.store.replay(id, None).await.unwrap(), Replay::Sending);
    assert_eq!(claim(&f).await[0].attempt, 2, "it goes on in its schedule");
}

#[tokio::test]
async fn what_cannot_be_sent_again_is_told_apart() {
    let f = Fixture::new().await;
    let other = crate::fixture::new_key(&f.store, "other").await;
    let done = told(&f).await;
    let pending = f.accept(f.with_webhook("waits")).await.id;
    let silent = f.post("a").await;
    for (request, owner, expected) in [
        (pending, Some(f.key), Replay::NotFinal),
        (silent, Some(f.key), Replay::NoWebhook),
        (done, Some(other), Replay::Unknown),
        (Uuid::now_v7(), None, Replay::Unknown),
        (done, None, Replay::Sending),
    ] {
        assert_eq!(f.store.replay(request, owner).await.unwrap(), expected);
    }
    assert!(f.store.deliveries(done, Some(other)).await.unwrap().is_none());
    assert!(f.store.deliveries(silent, None).await.unwrap().unwrap().deliveries.is_empty());
}

#[tokio::test]
async fn a_replay_that_races_with_retention_is_sent_or_there_is_nothing_left_to_send() {
    let f = Fixture::new().await;
    // Its message is signed again in each round that retention wins.
    f.agree("100/60s").await;
    for round in 0..15 {
        let id = told(&f).await;
        deliver(&f).await;
        f.run(OLD).await;
        let (replayed, forgotten) = tokio::join!(f.store.replay(id, None), f.store.delete_ended_requests(Duration::from_hours(24), 100));
        forgotten.unwrap();
        let left = f.number(&format!("select count(*) from jobs where request_id = '{id}' and state = 'pending'")).await;
        match replayed.unwrap() {
            Replay::Sending => assert_eq!(left, 1, "round {round}"),
            Replay::Unknown => assert_eq!(left, 0, "round {round}"),
            other => panic!("{other:?}"),
        }
        if left == 1 {
            deliver(&f).await;
        }
    }
}

#[tokio::test]
async fn a_replay_that_retention_did_not_see_coming_stays() {
    use sqlx::Connection;
    let f = Fixture::new().await;
    let id = told(&f).await;
    deliver(&f).await;
    f.run(OLD).await;
    // Retention has picked the request and is about to lock its row, which another transaction still holds.
    let mut connection = f.connection().await;
    let mut holder = connection.begin().await.unwrap();
    sqlx::query("select from jobs where kind = 'webhook' for update").execute(&mut *holder).await.unwrap();
    let forgetting = f.store.delete_ended_requests(Duration::from_hours(24), 100);
    let replaying = async {
        sqlx::query("update jobs set state = 'pending', finished_at = null where kind = 'webhook'").execute(&mut *holder).await.unwrap();
        f.until_somebody_waits_for_a_lock().await;
        holder.commit().await.unwrap();
    };
    let (forgotten, ()) = tokio::join!(forgetting, replaying);
    forgotten.unwrap();
    assert_eq!(f.number(&format!("select count(*) from requests where id = '{id}'")).await, 1);
    assert_eq!(claim(&f).await.len(), 1);
}
