//! Postgres, the upstream and the notifications fail; the promises still hold.

use std::time::{Duration, Instant};

use devkit::postgres::StopMode;
use devkit::processes::Signal;
use devkit::upstream::{FaultKind, Faults, SimulatorOptions, When};
use serde_json::json;
use sqlx::Connection;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::world::{KEY, Options, PATIENCE, World, answer, env, until};

#[tokio::test]
async fn a_post_while_postgres_is_down_is_answered_503_within_two_seconds_and_it_recovers() {
    let world = World::with(Options { own_postgres: true, ..Options::default() }).await;
    assert_eq!(world.sign("before").await.status, 200);
    let postgres = world.own_postgres.as_ref().unwrap();
    postgres.stop(StopMode::Immediate).await.unwrap();
    // The api cannot know on its own whether the worker may send there.
    let with_webhook = json!({ "message": "during", "webhookUrl": world.hook("/hook") });
    // First while the key is still cached, then when it no longer is.
    let (mut posts, began) = ([json!({ "message": "during" }), with_webhook].into_iter().cycle(), Instant::now());
    for n in 0.. {
        if n >= 4 && world.api.log().contains("can't look up API keys") {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "the key is believed for ever");
        let body = posts.next().unwrap();
        let started = Instant::now();
        let refused = answer(world.post(&body).send().await.unwrap()).await;
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
        refused.is_problem(503, "unavailable");
        assert!(refused.header("retry-after").parse::<u64>().unwrap() >= 1);
    }
    let ready = async || world.client.get(format!("{}/health/ready", world.url)).send().await.unwrap().status() == 200;
    until("it is not ready", async || !ready().await).await;
    postgres.start_again().await.unwrap();
    until("a message is signed again", async || world.sign("after").await.status == 200).await;
    assert_eq!(world.number("select count(*) from messages where body = 'during'").await, 0, "nothing was half accepted");
    assert_eq!(
        world
            .number("select count(*) from jobs join messages on messages.id = message_id where body = 'before' and signature is not null")
            .await,
        1
    );
}

/// Suspends every process of a Postgres server until it is dropped; the sockets stay open.
struct Frozen(Vec<String>);

impl Frozen {
    async fn new(world: &World) -> Self {
        use sqlx::{Connection, Row};
        let mut connection = sqlx::PgConnection::connect(&world.database).await.unwrap();
        // The postmaster first: it starts no other session then.
        let mut frozen = Self(world.own_postgres.as_ref().unwrap().pid().map(|pid| pid.to_string()).into_iter().collect());
        signal("-STOP", &frozen.0);
        let rows = sqlx::query("select pid::text from pg_stat_activity").fetch_all(&mut connection).await.unwrap();
        let sessions: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        frozen.0.extend_from_slice(&sessions);
        signal("-STOP", &sessions);
        frozen
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        signal("-CONT", &self.0);
    }
}

fn signal(signal: &str, pids: &[String]) {
    std::process::Command::new("kill").arg(signal).args(pids).status().unwrap();
}

#[tokio::test]
async fn a_post_while_postgres_stands_still_is_answered_within_two_seconds() {
    let world = World::with(Options { own_postgres: true, ..Options::default() }).await;
    assert_eq!(world.sign("before").await.status, 200);
    let frozen = Frozen::new(&world).await;
    let started = Instant::now();
    let answered = world.sign("during").await;
    let took = started.elapsed();
    drop(frozen);
    assert!(took < Duration::from_secs(2), "{took:?}");
    answered.is_problem(503, "unavailable");
    until("a message is signed again", async || world.sign("after").await.status == 200).await;
}

#[tokio::test]
async fn the_delivery_log_and_a_replay_are_answered_within_two_seconds_while_postgres_stands_still() {
    let world = World::with(Options { own_postgres: true, ..Options::default() }).await;
    let id = world.sign("before").await.id();
    let deliveries = format!("{}/crypto/sign/{id}/deliveries", world.url);
    let frozen = Frozen::new(&world).await;
    for request in [world.client.get(&deliveries), world.client.post(&deliveries)] {
        let started = Instant::now();
        let answered = answer(request.header("X-API-Key", KEY).send().await.unwrap()).await;
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
        answered.is_problem(503, "unavailable");
    }
    drop(frozen);
    until("the log is read again", async || world.client.get(&deliveries).header("X-API-Key", KEY).send().await.unwrap().status() == 200)
        .await;
}

#[tokio::test]
async fn until_the_bootstrap_key_is_stored_nobody_is_told_that_it_is_unknown() {
    let world = World::new().await;
    let mut holder = sqlx::PgConnection::connect(&world.database).await.unwrap();
    let mut held = holder.begin().await.unwrap();
    // Keys can be read but not stored.
    sqlx::raw_sql("lock table api_keys in exclusive mode").execute(&mut *held).await.unwrap();
    let new_key = env(&[("BOOTSTRAP_API_KEY", "another-key-of-the-tests")]);
    let (starting, url) = world.another_api(&new_key).await;
    let post = async || {
        let body = json!({ "message": "m" });
        answer(
            world
                .client
                .post(format!("{url}/crypto/sign"))
                .header("X-API-Key", "another-key-of-the-tests")
                .header("Content-Type", "application/json")
                .body(body.to_string())
                .send()
                .await
                .unwrap(),
        )
        .await
    };
    for _ in 0..3 {
        post().await.is_problem(503, "unavailable");
    }
    held.rollback().await.unwrap();
    until("the key is known", async || match post().await.status.as_u16() {
        200 => true,
        503 => false,
        other => panic!("{other}\n{}", starting.log()),
    })
    .await;
}

#[tokio::test]
async fn an_upstream_that_is_gone_burns_no_attempts_and_its_return_is_noticed() {
    let world = World::new().await;
    world.upstream.set_faults(Faults { gone: true, ..Faults::default() }).await.unwrap();
    let pending = world.sign("patient").await;
    assert_eq!(pending.status, 202);
    until("the breaker has opened", async || world.number("select breaker_failures::bigint from upstream").await > 0).await;
    let state = answer(world.get(&pending.id()).await).await.body;
    assert_eq!((state["attempts"].as_u64(), state["lastError"]["code"].as_str()), (Some(0), Some("connection")));
    let ready = answer(world.client.get(format!("{}/health/ready", world.url)).send().await.unwrap()).await;
    assert_eq!((ready.status.as_u16(), ready.body["upstream"]["breaker"]["state"].as_str()), (200, Some("open")), "{ready:?}");
    assert_eq!(ready.body["upstream"]["breaker"]["reason"], "connection");
    let figures = async || world.client.get(format!("{}/metrics", world.url)).send().await.unwrap().text().await.unwrap();
    assert!(figures().await.contains("\ncountersign_upstream_breaker_open 1\n"));
    world.no_faults().await;
    let state = world.settled(&pending.id()).await;
    assert_eq!((state["status"].as_str(), state["attempts"].as_u64()), (Some("signed"), Some(1)));
    until("the figures say so", async || figures().await.contains("\ncountersign_upstream_breaker_open 0\n")).await;
}

#[tokio::test]
async fn a_second_sigterm_ends_a_process_at_once() {
    let mut world = World::new().await;
    world.fault(FaultKind::Hang, When::Always).await;
    let waits = tokio::spawn(world.post(&json!({ "message": "waits" })).header("Prefer", "wait=60").send());
    until("the call has arrived", async || world.upstream.audit().sign_calls == 1).await;
    world.worker.signal(Signal::Term).unwrap();
    world.worker.wait_for_log("stopping", PATIENCE).await.unwrap();
    let mut ended = None;
    // One that follows the first too closely counts as the same.
    until("it has ended", async || {
        let _ = world.worker.signal(Signal::Term);
        ended = world.worker.wait_exit(Duration::from_millis(50)).await.ok();
        ended.is_some()
    })
    .await;
    assert_eq!(ended.unwrap().code(), Some(130), "{}", world.worker.log());
    waits.abort();
}

#[tokio::test]
async fn above_the_most_unfinished_requests_a_post_is_refused_with_503_and_says_when_to_come_again() {
    let world = World::with(Options { api: env(&[("MAX_PENDING", "2")]), ..Options::default() }).await;
    assert_eq!(world.sign("signed before").await.status, 200);
    world.fault(FaultKind::Hang, When::Always).await;
    let post = async |message: &str| {
        answer(world.post(&json!({ "message": message })).header("Prefer", "respond-async").send().await.unwrap()).await
    };
    assert_eq!((post("one").await.status, post("two").await.status), (202.try_into().unwrap(), 202.try_into().unwrap()));
    let refused = post("three").await;
    refused.is_problem(503, "too-many-pending");
    assert!(refused.header("retry-after").parse::<u64>().unwrap() >= 1);
    assert_eq!(post("signed before").await.status, 200, "what is signed already needs no place");
}

#[tokio::test]
async fn lost_notifications_cost_time_and_nothing_else() {
    let world = World::with(Options { worker: env(&[("POLL_INTERVAL", "200ms")]), ..Options::default() }).await;
    // A session that has listened is known by its last query: `listen`, or the one that asks whether anybody is there.
    let listening = "from pg_stat_activity where datname = current_database() and (query ilike 'listen%' or query = 'select 1')";
    for round in 0..5 {
        let both = format!("select count(*) {listening}");
        until("both listen", async || world.number(&both).await == 2).await;
        let ended =
            format!("with those as materialized (select pid {listening}) select count(*) from those where pg_terminate_backend(pid)");
        assert_eq!(world.number(&ended).await, 2);
        let answered = world.sign(&format!("round {round}")).await;
        let state = world.settled(&answered.id()).await;
        assert_eq!(state["status"], "signed");
    }
}

#[tokio::test]
async fn a_worker_that_is_told_to_stop_finishes_what_is_in_flight_and_exits_with_0() {
    let slow = Duration::from_millis(2500);
    let upstream = SimulatorOptions { latency: slow..=slow, ..SimulatorOptions::reliable() };
    let mut world = World::with(Options { upstream, ..Options::default() }).await;
    let receipt = answer(world.post(&json!({ "message": "in flight" })).header("Prefer", "respond-async").send().await.unwrap()).await;
    until("the call has arrived", async || world.upstream.audit().sign_calls == 1).await;
    world.worker.signal(Signal::Term).unwrap();
    assert_eq!(world.worker.wait_exit(PATIENCE).await.unwrap().code(), Some(0), "{}", world.worker.log());
    let state = answer(world.get(&receipt.id()).await).await.body;
    assert_eq!(state["status"], "signed", "the call was not wasted");
    world.api.signal(Signal::Term).unwrap();
    assert_eq!(world.api.wait_exit(PATIENCE).await.unwrap().code(), Some(0), "{}", world.api.log());
    world.restart_api().await;
    world.restart_worker().await;
    let again = world.sign("in flight").await;
    assert_eq!(again.status, 200);
}

#[tokio::test]
async fn a_worker_that_is_told_to_stop_gives_back_at_once_what_waits_for_its_turn() {
    let slow = Duration::from_secs(5);
    let upstream = SimulatorOptions { latency: slow..=slow, ..SimulatorOptions::reliable() };
    let mut world = World::with(Options { upstream, worker: env(&[("UPSTREAM_RATE", "1000/1s")]), ..Options::default() }).await;
    let posts = (0..300).map(|n| world.post(&json!({ "message": format!("turn {n}") })).header("Prefer", "respond-async").send());
    futures_util::future::join_all(posts).await;
    until("all are leased", async || world.number("select count(*) from jobs where lease_token is not null").await == 300).await;
    until("as many calls as may be have arrived", async || world.upstream.audit().sign_calls == 256).await;
    world.worker.signal(Signal::Term).unwrap();
    until("those without a call are given back", async || {
        world.number("select count(*) from jobs where state = 'pending' and lease_token is null").await == 44
    })
    .await;
    assert_eq!(world.number("select count(*) from jobs where state = 'succeeded'").await, 0, "the calls are still under way");
    assert_eq!(world.worker.wait_exit(PATIENCE).await.unwrap().code(), Some(0), "{}", world.worker.log());
    assert_eq!(world.upstream.audit().sign_calls, 256);
    assert_eq!(world.number("select count(*) from jobs where state = 'succeeded'").await, 256, "no call was wasted");
    assert_eq!(world.number("select count(*) from jobs where state = 'pending' and attempt = excused and lease_token is null").await, 44);
}

#[tokio::test]
async fn a_worker_that_cannot_finish_in_its_grace_gives_the_job_back_without_burning_an_attempt() {
    let mut world = World::with(Options { worker: env(&[("SHUTDOWN_GRACE", "200ms")]), ..Options::default() }).await;
    world.fault(FaultKind::Hang, When::Always).await;
    let pending = world.sign("stuck").await;
    world.worker.signal(Signal::Term).unwrap();
    assert_eq!(world.worker.wait_exit(PATIENCE).await.unwrap().code(), Some(0), "{}", world.worker.log());
    let state = answer(world.get(&pending.id()).await).await.body;
    assert_eq!((state["status"].as_str(), state["attempts"].as_u64()), (Some("pending"), Some(0)));
    assert!(state["lastError"].is_null(), "nothing went wrong: {state}");
    world.no_faults().await;
    world.restart_worker().await;
    assert_eq!(world.settled(&pending.id()).await["status"], "signed");
}

#[tokio::test]
async fn a_message_that_somebody_holds_in_a_transaction_delays_no_other() {
    use sqlx::Connection;
    let world = World::new().await;
    assert_eq!(world.sign("held").await.status, 200);
    let known: Vec<String> = (0..20).map(|n| format!("known {n}")).collect();
    for message in &known {
        assert_eq!(world.sign(message).await.status, 200);
    }
    let mut connection = sqlx::PgConnection::connect(&world.database).await.unwrap();
    let mut holder = connection.begin().await.unwrap();
    sqlx::query("select from messages where body = 'held' for update").execute(&mut *holder).await.unwrap();
    let started = Instant::now();
    let posts = (0..10).map(|n| {
        let (world, message) = (&world, if n == 5 { "held".to_owned() } else { format!("free {n}") });
        async move { world.sign(&message).await }
    });
    let answers = futures_util::future::join_all(posts).await;
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert_eq!(answers.iter().filter(|answer| answer.status == 200).count(), 9);
    answers[5].is_problem(503, "unavailable");
    // However often it is posted.
    let held = (0..600).map(|n| (n * 5, "held".to_owned()));
    let free = known.iter().cycle().enumerate().take(150);
    let free = free.map(|(n, known)| (n as u64 * 20, if n % 2 == 0 { format!("also free {n}") } else { known.clone() }));
    let posts = held.chain(free).map(|(after, message)| {
        let world = &world;
        async move {
            tokio::time::sleep(Duration::from_millis(after)).await;
            let started = Instant::now();
            let status = world.sign(&message).await.status;
            (message, status, started.elapsed())
        }
    });
    let answers = futures_util::future::join_all(posts).await;
    assert!(answers.iter().all(|(message, status, _)| if message == "held" { *status == 503 } else { status.is_success() }), "{answers:?}");
    let took = |kind: &str| {
        let mut took: Vec<_> = answers.iter().filter(|(message, ..)| message.starts_with(kind)).map(|(.., took)| *took).collect();
        took.sort_unstable();
        took
    };
    let (new, known) = (took("also free"), took("known"));
    assert!(new[new.len() * 9 / 10] < Duration::from_millis(400), "{new:?}");
    // Those that are known come in batches with the held one, and wait for it for a moment only.
    assert!(known[known.len() - 1] < Duration::from_secs(1), "{known:?}");
    holder.rollback().await.unwrap();
    until("the message is free again", async || world.sign("held").await.status == 200).await;
}

#[tokio::test]
async fn told_to_stop_the_api_answers_who_waits() {
    let mut world = World::new().await;
    world.fault(FaultKind::Hang, When::Always).await;
    let post = tokio::spawn(world.post(&json!({ "message": "waits" })).header("Prefer", "wait=60").send());
    until("the call has arrived", async || world.upstream.audit().sign_calls == 1).await;
    world.api.signal(Signal::Term).unwrap();
    assert_eq!(answer(post.await.unwrap().unwrap()).await.status, 202);
    assert_eq!(world.api.wait_exit(PATIENCE).await.unwrap().code(), Some(0), "{}", world.api.log());
}

#[tokio::test]
async fn a_worker_that_is_told_to_stop_while_postgres_stands_still_stops() {
    let mut world = World::with(Options { own_postgres: true, ..Options::default() }).await;
    assert_eq!(world.sign("before").await.status, 200);
    let frozen = Frozen::new(&world).await;
    world.worker.signal(Signal::Term).unwrap();
    assert_eq!(world.worker.wait_exit(PATIENCE).await.unwrap().code(), Some(0), "{}", world.worker.log());
    drop(frozen);
}

#[tokio::test]
async fn while_the_upstream_asks_for_a_pause_no_call_is_announced_before_its_end() {
    let world = World::new().await;
    world.fault(FaultKind::TooMany { retry_after: 600 }, When::Next(1)).await;
    for message in ["first", "later"] {
        let asynchronously = world.post(&json!({ "message": message })).header("Prefer", "respond-async");
        let id = answer(asynchronously.send().await.unwrap()).await.id();
        // A forecast that is a moment old does not know of the pause yet.
        until("the pause is announced", async || {
            let state = answer(world.get(&id).await).await.body;
            let time = |field: &str| OffsetDateTime::parse(state[field].as_str().unwrap(), &Rfc3339).unwrap();
            let (next, expected) = (time("nextAttemptAt"), time("estimatedCompletionAt"));
            assert!(next <= expected, "{state}");
            next > OffsetDateTime::now_utc() + Duration::from_mins(9)
        })
        .await;
    }
}
