//! Never over budget, and the budget is used.

use std::time::{Duration, Instant};

use devkit::processes::Signal;
use devkit::upstream::SimulatorOptions;
use sqlx::{Connection, PgConnection};

use crate::world::{PATIENCE, World, numbered, until};

/// Ten calls per second, enforced strictly; every call fails, so that there is always work.
fn insatiable() -> SimulatorOptions {
    SimulatorOptions {
        rate: "10/1s".parse().unwrap(),
        failure_probability: 1.0,
        outage: Duration::from_hours(1)..=Duration::from_hours(1),
        latency: Duration::ZERO..=Duration::from_millis(20),
        ..SimulatorOptions::default()
    }
}

#[tokio::test]
async fn never_over_budget_with_four_workers_through_kills_restarts_and_standstills() {
    let latency = Duration::from_millis(100)..=Duration::from_millis(300);
    let world = World::new(SimulatorOptions { latency, ..insatiable() }, "10/1s").await;
    world.post(numbered(200)).await;
    // A lease lasts ten seconds longer than the timeout: a worker that is suspended for longer loses its jobs.
    let mut workers: Vec<_> = (0..4).map(|_| world.worker(&[("UPSTREAM_TIMEOUT", "1s")])).collect();
    let calls_after = |calls: u64| {
        let upstream = &world.upstream;
        async move { until("calls are made", async || upstream.audit().sign_calls >= calls).await }
    };
    calls_after(20).await;
    workers[0].signal(Signal::Stop).unwrap();
    // Calls that are without an answer for much longer than an answer takes were cut off.
    let cut_off = || {
        let audit = world.upstream.audit();
        audit.recent.iter().filter(|call| call.status.is_none() && call.at_ms + 2_000 < audit.now_ms).count()
    };
    let mut kills = 0;
    while kills < 6 || cut_off() == 0 {
        assert!(kills < 60, "no kill met a call");
        let victim = 1 + kills % 3;
        workers[victim].kill().await.unwrap();
        workers[victim] = world.worker(&[("UPSTREAM_TIMEOUT", "1s")]);
        kills += 1;
        calls_after(world.upstream.audit().sign_calls + 15).await;
    }
    workers[0].signal(Signal::Cont).unwrap();
    calls_after(world.upstream.audit().sign_calls + 40).await;
    let audit = world.upstream.audit();
    assert!(audit.max_in_window <= 10 && audit.over_budget == 0 && audit.max_in_flight_per_message == 1, "{audit:?}");
}

#[tokio::test]
async fn the_budget_is_used_while_due_work_waits() {
    // The shorter the window, the larger the share that the answer and the claim take; at 60 s it is negligible.
    let rate = "20/10s";
    let world = World::new(SimulatorOptions { rate: rate.parse().unwrap(), ..insatiable() }, rate).await;
    world.post(numbered(400)).await;
    let _workers = [world.worker(&[]), world.worker(&[])];
    until("the first window is spent", async || world.upstream.audit().sign_calls >= 20).await;
    let started = Instant::now();
    until("two more are", async || world.upstream.audit().sign_calls >= 60).await;
    let took = started.elapsed().as_secs_f64();
    let used = 2.0 * 10.0 / took;
    println!("budget used: {:.1} %", used * 100.0);
    assert!(used >= 0.97, "only {:.1} % of the budget was used", used * 100.0);
    assert_eq!(world.upstream.audit().over_budget, 0);
}

#[tokio::test]
async fn of_an_upstream_that_takes_long_few_jobs_are_leased_before_their_turn() {
    let (rate, slow) = ("5000/1s", Duration::from_millis(500));
    let upstream = SimulatorOptions { rate: rate.parse().unwrap(), latency: slow..=slow, ..SimulatorOptions::reliable() };
    let world = World::new(upstream, rate).await;
    world.post(numbered(2500)).await;
    let _worker = world.worker(&[]);
    let mut connection = PgConnection::connect(world.database()).await.unwrap();
    let query = "select count(*) from jobs where kind = 'sign' and lease_token is not null";
    // 256 calls are in flight, and a fifth as many begin within 100 ms. Before the worker knows how long a call takes, it leases twice as
    // many jobs as it may call for.
    until("few are leased, for the worker knows how long a call takes", async || {
        let leased: i64 = sqlx::query_scalar(query).fetch_one(&mut connection).await.unwrap();
        let calls = world.upstream.audit().sign_calls;
        assert!(calls < 2000, "{leased} are leased after {calls} calls");
        calls >= 500 && leased <= 330
    })
    .await;
}

#[tokio::test]
async fn a_call_that_a_stop_cuts_off_keeps_its_slot_until_its_lease_would_have_ended() {
    use devkit::processes::Signal;
    use devkit::upstream::{FaultKind, When};
    let world = World::new(SimulatorOptions::reliable(), "10/1s").await;
    world.fault(FaultKind::Hang, When::Always).await;
    let mut worker = world.worker(&[("SHUTDOWN_GRACE", "0s"), ("UPSTREAM_TIMEOUT", "20s")]);
    world.post(numbered(1)).await;
    until("it calls", async || world.upstream.audit().sign_calls == 1).await;
    worker.signal(Signal::Term).unwrap();
    assert_eq!(worker.wait_exit(PATIENCE).await.unwrap().code(), Some(0));
    let mut connection = PgConnection::connect(world.database()).await.unwrap();
    let query = "select (select count(*) from jobs where kind = 'sign' and lease_token is null),
        (select count(*) from upstream_slots where free_at > now() + interval '10 s')";
    let (given_back, taken): (i64, i64) = sqlx::query_as(query).fetch_one(&mut connection).await.unwrap();
    assert_eq!((given_back, taken), (1, 1), "the call may still be on its way");
}

#[tokio::test]
async fn after_429_every_slot_waits_as_long_as_the_upstream_asks() {
    use devkit::upstream::{FaultKind, When};
    let world = World::new(SimulatorOptions::reliable(), "100/1s").await;
    world.fault(FaultKind::TooMany { retry_after: 2 }, When::Next(1)).await;
    let _worker = world.worker(&[]);
    let began = Instant::now();
    let first = world.post(numbered(1)).await;
    until("the 429 was answered", async || world.upstream.audit().calls == 1).await;
    let ids = [first, world.post((0..10).map(|n| format!("later {n}"))).await].concat();
    let states = world.settled(&ids).await;
    assert!(began.elapsed() >= Duration::from_secs(2), "{:?}", began.elapsed());
    assert!(states.iter().all(|state| state.attempts == 1), "the 429 counts for nobody");
    assert_eq!(world.upstream.audit().sign_calls, 12);
}

#[tokio::test]
async fn a_worker_with_another_rate_refuses_loudly_and_the_first_goes_on() {
    let world =
        World::new(SimulatorOptions { rate: "10/1s".parse().unwrap(), enforce_rate: true, ..SimulatorOptions::reliable() }, "10/1s").await;
    let _first = world.worker(&[]);
    let ids = world.post(numbered(1)).await;
    world.settled(&ids).await;
    let mut other = world.worker(&[("UPSTREAM_RATE", "20/1s")]);
    let ids = world.post((100..180).map(|n| format!("message {n}"))).await;
    let code = other.wait_exit(PATIENCE).await.unwrap().code();
    assert_eq!(code, Some(2), "{}", other.log());
    assert!(other.log().contains("UPSTREAM_RATE=20/1s: other workers call the upstream with 10/1s"), "{}", other.log());
    world.settled(&ids).await;
    let audit = world.upstream.audit();
    assert!(audit.max_in_window <= 10 && audit.over_budget == 0, "{audit:?}");
}

#[tokio::test]
async fn the_rate_changes_with_the_workers_and_no_window_sees_more_than_the_larger_one() {
    let world = World::new(SimulatorOptions { rate: "10/1s".parse().unwrap(), ..SimulatorOptions::reliable() }, "10/1s").await;
    let mut first = world.worker(&[]);
    let ids = world.post(numbered(60)).await;
    until("some are signed", async || world.upstream.audit().sign_calls >= 15).await;
    first.signal(Signal::Term).unwrap();
    assert_eq!(first.wait_exit(PATIENCE).await.unwrap().code(), Some(0), "{}", first.log());
    // A worker that has left is not waited for.
    let started = std::time::Instant::now();
    let _second = world.worker(&[("UPSTREAM_RATE", "4/1s")]);
    let before = world.upstream.audit().sign_calls;
    until("the new one works", async || world.upstream.audit().sign_calls > before).await;
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
    world.settled(&ids).await;
    let audit = world.upstream.audit();
    assert!(audit.max_in_window <= 10, "{audit:?}");
    // The last calls are those of the second worker only.
    let mut last: Vec<u64> = audit.recent.iter().rev().take(20).map(|call| call.at_ms).collect();
    last.sort_unstable();
    assert!(last.windows(5).all(|five| five[4] - five[0] >= 1000), "{last:?}");
}
