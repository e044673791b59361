//! The challenge's burst, at sixty times its speed, through real processes that are killed in the middle of it.

use std::collections::HashMap;
use std::time::Duration;

use devkit::processes::Signal;
use devkit::upstream::SimulatorOptions;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::world::{Options, PATIENCE, World, answer, env, until};

const MESSAGES: usize = 60;

/// Ten calls per second; half of the messages have an outage of one to five seconds.
fn challenge() -> Options {
    let upstream = SimulatorOptions {
        rate: "10/1s".parse().unwrap(),
        enforce_rate: true,
        outage: Duration::from_secs(1)..=Duration::from_secs(5),
        latency: Duration::from_millis(1)..=Duration::from_millis(5),
        seed: Some(7),
        ..SimulatorOptions::default()
    };
    // A lease lasts ten seconds longer than the call's timeout: the jobs of a killed worker come back after 11 s.
    let worker = env(&[("UPSTREAM_TIMEOUT", "1s"), ("SIGN_RETRY_BASE", "100ms"), ("WEBHOOK_TIMEOUT", "1s")]);
    Options { upstream, rate: "10/1s", worker, ..Options::default() }
}

async fn post_burst(world: &World) -> Vec<String> {
    world.post_all((0..MESSAGES).map(|n| format!("burst {n}"))).await
}

async fn all_signed_and_delivered(world: &World, ids: &[String]) {
    world.all_signed_and_delivered(ids).await;
    let audit = world.upstream.audit();
    assert!(audit.max_in_window <= 10 && audit.over_budget == 0, "{audit:?}");
    assert_eq!(audit.max_in_flight_per_message, 1);
}

#[tokio::test]
async fn a_burst_of_sixty_is_signed_and_delivered_within_the_budget() {
    let world = World::with(challenge()).await;
    let ids = post_burst(&world).await;
    all_signed_and_delivered(&world, &ids).await;
    assert_eq!(world.upstream.audit().signed_twice, 0);
}

#[tokio::test]
async fn killed_and_restarted_in_the_middle_of_a_burst_nothing_is_lost_and_the_budget_is_kept() {
    let mut world = World::with(challenge()).await;
    let ids = post_burst(&world).await;
    let signed = "select count(*) from jobs where signature is not null";
    until("some are signed", async || world.number(signed).await >= 5).await;
    world.worker.signal(Signal::Term).unwrap();
    world.worker.wait_exit(PATIENCE).await.unwrap();
    world.api.signal(Signal::Term).unwrap();
    world.api.wait_exit(PATIENCE).await.unwrap();
    world.restart_api().await;
    world.restart_worker().await;
    until("more are signed", async || world.number(signed).await >= 15).await;
    world.worker.kill().await.unwrap();
    world.api.kill().await.unwrap();
    world.restart_api().await;
    world.restart_worker().await;
    all_signed_and_delivered(&world, &ids).await;
}

#[tokio::test]
async fn estimates_over_a_burst_are_right_within_a_quarter_at_the_median() {
    let world = World::with(challenge()).await;
    let ids = post_burst(&world).await;
    // The estimates for each request while it waits, and when each was given.
    let mut said: Vec<(String, OffsetDateTime, OffsetDateTime)> = Vec::new();
    let mut signed: HashMap<String, OffsetDateTime> = HashMap::new();
    let time = |value: &serde_json::Value| OffsetDateTime::parse(value.as_str().unwrap(), &Rfc3339).unwrap();
    until("all are signed", async || {
        for id in &ids {
            if !signed.contains_key(id) {
                let state = answer(world.get(id).await).await.body;
                match state["status"].as_str() {
                    Some("signed") => _ = signed.insert(id.clone(), time(&state["signedAt"])),
                    _ => said.push((id.clone(), OffsetDateTime::now_utc(), time(&state["estimatedCompletionAt"]))),
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        signed.len() == ids.len()
    })
    .await;
    let interval = 0.1;
    let mut errors: Vec<f64> = said
        .iter()
        .map(|(id, at, expected)| {
            let waited = (signed[id] - *at).as_seconds_f64().max(interval);
            (signed[id] - *expected).as_seconds_f64().abs() / waited
        })
        .collect();
    errors.sort_by(f64::total_cmp);
    let median = errors[errors.len() / 2];
    println!("{} estimates, median error {:.1} %", errors.len(), median * 100.0);
    assert!(errors.len() > MESSAGES && median <= 0.25, "{median}");
}
