//! The circuit breaker and the pauses of the upstream, which all workers share.

use std::time::Duration;

use futures_util::future::join_all;
use shared::call_error::CallError;
use shared::store::low_water::LowWater;
use shared::store::sign_claim::SignJob;
use shared::store::sign_finish::{Call, SignEnding, SignFinish, UpstreamNews};
use tokio::time::Instant;

use crate::fixture::{EXPIRE, Fixture, LEASE, finish};

/// What becomes of a job that keeps its place.
const UNAVAILABLE: SignEnding = SignEnding::Unavailable { again_in: None };

/// Writes the end of `job`, and what its call says of the upstream.
async fn report(f: &Fixture, job: SignJob, ending: SignEnding, upstream: UpstreamNews) {
    f.store.finish_sign_jobs(&[SignFinish { upstream, ..finish(job, ending) }]).await.unwrap();
}

fn signed() -> SignEnding {
    SignEnding::Signed("s".to_owned())
}

/// Opens the circuit breaker after so many failures, and makes a probe due.
async fn probe_is_due(f: &Fixture, failures: u32) {
    f.run(&format!(
        "update upstream set breaker_failures = {failures}, breaker_reason = 'connection', breaker_at = now(), probe_at = now()"
    ))
    .await;
}

#[tokio::test]
async fn who_lost_the_race_for_the_probe_is_told_that_something_waits() {
    let f = Fixture::new().await;
    f.post_many(2).await;
    let down =
        "update upstream set breaker_failures = 1, breaker_reason = 'connection', breaker_at = now(), probe_at = now() - interval '1 s'";
    f.run(down).await;
    let claims = join_all((0..2).map(|_| f.claimed(1))).await;
    let mut claims: Vec<_> = claims.into_iter().map(Result::unwrap).collect();
    claims.sort_by_key(|claimed| claimed.jobs.len());
    assert_eq!(claims.iter().map(|claimed| claimed.jobs.len()).collect::<Vec<_>>(), [0, 1]);
    assert!(claims[0].next_in.is_some());
}

#[tokio::test]
async fn an_open_breaker_lets_one_probe_through_even_if_many_ask_at_once() {
    let f = Fixture::new().await;
    f.post_many(10).await;
    let job = f.claim(1).await.remove(0);
    let down = SignFinish { upstream: UpstreamNews::Down { probe_in: Duration::from_mins(1), failures: 1 }, ..finish(job, UNAVAILABLE) };
    f.store.finish_sign_jobs(&[down]).await.unwrap();
    assert!(f.claim(10).await.is_empty(), "the breaker is open");
    f.run("update upstream set probe_at = now()").await;
    let probes: Vec<_> = join_all((0..6).map(|_| f.claim(10))).await.into_iter().flatten().collect();
    assert_eq!(probes.len(), 1);
    assert_eq!(probes[0].breaker_failures, 1);
    assert_eq!(probes[0].attempt, 1, "what the upstream's absence cost does not count");
    let up = probes.into_iter().map(|job| SignFinish { upstream: UpstreamNews::Up, ..finish(job, SignEnding::Signed("s".to_owned())) });
    f.store.finish_sign_jobs(&up.collect::<Vec<_>>()).await.unwrap();
    assert_eq!(f.claim(10).await.len(), 8, "closed again, and two slots are spent");
}

#[tokio::test]
async fn a_pause_holds_every_slot() {
    let f = Fixture::new().await;
    f.post_many(5).await;
    let job = f.claim(1).await.remove(0);
    let pause = UpstreamNews::Pause { until: Instant::now() + Duration::from_secs(30), probed: false };
    let paused = SignFinish { upstream: pause, ..finish(job, UNAVAILABLE) };
    f.store.finish_sign_jobs(std::slice::from_ref(&paused)).await.unwrap();
    let claimed = f.claimed(10).await.unwrap();
    assert!(claimed.jobs.is_empty());
    assert!(claimed.next_in.unwrap() > Duration::from_secs(28));
    f.run("update upstream set paused_until = now()").await;
    let job = f.claim(10).await.remove(0);

    // Written late, or again and again while somebody locks the job, it does not begin anew.
    let over = UpstreamNews::Pause { until: Instant::now(), probed: false };
    report(&f, job, UNAVAILABLE, over).await;
    assert_eq!(f.claim(10).await.len(), 1);
}

#[tokio::test]
async fn what_is_said_of_the_upstream_after_the_end_of_a_lease_changes_nothing_though_nobody_else_has_the_job_yet() {
    let f = Fixture::new().await;
    f.post_many(2).await;
    let late = f.claim(1).await.remove(0);
    f.run(EXPIRE).await;
    let down = UpstreamNews::Down { probe_in: Duration::from_mins(1), failures: 1 };
    report(&f, late, UNAVAILABLE, down).await;
    assert_eq!(f.store.upstream().await.unwrap().unwrap().breaker, None, "it stays closed");

    probe_is_due(&f, 1).await;
    let late = f.claim(1).await.remove(0);
    f.run(EXPIRE).await;
    report(&f, late, signed(), UpstreamNews::Up).await;
    assert!(f.store.upstream().await.unwrap().unwrap().breaker.is_some(), "it stays open");
}

#[tokio::test]
async fn what_a_worker_that_lost_its_lease_says_of_the_upstream_changes_nothing() {
    let f = Fixture::new().await;
    f.post_many(3).await;
    probe_is_due(&f, 9).await;
    let stood_still = f.claim(1).await.remove(0);
    f.run(EXPIRE).await;
    f.run("update upstream set probe_at = now()").await;
    let probe = f.claim(1).await.remove(0);
    report(&f, probe, signed(), UpstreamNews::Up).await;
    let down = UpstreamNews::Down { probe_in: Duration::from_mins(1), failures: 10 };
    report(&f, stood_still, UNAVAILABLE, down).await;
    assert_eq!(f.store.upstream().await.unwrap().unwrap().breaker, None, "it stays closed");

    let stood_still = f.claim(1).await.remove(0);
    f.run(EXPIRE).await;
    let _other = f.claim(2).await;
    probe_is_due(&f, 1).await;
    report(&f, stood_still, signed(), UpstreamNews::Up).await;
    assert!(f.store.upstream().await.unwrap().unwrap().breaker.is_some(), "it stays open");
}

#[tokio::test]
async fn a_probe_that_is_asked_to_wait_has_been_answered_and_one_that_was_not_made_is_somebody_elses_at_once() {
    let f = Fixture::new().await;
    f.post_many(3).await;
    probe_is_due(&f, 3).await;
    let job = f.claim(1).await.remove(0);
    assert!(f.claim(1).await.is_empty());
    let not_made = UpstreamNews::NotProbed { failures: job.breaker_failures };
    f.store.finish_sign_jobs(&[SignFinish { call: Call::NotMade, upstream: not_made, ..finish(job, SignEnding::Released) }]).await.unwrap();
    let job = f.claim(1).await.remove(0);
    assert_eq!(job.breaker_failures, 3);
    let paused = UpstreamNews::Pause { until: Instant::now() + Duration::from_secs(5), probed: true };
    report(&f, job, UNAVAILABLE, paused).await;
    let upstream = f.store.upstream().await.unwrap().unwrap();
    assert!(upstream.breaker.is_none() && upstream.paused_for > Duration::from_secs(3), "{upstream:?}");
}

#[tokio::test]
async fn messages_that_make_the_upstream_look_absent_do_not_keep_it_from_the_others() {
    let f = Fixture::new().await;
    for bad in ["bad 0", "bad 1", "bad 2"] {
        f.post(bad).await;
    }
    let mut failures = 0;
    let mut probe = async || {
        let job = f.claim(1).await.remove(0);
        let probed = job.message.text().to_owned();
        failures += 1;
        let down = UpstreamNews::Down { probe_in: Duration::from_mins(1), failures };
        let refused = SignEnding::Unavailable { again_in: Some(Duration::ZERO) };
        report(&f, job, refused, down).await;
        f.run("update upstream set probe_at = now()").await;
        probed
    };
    assert_eq!(probe().await, "bad 0");
    f.post("good").await;
    assert_eq!(probe().await, "good", "though others have waited for longer");
    assert_eq!(probe().await, "bad 2");
    assert_eq!(probe().await, "bad 1");
    f.post("good, too").await;
    assert_eq!(probe().await, "good, too", "though others are due again");
}

#[tokio::test]
async fn a_probe_moves_no_mark_past_those_that_wait() {
    let f = Fixture::new().await;
    f.post_many(3).await;
    probe_is_due(&f, 1).await;
    let (probe, marks) = f.store.claim_sign_jobs(1, LEASE, "10/60s".parse().unwrap(), LowWater::default()).await.unwrap();
    let up = probe.jobs.into_iter().map(|job| SignFinish { upstream: UpstreamNews::Up, ..finish(job, SignEnding::Signed("s".to_owned())) });
    f.store.finish_sign_jobs(&up.collect::<Vec<_>>()).await.unwrap();
    f.run("update jobs set next_run_at = next_run_at - interval '1 h' where state = 'pending'").await;
    let (rest, _) = f.store.claim_sign_jobs(10, LEASE, "10/60s".parse().unwrap(), marks).await.unwrap();
    assert_eq!(rest.jobs.len(), 2);
}

#[tokio::test]
async fn calls_that_were_in_flight_together_fail_together_and_count_once() {
    let f = Fixture::new().await;
    f.post_many(10).await;
    let downs = f.claim(10).await.into_iter().map(|job| {
        let upstream = UpstreamNews::Down { probe_in: Duration::from_secs(1), failures: job.breaker_failures + 1 };
        SignFinish { upstream, ..finish(job, UNAVAILABLE) }
    });
    f.store.finish_sign_jobs(&downs.collect::<Vec<_>>()).await.unwrap();
    assert_eq!(f.number("select breaker_failures::bigint from upstream").await, 1);
}

#[tokio::test]
async fn while_the_breaker_is_open_all_that_wait_say_why() {
    let f = Fixture::new().await;
    let (one, other) = (f.post("one").await, f.post("other").await);
    let job = f.claim(1).await.remove(0);
    let down = UpstreamNews::Down { probe_in: LEASE, failures: 1 };
    let gone = SignFinish { call: Call::NotMade, error: Some(CallError::Connection), upstream: down, ..finish(job, UNAVAILABLE) };
    f.store.finish_sign_jobs(&[gone]).await.unwrap();
    let states = f.states(&[one, other]).await;
    let code = |id| states[&id].request.last_error.clone().unwrap().code;
    assert_eq!((code(one).as_str(), code(other).as_str()), ("connection", "upstream-unavailable"));
    let upstream = f.store.upstream().await.unwrap().unwrap();
    let breaker = upstream.breaker.unwrap();
    assert_eq!((breaker.reason.as_str(), breaker.failures), ("connection", 1));
    assert!(breaker.probe_in > LEASE / 2 && upstream.paused_for.is_zero());
}
