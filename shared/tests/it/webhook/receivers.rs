//! What the store knows about receivers: that they fail, are slow, are new, are gone.

use super::*;

#[tokio::test]
async fn what_a_process_may_have_of_one_receiver_is_its_own_bound_whatever_another_has() {
    let f = Fixture::new().await;
    proven(&f, "http://example.com/").await;
    for _ in 0..9 {
        told(&f).await;
    }
    let wanted = Wanted { per_receiver: 3, ..any_receiver(10) };
    let (one, other) = tokio::join!(claimed(&f, &wanted), claimed(&f, &wanted));
    assert_eq!((one.jobs.len(), other.jobs.len()), (3, 3));
    let full = Wanted { held: vec![held(one.jobs[0].receiver, 3)], ..wanted };
    assert!(claimed(&f, &full).await.jobs.is_empty());
}

#[tokio::test]
async fn a_receiver_is_an_address_in_which_what_looks_like_an_identifier_stands_for_any() {
    let f = Fixture::new().await;
    let same = async |one: &str, other: &str| {
        let receiver = |url| format!("receiver_of('00000000-0000-0000-0000-000000000001', '{url}')");
        f.number(&format!("select ({} = {})::int::bigint", receiver(one), receiver(other))).await == 1
    };
    for (one, other) in [
        ("http://a.example/hook?id=1001", "http://a.example/hook?id=10002#b"),
        ("http://a.example/orders/170/paid", "http://a.example/orders/4711/paid"),
        ("http://a.example/100/200/300", "http://a.example/400/500/600"),
        ("http://a.example/hook?a=1&order=ord_81f2a7&b=2", "http://a.example/hook?a=1&order=ord_22c9d1&b=2"),
        ("http://a.example/hook/V1StGXRZqkHiqmyTLbCd", "http://a.example/hook/fIYtNbMcRxa8oPqLzWvE"),
        ("http://a.example/ok-77aa1234", "http://a.example/ok-3f2a9c1d"),
        ("http://a.example/hook/0193f2a1-7c1e-7aaa-8000-2b1c3d4e5f60", "http://a.example/hook/0193f2a1-ffff-7aaa-8000-2b1c3d4e5f60"),
    ] {
        assert!(same(one, other).await, "{one} and {other}");
    }
    for (one, other) in [
        ("http://a.example/ok", "http://a.example/hangs"),
        ("http://a.example/ok-77aa1234", "http://a.example/hangs-3f2a9c1d"),
        ("http://a.example/v1/ok", "http://a.example/v2/ok"),
        ("http://a.example/", "http://b.example/"),
        ("http://a.example/", "http://a.example:8080/"),
        ("http://a.example/", "https://a.example/"),
        ("http://a.example/notifications", "http://a.example/notification"),
        ("http://a.example/webhook1", "http://a.example/webhook2"),
        ("http://a.example/receivers/1", "http://a.example/receivers/2"),
        ("http://a.example/hook?mode=ok", "http://a.example/hook?mode=hangs"),
        ("http://a.example/hook?after=1s", "http://a.example/hook?after=20s"),
        ("http://a.example/ge%C3%A4ndert", "http://a.example/gel%C3%B6scht"),
        ("http://a.example/ge%c3%a4ndert", "http://a.example/gel%c3%b6scht"),
        ("http://a.example/?to=https%3A%2F%2Fx.example%2Fok", "http://a.example/?to=https%3A%2F%2Fx.example%2Fhangs"),
        ("http://a.example/payment-completed-v1", "http://a.example/payment-refunded-v1"),
    ] {
        assert!(!same(one, other).await, "{one} and {other}");
    }
}

/// As many as one message may have, told in one statement, which may take ten seconds.
#[tokio::test]
async fn ten_thousand_receivers_with_the_worst_addresses_are_told_apart_in_time() {
    let f = Fixture::new().await;
    for part in ["a1b2c3de/", "ab-a1b2c3de/", "ab-", "a1b2", "%C3", "a/", "1"] {
        let addresses = format!("'http://a.example/' || repeat('{part}', 2000 / {}) || n", part.len());
        let count = format!("select count(receiver_of(gen_random_uuid(), {addresses})) from generate_series(1, 10000) n");
        let began = std::time::Instant::now();
        assert_eq!(f.number(&count).await, 10_000);
        println!("{part}: {:?}", began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(8), "{part}: {:?}", began.elapsed());
    }
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
    let fails = |job: WebhookJob| {
        finish_of(job, WebhookEnding::Retry(Duration::ZERO), 500, ReceiverNews::Fails { before: 0, pause: Duration::ZERO })
    };
    let mut finishes: Vec<_> = jobs.into_iter().map(fails).collect();
    let last = finishes.pop().unwrap();
    let second = finishes.pop().unwrap();
    f.store.finish_webhook_jobs(&finishes).await.unwrap();
    f.store.finish_webhook_jobs(&[second]).await.unwrap();
    assert_eq!(f.number("select failures::bigint from receivers").await, 1);
    let works = WebhookFinish { receiver: ReceiverNews::Works { slow: false }, ending: WebhookEnding::Delivered, ..last };
    f.store.finish_webhook_jobs(&[works]).await.unwrap();
    assert_eq!(f.number("select failures::bigint from receivers where failing_since is null").await, 0);
}

#[tokio::test]
async fn a_probe_that_is_given_back_lets_the_next_one_follow_at_once() {
    let f = Fixture::new().await;
    told(&f).await;
    let job = claim(&f).await.remove(0);
    let news = ReceiverNews::None { before: job.failures };
    f.store.finish_webhook_jobs(&[finish_of(job, WebhookEnding::Released, 0, news)]).await.unwrap();
    assert_eq!(claim(&f).await.len(), 1);
}

#[tokio::test]
async fn a_job_that_waits_is_announced_with_the_time_of_its_receivers_probe() {
    let f = Fixture::new().await;
    told(&f).await;
    let job = claim(&f).await.remove(0);
    fail(&f, job, Duration::from_secs(30)).await;
    let next = claimed(&f, &any_receiver(10)).await.next_in.unwrap();
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
    // No worker probed it in time: the failing period begins anew.
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
    // This job has been due for just as long, because no worker was running; its receiver did nothing wrong.
    let patient = told_at(&f, "http://patient.example/").await;
    f.run("update jobs set next_run_at = now() - interval '2 days' where state = 'pending'").await;
    assert_eq!(f.store.exhaust_webhooks_of_lost_receivers(age, 10).await.unwrap(), 1);
    assert_eq!(state(&f, lost).await.status, WebhookStatus::Exhausted);
    assert_eq!(state(&f, patient).await.status, WebhookStatus::Pending);
    assert_eq!(f.store.replay(lost, None).await.unwrap(), Replay::Sending);
}

#[tokio::test]
async fn receivers_that_nobody_needs_are_deleted() {
    let f = Fixture::new().await;
    proven(&f, "http://old.example/").await;
    told_at(&f, "http://busy.example/").await;
    let job = claim(&f).await.remove(0);
    fail(&f, job, Duration::ZERO).await;
    f.run("update receivers set changed_at = now() - interval '2 days'").await;
    f.store.delete_idle_receivers(Duration::from_hours(24), 10).await.unwrap();
    assert_eq!(f.number("select count(*) from receivers").await, 1);
}

#[tokio::test]
async fn more_idle_receivers_than_fit_into_one_statement_are_deleted_by_the_next() {
    let f = Fixture::new().await;
    f.run("insert into receivers (receiver, changed_at) select gen_random_uuid(), now() - interval '2 days' from generate_series(1, 25)")
        .await;
    let mut deleted = Vec::new();
    for _ in 0..4 {
        deleted.push(f.store.delete_idle_receivers(Duration::from_hours(24), 10).await.unwrap());
    }
    assert_eq!(deleted, [10, 10, 5, 0]);
}

#[tokio::test]
async fn among_two_hundred_that_fail_a_new_receiver_is_told_at_once_and_each_has_its_turn() {
    let f = Fixture::new().await;
    flood(&f, "http://hangs.example/", 199, true).await;
    f.run("insert into receivers (receiver, failures) select receiver, 2 from jobs where kind = 'webhook'").await;
    let wanted = Wanted { newcomers: room(20), troubled: room(20), ..any_receiver(100) };
    let mut served = std::collections::HashSet::new();
    for round in 0..10 {
        let new = told_at(&f, &format!("http://new{round}.example/")).await;
        let jobs = claimed(&f, &wanted).await.jobs;
        assert_eq!(jobs.len(), 21, "round {round}");
        for job in jobs {
            if job.request.id == new {
                finish(&f, job, WebhookEnding::Delivered, 200).await;
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
    let wanted = Wanted { newcomers: room(20), ..any_receiver(100) };
    let last = told_at(&f, "http://last.example/").await;
    let mut order = Vec::new();
    for _ in 0..4 {
        order.extend(claimed(&f, &wanted).await.jobs.into_iter().map(|job| job.request.id));
    }
    assert_eq!(order.len(), 62);
    assert!(order[60..].contains(&last), "the others had been due for an hour, or were there before");
}

#[tokio::test]
async fn many_unknown_receivers_of_one_server_leave_room_for_those_of_others() {
    let f = Fixture::new().await;
    for n in 0..30 {
        told_at(&f, &format!("http://dead.example/{n}")).await;
    }
    let other = told_at(&f, "http://works.example/").await;
    let wanted = Wanted { newcomers: Room { in_all: 24, of_one_server: 12 }, ..any_receiver(100) };
    let jobs = claimed(&f, &wanted).await.jobs;
    assert_eq!(jobs.len(), 13);
    assert!(jobs.iter().any(|job| job.request.id == other));
    // While they are under way, another one of the dead server waits, and one of a third server does not.
    let third = told_at(&f, "http://third.example/").await;
    let as_new = |job: &WebhookJob| Held { as_new: 1, ..held(job.receiver, 1) };
    let wanted = Wanted { held: jobs.iter().map(as_new).collect(), newcomers: Room { in_all: 11, of_one_server: 12 }, ..any_receiver(100) };
    let more = claimed(&f, &wanted).await.jobs;
    assert_eq!(more.iter().map(|job| job.request.id).collect::<Vec<_>>(), [third]);
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
        let held = Wanted { held: vec![held(jobs[0].receiver, 1)], ..any_receiver(10) };
        assert!(claimed(&f, &held).await.jobs.is_empty());
        let news = ReceiverNews::Works { slow };
        f.store.finish_webhook_jobs(&[finish_of(jobs.remove(0), WebhookEnding::Delivered, 200, news)]).await.unwrap();
    }
    let none_left = Wanted { troubled: room(0), newcomers: room(0), ..any_receiver(10) };
    assert_eq!(claimed(&f, &none_left).await.jobs.len(), 3);
}

#[tokio::test]
async fn one_tenant_cannot_make_anothers_receiver_look_dead() {
    let f = Fixture::new().await;
    let other = crate::fixture::new_key(&f.store, "other").await;
    proven(&f, "http://shared.example/hook").await;
    let webhook = webhook_to("http://shared.example/hook", [].into());
    let theirs = shared::store::accept::NewRequest { key: other, webhook: Some(webhook), ..f.request("a") };
    f.accept(theirs).await;
    let job = claim(&f).await.remove(0);
    fail(&f, job, Duration::from_hours(1)).await;
    let mine = told_at(&f, "HTTP://Shared.Example/hook").await;
    let jobs = claim(&f).await;
    assert_eq!((jobs.len(), jobs[0].request.id, jobs[0].failures), (1, mine, 0));
}

#[tokio::test]
async fn however_its_address_is_spelled_a_receiver_is_one() {
    let f = Fixture::new().await;
    for url in [
        "http:example.com/hook/1001",
        "http:/example.com/hook/1002",
        "http://example.com\\hook\\1003",
        "http://example.com:80/hook/1004",
        "http://example.com./hook/1005",
        "http://%65xample.com/hook/1006",
    ] {
        told_at(&f, url).await;
    }
    assert_eq!(f.number("select count(distinct receiver) from jobs where kind = 'webhook'").await, 1);
    assert_eq!(claim(&f).await.len(), 1, "one probe for all");
}
