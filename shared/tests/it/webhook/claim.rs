//! Claiming: fair shares, and no job twice.

use super::*;

#[tokio::test]
async fn ten_thousand_due_jobs_of_a_dead_receiver_do_not_delay_one_of_a_healthy_one() {
    let f = Fixture::new().await;
    proven(&f, "http://healthy.example/").await;
    flood(&f, "http://dead.example/", 10_000, false).await;
    // Once the dead receiver is known to fail, it has one job at a time, and none while its pause lasts.
    let job = claim(&f).await.remove(0);
    fail(&f, job, Duration::from_mins(1)).await;
    let healthy = told_at(&f, "http://healthy.example/other").await;
    let jobs = claim(&f).await;
    assert_eq!(jobs.iter().map(|job| job.request.id).collect::<Vec<_>>(), [healthy]);
    // A receiver that works, and whose ten thousand jobs fill the share of one receiver, does not block others either.
    f.run("update receivers set failures = 0, failing_since = null").await;
    let slow = claim(&f).await;
    assert_eq!(slow.len(), 10);
    let healthy = told_at(&f, "http://healthy.example/again").await;
    let wanted = Wanted { per_receiver: 10, held: vec![held(slow[0].receiver, 10)], ..any_receiver(10) };
    let started = Instant::now();
    let found = claimed(&f, &wanted).await;
    assert_eq!(found.jobs.iter().map(|job| job.request.id).collect::<Vec<_>>(), [healthy]);
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
        let (found, stopped_at) = claimed_after(&f, &any_receiver(5), after).await;
        assert!(found.jobs.len() <= 5);
        after = stopped_at;
        served.extend(found.jobs.iter().map(|job| job.receiver));
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
        let (found, stopped_at) = claimed_after(&f, &any_receiver(1000), after).await;
        claims += 1;
        jobs += found.jobs.len();
        after = stopped_at;
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
    finish(&f, first.into_iter().next().unwrap(), WebhookEnding::Delivered, 200).await;
    let rest = claimed(&f, &Wanted { per_receiver: 3, ..any_receiver(10) }).await.jobs;
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
        prepare claim (uuid, int, int, uuid[], int[], bigint, bigint, float8, int, bigint, float8, int[], int[], bigint, bigint) as {sql};
        explain (analyze, timing off, summary on) execute claim ('{}', 256, 48, '{{}}', '{{}}', 16, 64, 60, 100, 16, 3600, '{{}}', '{{}}', 12, 8)",
        Uuid::nil(),
    );
    let rows = sqlx::raw_sql(sqlx::AssertSqlSafe(explained)).fetch_all(&mut connection).await.unwrap();
    let plan: Vec<String> = rows.iter().map(|row| sqlx::Row::get(row, 0)).collect();
    let plan = plan.join("\n");
    println!("{plan}");
    assert!(plan.contains("jobs_by_receiver"), "{plan}");
    assert!(!plan.contains("Seq Scan on jobs"), "{plan}");
}

#[tokio::test]
async fn what_was_claimed_and_could_not_be_read_is_given_back() {
    use sqlx::Connection;
    let f = Fixture::new().await;
    let id = told(&f).await;
    let mut other = f.connection().await;
    let mut other = other.begin().await.unwrap();
    sqlx::raw_sql("lock table messages in access exclusive mode").execute(&mut *other).await.unwrap();
    f.store.claim_webhook_jobs(&any_receiver(10), None, LEASE).await.expect_err("messages can't be read");
    other.rollback().await.unwrap();
    let job = claim(&f).await.remove(0);
    assert_eq!((job.attempt, state(&f, id).await.attempts), (1, 1), "it was not sent");
}

#[tokio::test]
async fn a_request_that_cannot_be_read_keeps_no_other_from_its_caller_and_its_receiver() {
    let f = Fixture::new().await;
    let good = told(&f).await;
    f.signed("b").await;
    let webhook = webhook_to("http://example.org/", [].into());
    let bad = f.accept(NewRequest { webhook: Some(webhook), ..f.request("b") }).await.id;
    f.run("update messages set body = '\\xff' where body = 'b'").await;
    let read = f.store.requests(&[good, bad]).await.unwrap();
    assert_eq!(read[&good].as_ref().unwrap().request.message, "a");
    assert!(matches!(read[&bad], Err(StoreError::Corrupt(_))));
    let claimed: Vec<_> = claim(&f).await.iter().map(|job| job.request.id).collect();
    assert_eq!(claimed, [good]);
    assert_eq!(f.number("select count(*) from jobs where lease_token is not null").await, 2, "it is not claimed again at once");
}
