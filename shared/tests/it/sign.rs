use std::collections::HashSet;
use std::time::Duration;

use futures_util::future::join_all;
use shared::contract::Status;
use shared::store::Finished;
use shared::store::low_water::LowWater;
use shared::store::sign_finish::{Call, Failure, SignEnding, SignFinish, UpstreamNews};
use shared::store::sign_overdue::Scan;
use sqlx::Connection;

use crate::fixture::{EXPIRE, Fixture, LEASE, finish};

/// Makes every retry long overdue.
const OVERDUE: &str = "update jobs set next_run_at = now() - interval '10 min' where lane = 1 and lease_token is null";

/// Frees every slot.
const FREE: &str = "update upstream_slots set free_at = now()";

#[tokio::test]
async fn no_more_jobs_are_claimed_than_there_are_slots_and_none_twice() {
    let f = Fixture::new().await;
    f.post_many(50).await;
    let claims = join_all((0..8).map(|_| f.claim(4))).await;
    let jobs: Vec<_> = claims.iter().flatten().map(|job| job.message.text()).collect();
    assert_eq!(jobs.len(), 10);
    assert_eq!(jobs.iter().collect::<HashSet<_>>().len(), 10);
    assert!(f.claim(10).await.is_empty());
    assert_eq!(f.number("select count(distinct lease_token) from upstream_slots").await, 10);
}

#[tokio::test]
async fn a_slot_is_free_one_window_after_the_answer_and_not_before() {
    let f = Fixture::new().await;
    f.post_many(2).await;
    let taken = "select extract(epoch from max(free_at) - now())::bigint from upstream_slots where uses > 0";
    let job = f.claim(1).await.remove(0);
    let until_the_lease_ends_and_a_window = f.number(taken).await;
    assert!((118..=121).contains(&until_the_lease_ends_and_a_window), "{until_the_lease_ends_and_a_window}");
    f.finish(job, SignEnding::Retry(Duration::from_secs(1))).await;
    let a_window = f.number(taken).await;
    assert!((58..=61).contains(&a_window), "{a_window}");
}

#[tokio::test]
async fn a_call_that_was_never_made_gives_its_slot_back_at_once() {
    let f = Fixture::new().await;
    f.agree("1/60s").await;
    f.post_many(2).await;
    let job = f.claim(1).await.remove(0);
    assert!(f.claim(1).await.is_empty());
    f.store.finish_sign_jobs(&[SignFinish { call: Call::NotMade, ..finish(job, SignEnding::Released) }]).await.unwrap();
    let again = f.claim(1).await.remove(0);
    assert_eq!((again.message.text(), again.attempt), ("message 0", 1), "it kept its place, and the attempt does not count");
}

#[tokio::test]
async fn a_retry_that_was_never_called_keeps_its_place_among_the_retries() {
    let f = Fixture::new().await;
    f.post_many(2).await;
    f.run(
        "update jobs set lane = 1, created_at = now() - interval '3 h', next_run_at = now() - interval '2 h' where id = (select min(id) from jobs);
        update jobs set lane = 1, created_at = now() - interval '9 h', next_run_at = now() - interval '1 h' where id = (select max(id) from jobs)",
    )
    .await;
    let claimed = f.claim(2).await;
    assert_eq!(claimed.len(), 2);
    for job in claimed {
        f.store.finish_sign_jobs(&[SignFinish { call: Call::NotMade, ..finish(job, SignEnding::Released) }]).await.unwrap();
    }
    assert_eq!(f.claim(1).await[0].message.text(), "message 0", "it has been due for longer, though the other one is older");
}

#[tokio::test]
async fn a_message_that_cannot_be_read_keeps_no_other_from_being_claimed() {
    let f = Fixture::new().await;
    f.post_many(3).await;
    f.run("update messages set body = '\\xff' where body = 'message 1'").await;
    let claimed: Vec<_> = f.claim(3).await.iter().map(|job| job.message.text().to_owned()).collect();
    assert_eq!(claimed, ["message 0", "message 2"]);
    assert_eq!(f.number("select count(*) from jobs where lease_token is not null").await, 3, "it is not claimed again at once");
}

#[tokio::test]
async fn an_outcome_that_is_held_up_after_others_of_its_batch_were_written_is_told_from_a_lost_lease() {
    let f = Fixture::new().await;
    f.post_many(2).await;
    let jobs = f.claim(2).await;
    // One of them has got a request that the first write does not see, and somebody holds it when it is written again.
    f.run("update jobs set attached = 7 where id = (select max(id) from jobs)").await;
    let mut connection = f.connection().await;
    let mut holder = connection.begin().await.unwrap();
    sqlx::raw_sql("select from jobs where attached = 7 for no key update").execute(&mut *holder).await.unwrap();
    let finishes: Vec<_> = jobs.into_iter().map(|job| finish(job, SignEnding::Signed("s".to_owned()))).collect();
    assert_eq!(f.store.finish_sign_jobs(&finishes).await.unwrap(), [Finished::Written, Finished::HeldUp]);
    holder.rollback().await.unwrap();
    assert_eq!(f.store.finish_sign_jobs(&finishes[1..]).await.unwrap(), [Finished::Written]);
}

#[tokio::test]
async fn a_stale_worker_changes_nothing_and_the_new_one_is_not_disturbed() {
    let f = Fixture::new().await;
    let id = f.post("a").await;
    let stale = f.claim(1).await.remove(0);
    f.run(EXPIRE).await;
    let fresh = f.claim(1).await.remove(0);
    assert_eq!(fresh.attempt, 2);
    assert_eq!(f.finish(stale, SignEnding::Signed("stale".to_owned())).await, Finished::LeaseLost);
    let state = f.state(id).await;
    assert_eq!((state.status, state.signature), (Status::Pending, None));
    assert_eq!(f.number("select count(*) from attempts where outcome is null").await, 1, "the first one's outcome is unknown");
    assert_eq!(f.finish(fresh, SignEnding::Signed("fresh".to_owned())).await, Finished::Written);
    let state = f.state(id).await;
    assert_eq!(state.signature.as_deref(), Some("fresh"));
}

#[tokio::test]
async fn finishing_twice_is_told_as_a_lost_lease() {
    let f = Fixture::new().await;
    f.post("a").await;
    let job = f.claim(1).await.remove(0);
    let finishes = [finish(job, SignEnding::Signed("s".to_owned()))];
    assert_eq!(f.store.finish_sign_jobs(&finishes).await.unwrap(), [Finished::Written]);
    assert_eq!(f.store.finish_sign_jobs(&finishes).await.unwrap(), [Finished::LeaseLost]);
}

#[tokio::test]
async fn a_signature_answers_every_request_that_waits_and_each_gets_its_own_webhook() {
    let f = Fixture::new().await;
    let requests = [f.with_webhook("a"), f.with_webhook("a"), f.request("a")];
    f.store.accept(&requests, u64::MAX).await.unwrap();
    let job = f.claim(1).await.remove(0);
    f.finish(job, SignEnding::Signed("s".to_owned())).await;
    let ids: Vec<_> = requests.iter().map(|request| request.id).collect();
    let states = f.states(&ids).await;
    assert!(states.values().all(|state| state.request.status == Status::Signed));
    assert_eq!(f.number("select count(*) from jobs where kind = 'webhook'").await, 2);
}

#[tokio::test]
async fn a_group_is_written_whole_but_for_the_leases_that_were_lost() {
    let f = Fixture::new().await;
    f.post_many(3).await;
    let mut jobs = f.claim(3).await;
    f.run("update jobs set lease_token = gen_random_uuid() where id = (select min(id) from jobs)").await;
    jobs.sort_by_key(|job| job.message.text().to_owned());
    let finishes: Vec<_> = jobs.into_iter().map(|job| finish(job, SignEnding::Signed("s".to_owned()))).collect();
    let finished = f.store.finish_sign_jobs(&finishes).await.unwrap();
    assert_eq!(finished.iter().filter(|finished| **finished == Finished::LeaseLost).count(), 1);
    assert_eq!(f.number("select count(*) from jobs where signature is not null").await, 2);
}

#[tokio::test]
async fn first_tries_go_first_and_every_fifth_use_of_a_slot_prefers_a_retry_that_waited_for_long() {
    let f = Fixture::new().await;
    f.post_many(10).await;
    for job in f.claim(10).await {
        f.finish(job, SignEnding::Retry(Duration::ZERO)).await;
    }
    let fresh: Vec<_> = (0..40).map(|n| f.request(&format!("fresh {n}"))).collect();
    f.store.accept(&fresh, u64::MAX).await.unwrap();
    f.run(FREE).await;
    assert!(f.claim(5).await.iter().all(|job| job.attempt == 1), "retries that are just due wait for first tries");
    let mut retries = Vec::new();
    for _ in 0..3 {
        f.run(FREE).await;
        f.run(OVERDUE).await;
        let jobs = f.claim(10).await;
        assert_eq!(jobs.len(), 10);
        retries.push(jobs.iter().filter(|job| job.attempt > 1).count());
    }
    assert_eq!(retries, [2, 2, 2], "a fifth of 30 calls");
}

#[tokio::test]
async fn with_a_single_slot_retries_still_get_their_share() {
    let f = Fixture::new().await;
    f.agree("1/60s").await;
    f.post_many(20).await;
    let mut attempts = Vec::new();
    for _ in 0..15 {
        f.run(FREE).await;
        f.run(OVERDUE).await;
        let job = f.claim(1).await.remove(0);
        attempts.push(job.attempt);
        f.finish(job, SignEnding::Retry(Duration::ZERO)).await;
    }
    assert_eq!(attempts.iter().filter(|attempt| **attempt > 1).count(), 3, "{attempts:?}");
}

#[tokio::test]
async fn the_claim_says_when_the_next_job_can_be_claimed() {
    let f = Fixture::new().await;
    assert_eq!(f.claimed(1).await.unwrap().next_in, None);
    f.post("a").await;
    let job = f.claim(1).await.remove(0);
    f.finish(job, SignEnding::Retry(Duration::from_secs(30))).await;
    let next = f.claimed(1).await.unwrap().next_in.unwrap();
    assert!((Duration::from_secs(28)..=Duration::from_secs(30)).contains(&next), "{next:?}");
    f.run("update upstream_slots set free_at = now() + interval '50 s'").await;
    let next = f.claimed(1).await.unwrap().next_in.unwrap();
    assert!((Duration::from_secs(48)..=Duration::from_secs(50)).contains(&next), "{next:?}");
}

#[tokio::test]
async fn a_claim_that_found_less_than_was_wanted_says_when_there_is_something_else() {
    let f = Fixture::new().await;
    let found = async |most| {
        let claimed = f.claimed(most).await.unwrap();
        (claimed.jobs.len(), claimed.next_in.map(|next| (next.as_secs() + 5) / 10))
    };
    f.post("a").await;
    assert_eq!(found(2).await, (1, None), "nothing else waits");
    f.post("b").await;
    f.run("update jobs set next_run_at = now() + interval '30 s' where lease_token is null").await;
    f.post("c").await;
    assert_eq!(found(2).await, (1, Some(3)), "when the next one is due");
    f.post_many(3).await;
    f.run("update upstream_slots set free_at = now() + interval '50 s' where lease_token is null").await;
    f.run("update upstream_slots set free_at = now() where slot = (select min(slot) from upstream_slots where lease_token is null)").await;
    assert_eq!(found(9).await, (1, Some(5)), "when the next slot is free");
    assert_eq!(found(9).await, (0, Some(5)));
}

#[tokio::test]
async fn what_waits_past_its_deadline_is_found_even_when_no_claim_reaches_it() {
    let f = Fixture::new().await;
    let late = f.accept(f.with_webhook("late")).await;
    f.run("update jobs set created_at = now() - interval '2 days', next_run_at = now() - interval '2 days'").await;
    f.post("late, but due since its call met an upstream that was down").await;
    f.run("update jobs set created_at = now() - interval '2 days'; update upstream set paused_until = 'infinity'").await;
    f.post("in time").await;
    let overdue = async |look| f.store.claim_overdue_sign_jobs(Duration::from_hours(24), look, 10, LEASE).await.unwrap();
    let found = overdue(Scan::OfThoseDueFirst).await;
    assert_eq!((found.len(), overdue(Scan::OfThoseDueFirst).await.len(), overdue(Scan::Full).await.len()), (1, 0, 1));
    let ends: Vec<_> = found
        .into_iter()
        .map(|(lease, digest)| SignFinish::without_call(lease, digest, SignEnding::Failed(Failure::DeadlineExceeded), UpstreamNews::None))
        .collect();
    f.store.finish_sign_jobs(&ends).await.unwrap();
    let id = late.id;
    let state = f.state(id).await;
    assert_eq!((state.status, state.attempts), (Status::Failed, 0));
    assert_eq!(state.last_error.unwrap().code, "deadline-exceeded");
    assert_eq!(f.number("select count(*) from jobs where kind = 'webhook'").await, 1);
}

#[tokio::test]
async fn places_in_the_queue_count_first_tries_before_retries() {
    let f = Fixture::new().await;
    let first = f.post("first").await;
    let job = f.claim(1).await.remove(0);
    f.finish(job, SignEnding::Retry(Duration::from_secs(5))).await;
    let (second, third) = (f.post("second").await, f.post("third").await);
    let forecast = f.store.forecast(LowWater::default()).await.unwrap().0;
    let states = f.states(&[first, second, third]).await;
    let place = |id| forecast.place(states[&id].waiting.unwrap());
    assert_eq!([first, second, third].map(|id| place(id).position), [3, 1, 2]);
    let busy = "update upstream_slots set free_at = now() + case slot when 5 then interval '0' else interval '30 s' end";
    f.run(busy).await;
    let forecast = f.store.forecast(LowWater::default()).await.unwrap().0;
    let wait = |id| (forecast.place(states[&id].waiting.unwrap()).expected_at - forecast.at).whole_seconds();
    assert_eq!((wait(second), wait(third)), (0, 29), "one slot is free, the next one later");
}

#[tokio::test]
async fn an_attempt_that_was_cut_by_a_crash_reads_outcome_unknown_and_its_call_stays_counted() {
    let f = Fixture::new().await;
    let id = f.post("a").await;
    let lost = f.claim(1).await.remove(0);
    let error = async || f.state(id).await.last_error.map(|error| error.code);
    assert_eq!(error().await, None, "it is under way");
    f.run(EXPIRE).await;
    assert_eq!(error().await.as_deref(), Some("outcome-unknown"));
    let again = f.claim(1).await.remove(0);
    assert_eq!((again.attempt, error().await.as_deref()), (2, Some("outcome-unknown")));
    assert_eq!(f.number("select count(*) from upstream_slots where free_at > now() + interval '60 s'").await, 2, "both calls count");
    f.finish(again, SignEnding::Signed("s".to_owned())).await;
    drop(lost);
    assert_eq!(f.number("select count(*) from attempts where outcome is null").await, 1, "nobody knows how the first one ended");
}
