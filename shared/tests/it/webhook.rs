use std::time::{Duration, Instant};

use futures_util::future::join_all;
use shared::contract::{DeliveryOutcome, WebhookStatus};
use shared::store::Finished;
use shared::store::deliveries::Replay;
use shared::store::webhook_claim::{ClaimedWebhooks, ReceiverId, Wanted, WebhookJob};
use shared::store::webhook_jobs::{Delivery, ReceiverNews, WebhookFinish};
use uuid::Uuid;

use crate::fixture::{Fixture, LEASE, id, webhook_to};

/// Stores a request with a webhook to `url` whose outcome is there.
async fn told_at(f: &Fixture, url: &str) -> Uuid {
    if f.number("select count(*) from jobs where signature is not null").await == 0 {
        f.signed("a").await;
    }
    let webhook = webhook_to(url, [("x".to_owned(), "y".to_owned())].into());
    let request = shared::store::accept::NewRequest { webhook: Some(webhook), ..f.request("a") };
    id(&f.accept(request).await)
}

async fn told(f: &Fixture) -> Uuid {
    told_at(f, "http://example.com/hook").await
}

/// As many webhooks to `url` that have been due for an hour; to receivers that are all different, if `scattered`.
async fn flood(f: &Fixture, url: &str, count: usize, scattered: bool) {
    let request = told_at(f, url).await;
    let receiver = if scattered { "gen_random_uuid()" } else { "null" };
    f.run(&format!(
        "with copies as (
            insert into requests (id, api_key_id, sign_job_id, payload_digest, webhook_url)
            select gen_random_uuid(), api_key_id, sign_job_id, payload_digest, webhook_url from requests, generate_series(1, {count})
            where id = '{request}'
            returning id
        )
        insert into jobs (kind, request_id, receiver, next_run_at) select 'webhook', id, {receiver}, now() - interval '1 h' from copies;
        analyze"
    ))
    .await;
}

async fn claimed(f: &Fixture, wanted: &Wanted) -> ClaimedWebhooks {
    f.store.claim_webhook_jobs(wanted, LEASE).await.unwrap()
}

async fn claim(f: &Fixture) -> Vec<WebhookJob> {
    claimed(f, &Wanted::up_to(10)).await.claimed.jobs
}

fn finish_of(job: WebhookJob, ending: Delivery, status: u16, receiver: ReceiverNews) -> WebhookFinish {
    let took = Duration::from_millis(7);
    WebhookFinish { lease: job.lease, ending, status: Some(status), error: None, took, response: Some(b"answer".to_vec()), receiver }
}

async fn finish(f: &Fixture, job: WebhookJob, ending: Delivery, status: u16) -> Finished {
    f.store.finish_webhook_jobs(&[finish_of(job, ending, status, ReceiverNews::Works { slow: false })]).await.unwrap()[0]
}

/// The receiver fails; the next probe may follow after `pause`.
async fn fail(f: &Fixture, job: WebhookJob, pause: Duration) {
    let news = ReceiverNews::Fails { before: job.failures, pause };
    f.store.finish_webhook_jobs(&[finish_of(job, Delivery::Retry(Duration::ZERO), 500, news)]).await.unwrap();
}

/// Claims a webhook and delivers it.
pub(crate) async fn deliver(f: &Fixture) {
    let job = claim(f).await.remove(0);
    assert_eq!(finish(f, job, Delivery::Delivered, 200).await, Finished::Written);
}

/// Makes the receiver of `url` known as one that works.
async fn proven(f: &Fixture, url: &str) {
    told_at(f, url).await;
    deliver(f).await;
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
    let request = told(&f).await;
    let killed = claim(&f).await.remove(0);
    f.run(
        "update jobs set leased_until = now() - interval '1 s' where lease_token is not null;
        update receivers set probe_at = now() - interval '1 s'",
    )
    .await;
    let second = claim(&f).await.remove(0);
    assert_eq!(second.request.id, killed.request.id, "the webhook-id follows from the request: it is the same");
    assert_eq!(finish(&f, killed, Delivery::Exhausted("exhausted"), 500).await, Finished::LeaseLost);
    assert_eq!(finish(&f, second, Delivery::Delivered, 200).await, Finished::Written);
    let log = f.store.deliveries(request, None).await.unwrap().unwrap().deliveries;
    let outcomes: Vec<_> = log.iter().map(|attempt| attempt.outcome).collect();
    assert_eq!(outcomes, [DeliveryOutcome::Unknown, DeliveryOutcome::Delivered]);
}

#[tokio::test]
async fn ten_thousand_due_jobs_of_a_dead_receiver_do_not_delay_one_of_a_healthy_one() {
    let f = Fixture::new().await;
    proven(&f, "http://healthy.example/").await;
    flood(&f, "http://dead.example/", 10_000, false).await;
    // Once known to fail, the dead one has one job at a time; and none, while its pause lasts.
    let job = claim(&f).await.remove(0);
    fail(&f, job, Duration::from_mins(1)).await;
    let healthy = told_at(&f, "http://healthy.example/other").await;
    let jobs = claim(&f).await;
    assert_eq!(jobs.iter().map(|job| job.request.id).collect::<Vec<_>>(), [healthy]);
    // Nor is a receiver in the way that works, and whose ten thousand jobs fill all the room that one receiver has.
    f.run("update receivers set failures = 0, failing_since = null").await;
    let slow = claim(&f).await;
    assert_eq!(slow.len(), 10);
    let healthy = told_at(&f, "http://healthy.example/again").await;
    let wanted = Wanted { per_receiver: 10, held: vec![(slow[0].receiver, 10)], ..Wanted::up_to(10) };
    let started = Instant::now();
    let found = claimed(&f, &wanted).await;
    assert_eq!(found.claimed.jobs.iter().map(|job| job.request.id).collect::<Vec<_>>(), [healthy]);
    println!("the claim took {:?}", started.elapsed());
}

#[tokio::test]
async fn receivers_share_a_claim_evenly_and_none_is_passed_over_for_ever() {
    let f = Fixture::new().await;
    for n in 0..12 {
        proven(&f, &format!("http://r{n}.example/")).await;
    }
    for n in 0..12 {
        for _ in 0..3 {
            told_at(&f, &format!("http://r{n}.example/")).await;
        }
    }
    let mut served: Vec<ReceiverId> = Vec::new();
    let mut after = None;
    for _ in 0..3 {
        let found = claimed(&f, &Wanted { after, ..Wanted::up_to(5) }).await;
        assert!(found.claimed.jobs.len() <= 5);
        after = found.stopped_at;
        served.extend(found.claimed.jobs.iter().map(|job| job.receiver));
    }
    served.sort_by_key(|receiver| format!("{receiver:?}"));
    served.dedup();
    assert_eq!(served.len(), 12, "three claims of five went once around");
}

#[tokio::test]
async fn more_receivers_than_one_walk_sees_are_all_reached() {
    let f = Fixture::new().await;
    flood(&f, "http://example.com/", 700, true).await;
    let mut after = None;
    let (mut claims, mut jobs) = (0, 0);
    loop {
        let found = claimed(&f, &Wanted { after, ..Wanted::up_to(1000) }).await;
        claims += 1;
        jobs += found.claimed.jobs.len();
        after = found.stopped_at;
        if after.is_none() {
            break;
        }
    }
    assert_eq!((claims, jobs), (3, 701));
}

#[tokio::test]
async fn a_receiver_that_nobody_knows_gets_one_delivery_and_then_as_many_as_there_is_room_for() {
    let f = Fixture::new().await;
    for _ in 0..5 {
        told(&f).await;
    }
    let first = claim(&f).await;
    assert_eq!((first.len(), first[0].failures), (1, 1));
    assert!(claim(&f).await.is_empty(), "one at a time");
    finish(&f, first.into_iter().next().unwrap(), Delivery::Delivered, 200).await;
    let rest = claimed(&f, &Wanted { per_receiver: 3, ..Wanted::up_to(10) }).await.claimed.jobs;
    assert_eq!((rest.len(), rest[0].failures), (3, 0));
}

#[tokio::test]
async fn two_workers_that_race_for_a_failing_receiver_make_one_probe() {
    let f = Fixture::new().await;
    proven(&f, "http://example.com/").await;
    for _ in 0..20 {
        told(&f).await;
    }
    f.run("update receivers set failures = 3, failing_since = now()").await;
    for _ in 0..5 {
        let claims = join_all((0..6).map(|_| claim(&f))).await;
        let mut jobs: Vec<WebhookJob> = claims.into_iter().flatten().collect();
        assert_eq!(jobs.len(), 1);
        fail(&f, jobs.remove(0), Duration::ZERO).await;
    }
}

#[tokio::test]
async fn workers_that_claim_at_once_never_get_the_same_job() {
    let f = Fixture::new().await;
    proven(&f, "http://example.com/").await;
    for _ in 0..40 {
        told(&f).await;
    }
    let mut seen: Vec<_> = Vec::new();
    for _ in 0..20 {
        seen.extend(join_all((0..4).map(|_| claim(&f))).await.into_iter().flatten().map(|job| job.request.id));
    }
    let all = seen.len();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!((all, seen.len()), (40, 40));
}

#[tokio::test]
async fn what_a_process_may_have_of_one_receiver_is_its_own_bound_whatever_another_has() {
    let f = Fixture::new().await;
    proven(&f, "http://example.com/").await;
    for _ in 0..9 {
        told(&f).await;
    }
    let wanted = Wanted { per_receiver: 3, ..Wanted::up_to(10) };
    let (one, other) = tokio::join!(claimed(&f, &wanted), claimed(&f, &wanted));
    assert_eq!((one.claimed.jobs.len(), other.claimed.jobs.len()), (3, 3));
    let full = Wanted { held: vec![(one.claimed.jobs[0].receiver, 3)], ..wanted };
    assert!(claimed(&f, &full).await.claimed.jobs.is_empty());
}

#[tokio::test]
async fn deliveries_that_fail_together_count_once_and_one_that_works_makes_up_for_them() {
    let f = Fixture::new().await;
    proven(&f, "http://example.com/").await;
    for _ in 0..4 {
        told(&f).await;
    }
    let jobs = claim(&f).await;
    assert_eq!(jobs.len(), 4);
    let fails =
        |job: WebhookJob| finish_of(job, Delivery::Retry(Duration::ZERO), 500, ReceiverNews::Fails { before: 0, pause: Duration::ZERO });
    let mut finishes: Vec<_> = jobs.into_iter().map(fails).collect();
    let last = finishes.pop().unwrap();
    let second = finishes.pop().unwrap();
    f.store.finish_webhook_jobs(&finishes).await.unwrap();
    f.store.finish_webhook_jobs(&[second]).await.unwrap();
    assert_eq!(f.number("select failures::bigint from receivers").await, 1);
    let works = WebhookFinish { receiver: ReceiverNews::Works { slow: false }, ending: Delivery::Delivered, ..last };
    f.store.finish_webhook_jobs(&[works]).await.unwrap();
    assert_eq!(f.number("select failures::bigint from receivers where failing_since is null").await, 0);
}

#[tokio::test]
async fn a_probe_that_is_given_back_lets_the_next_one_follow_at_once() {
    let f = Fixture::new().await;
    told(&f).await;
    let job = claim(&f).await.remove(0);
    let news = ReceiverNews::None { before: job.failures };
    f.store.finish_webhook_jobs(&[finish_of(job, Delivery::Released, 0, news)]).await.unwrap();
    assert_eq!(claim(&f).await.len(), 1);
}

#[tokio::test]
async fn a_job_that_waits_is_announced_with_the_time_of_its_receivers_probe() {
    let f = Fixture::new().await;
    told(&f).await;
    let job = claim(&f).await.remove(0);
    fail(&f, job, Duration::from_secs(30)).await;
    let next = claimed(&f, &Wanted::up_to(10)).await.claimed.next_in.unwrap();
    assert!(next > Duration::from_secs(25) && next <= Duration::from_secs(30), "{next:?}");
}

#[tokio::test]
async fn webhooks_of_a_receiver_that_is_lost_are_exhausted_in_the_end_and_others_are_not() {
    let f = Fixture::new().await;
    let lost = told_at(&f, "http://lost.example/").await;
    let job = claim(&f).await.remove(0);
    fail(&f, job, Duration::from_hours(1)).await;
    let age = Duration::from_hours(24);
    assert_eq!(f.store.exhaust_webhooks_of_lost_receivers(age, 10).await.unwrap(), 0);
    f.run(
        "update receivers set failing_since = now() - interval '2 days';
        update jobs set next_run_at = now() - interval '2 days' where state = 'pending'",
    )
    .await;
    // Nobody watched: the next failure begins a new time.
    f.run("update receivers set probe_at = now() - interval '2 h'").await;
    assert_eq!(f.store.exhaust_webhooks_of_lost_receivers(age, 10).await.unwrap(), 0);
    let job = claim(&f).await.remove(0);
    assert_eq!(f.number("select count(*) from receivers where failing_since > now() - interval '1 h'").await, 1);
    fail(&f, job, Duration::from_hours(1)).await;
    f.run(
        "update receivers set failing_since = now() - interval '2 days';
        update jobs set next_run_at = now() - interval '2 days' where state = 'pending'",
    )
    .await;
    // It has been due for as long, because no worker was there; its receiver did nothing wrong.
    let patient = told_at(&f, "http://patient.example/").await;
    f.run("update jobs set next_run_at = now() - interval '2 days' where state = 'pending'").await;
    assert_eq!(f.store.exhaust_webhooks_of_lost_receivers(age, 10).await.unwrap(), 1);
    assert_eq!(state(&f, lost).await.status, WebhookStatus::Exhausted);
    assert_eq!(state(&f, patient).await.status, WebhookStatus::Pending);
    assert_eq!(f.store.replay(lost, None).await.unwrap(), Replay::Sending);
}

#[tokio::test]
async fn receivers_that_nobody_needs_are_forgotten() {
    let f = Fixture::new().await;
    proven(&f, "http://old.example/").await;
    told_at(&f, "http://busy.example/").await;
    let job = claim(&f).await.remove(0);
    fail(&f, job, Duration::ZERO).await;
    f.run("update receivers set changed_at = now() - interval '2 days'").await;
    f.store.forget_receivers_and_secrets(Duration::from_hours(24), 10).await.unwrap();
    assert_eq!(f.number("select count(*) from receivers").await, 1);
}

#[tokio::test]
async fn more_receivers_to_forget_than_fit_into_one_statement_are_forgotten_by_the_next() {
    let f = Fixture::new().await;
    f.run("insert into receivers (receiver, changed_at) select gen_random_uuid(), now() - interval '2 days' from generate_series(1, 25)")
        .await;
    let mut forgotten = Vec::new();
    for _ in 0..4 {
        forgotten.push(f.store.forget_receivers_and_secrets(Duration::from_hours(24), 10).await.unwrap());
    }
    assert_eq!(forgotten, [10, 10, 5, 0]);
}

#[tokio::test]
async fn among_two_hundred_that_fail_a_new_receiver_is_told_at_once_and_each_has_its_turn() {
    let f = Fixture::new().await;
    flood(&f, "http://hangs.example/", 199, true).await;
    f.run("insert into receivers (receiver, failures) select receiver, 2 from jobs where kind = 'webhook'").await;
    let wanted = Wanted { newcomers: 20, troubled: 20, ..Wanted::up_to(100) };
    let mut served = std::collections::HashSet::new();
    for round in 0..10 {
        let new = told_at(&f, &format!("http://new{round}.example/")).await;
        let jobs = claimed(&f, &wanted).await.claimed.jobs;
        assert_eq!(jobs.len(), 21, "round {round}");
        for job in jobs {
            if job.request.id == new {
                finish(&f, job, Delivery::Delivered, 200).await;
            } else {
                assert!(served.insert(job.receiver), "round {round}: before each has had its turn");
                fail(&f, job, Duration::ZERO).await;
            }
        }
    }
    assert_eq!(served.len(), 200);
}

#[tokio::test]
async fn receivers_that_nobody_knows_are_tried_in_the_order_in_which_they_came() {
    let f = Fixture::new().await;
    flood(&f, "http://hangs.example/", 60, true).await;
    let wanted = Wanted { newcomers: 20, ..Wanted::up_to(100) };
    let last = told_at(&f, "http://last.example/").await;
    let mut order = Vec::new();
    for _ in 0..4 {
        order.extend(claimed(&f, &wanted).await.claimed.jobs.into_iter().map(|job| job.request.id));
    }
    assert_eq!(order.len(), 62);
    assert!(order[60..].contains(&last), "the others had been due for an hour, or were there before");
}

#[tokio::test]
async fn a_slow_receiver_has_one_delivery_at_a_time_in_a_process_until_it_is_quick_again() {
    let f = Fixture::new().await;
    for _ in 0..6 {
        told(&f).await;
    }
    for slow in [true, true, false] {
        let mut jobs = claim(&f).await;
        assert_eq!(jobs.len(), 1);
        let held = Wanted { held: vec![(jobs[0].receiver, 1)], ..Wanted::up_to(10) };
        assert!(claimed(&f, &held).await.claimed.jobs.is_empty());
        let news = ReceiverNews::Works { slow };
        f.store.finish_webhook_jobs(&[finish_of(jobs.remove(0), Delivery::Delivered, 200, news)]).await.unwrap();
    }
    let none_left = Wanted { troubled: 0, newcomers: 0, ..Wanted::up_to(10) };
    assert_eq!(claimed(&f, &none_left).await.claimed.jobs.len(), 3);
}

#[tokio::test]
async fn one_tenant_cannot_make_anothers_receiver_look_dead() {
    let f = Fixture::new().await;
    let other = crate::fixture::new_key(&f.store, "other").await;
    proven(&f, "http://shared.example/mine").await;
    let webhook = webhook_to("http://shared.example/theirs", [].into());
    let theirs = shared::store::accept::NewRequest { key: other, webhook: Some(webhook), ..f.request("a") };
    f.accept(theirs).await;
    let job = claim(&f).await.remove(0);
    fail(&f, job, Duration::from_hours(1)).await;
    let mine = told_at(&f, "HTTP://Shared.Example/again?x=y").await;
    let jobs = claim(&f).await;
    assert_eq!((jobs.len(), jobs[0].request.id, jobs[0].failures), (1, mine, 0));
}

#[tokio::test]
async fn however_its_address_is_spelled_a_receiver_is_one() {
    let f = Fixture::new().await;
    for url in [
        "http:example.com/1",
        "http:/example.com/2",
        "http://example.com\\3",
        "http://example.com:80",
        "http://example.com./",
        "http://%65xample.com/",
    ] {
        told_at(&f, url).await;
    }
    assert_eq!(f.number("select count(distinct receiver) from jobs where kind = 'webhook'").await, 1);
    assert_eq!(claim(&f).await.len(), 1, "one probe for all");
}

#[tokio::test]
async fn asked_twice_at_once_a_webhook_is_sent_again_once_with_its_whole_schedule() {
    let f = Fixture::new().await;
    let id = told(&f).await;
    let job = claim(&f).await.remove(0);
    finish(&f, job, Delivery::Exhausted("gone"), 410).await;
    let asked = join_all((0..8).map(|_| f.store.replay(id, Some(f.key)))).await;
    assert!(asked.into_iter().all(|answer| answer.unwrap() == Replay::Sending));
    let jobs = claim(&f).await;
    assert_eq!((jobs.len(), jobs[0].attempt), (1, 1));
    assert_eq!(f.store.replay(id, None).await.unwrap(), Replay::Sending, "while it is in flight, nothing changes");
    finish(&f, jobs.into_iter().next().unwrap(), Delivery::Delivered, 200).await;
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
    finish(&f, job, Delivery::Retry(Duration::from_hours(2)), 500).await;
    assert!(claim(&f).await.is_empty());
    assert_eq!(f.store.replay(id, None).await.unwrap(), Replay::Sending);
    assert_eq!(claim(&f).await[0].attempt, 2, "it goes on in its schedule");
}

#[tokio::test]
async fn what_cannot_be_sent_again_is_told_apart() {
    let f = Fixture::new().await;
    let other = crate::fixture::new_key(&f.store, "other").await;
    let done = told(&f).await;
    let pending = id(&f.accept(f.with_webhook("waits")).await);
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
    // Its message is signed anew in each round that retention wins.
    f.agree("100/60s").await;
    for round in 0..15 {
        let id = told(&f).await;
        deliver(&f).await;
        f.run(
            "update requests set created_at = now() - interval '2 days';
            update jobs set finished_at = now() - interval '2 days' where state <> 'pending'",
        )
        .await;
        let (replayed, forgotten) = tokio::join!(f.store.replay(id, None), f.store.forget(Duration::from_hours(24), 100));
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
    f.run(
        "update requests set created_at = now() - interval '2 days';
        update jobs set finished_at = now() - interval '2 days' where state <> 'pending'",
    )
    .await;
    // Retention has picked the request and is about to hold its row, which somebody else still does.
    let mut connection = f.connection().await;
    let mut holder = connection.begin().await.unwrap();
    sqlx::query("select from jobs where kind = 'webhook' for update").execute(&mut *holder).await.unwrap();
    let forgetting = f.store.forget(Duration::from_hours(24), 100);
    let replaying = async {
        sqlx::query("update jobs set state = 'pending', finished_at = null where kind = 'webhook'").execute(&mut *holder).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        holder.commit().await.unwrap();
    };
    let (forgotten, ()) = tokio::join!(forgetting, replaying);
    forgotten.unwrap();
    assert_eq!(f.number(&format!("select count(*) from requests where id = '{id}'")).await, 1);
    assert_eq!(claim(&f).await.len(), 1);
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

#[tokio::test]
async fn the_claim_walks_its_index_and_reads_no_table_whole() {
    let f = Fixture::new().await;
    proven(&f, "http://healthy.example/").await;
    flood(&f, "http://dead.example/", 10_000, false).await;
    flood(&f, "http://many.example/", 300, true).await;
    let sql = std::fs::read_dir("../.sqlx")
        .unwrap()
        .map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap())
        .map(|text| serde_json::from_str::<serde_json::Value>(&text).unwrap()["query"].as_str().unwrap().to_owned())
        .find(|sql| sql.starts_with("-- webhook.claim\n"))
        .unwrap();
    let mut connection = f.connection().await;
    let explained = format!(
        "set plan_cache_mode = force_generic_plan;
        prepare claim (uuid, int, int, uuid[], int[], bigint, bigint, float8, int, bigint) as {sql};
        explain (analyze, timing off, summary on) execute claim ('{}', 256, 48, '{{}}', '{{}}', 16, 64, 60, 100, 16)",
        Uuid::nil(),
    );
    let rows = sqlx::raw_sql(sqlx::AssertSqlSafe(explained)).fetch_all(&mut connection).await.unwrap();
    let plan: Vec<String> = rows.iter().map(|row| sqlx::Row::get(row, 0)).collect();
    let plan = plan.join("\n");
    println!("{plan}");
    assert!(plan.contains("jobs_by_receiver"), "{plan}");
    assert!(!plan.contains("Seq Scan on jobs"), "{plan}");
}
