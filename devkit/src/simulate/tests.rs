//! Tests of the simulation against schedules that can be checked by hand, of its oracle against actual schedules, and of the targets.

use std::time::Duration;

use proptest::prelude::*;

use super::Strategy;
use super::discipline::Discipline;
use super::world::{Message, World};
use super::*;

const S: Duration = Duration::from_secs(1);

fn ours() -> Discipline {
    Discipline::Ours(Backoff::new(Strategy::Adaptive, S, S * 600, Jitter::new(0.1).unwrap()).unwrap())
}

fn world(messages: &[(u32, u32)], rate: &str) -> World {
    let messages = messages.iter().map(|(arrives, outage)| Message { arrives: S * *arrives, outage: S * *outage });
    World { messages: messages.collect(), rate: rate.parse().unwrap(), latency: S..=S, horizon: Duration::MAX }
}

fn ends(world: &World, discipline: Discipline) -> Vec<f64> {
    engine::run(world, discipline, 1).signed.iter().map(|end| end.unwrap().as_secs_f64()).collect()
}

#[test]
fn a_slot_is_used_again_one_stretched_window_after_the_answer() {
    let world = world(&[(0, 0), (0, 0), (0, 0)], "1/10s");
    // Called at 0, 11.01 and 22.02; each answer takes a second.
    assert_eq!(ends(&world, Discipline::Fifo), [1.0, 12.01, 23.02]);
    let run = engine::run(&world, Discipline::Fifo, 1);
    assert_eq!((run.calls.len(), run.longest_wait), (3, Duration::from_millis(22_020)));
}

#[test]
fn an_outage_is_counted_from_the_first_call() {
    // The first call is at 5; the outage ends at 25; a clairvoyant calls again right then, a FIFO whenever it has a slot.
    let world = world(&[(5, 20)], "2/10s");
    assert_eq!(ends(&world, Discipline::Clairvoyant), [26.0]);
    let fifo = engine::run(&world, Discipline::Fifo, 1);
    assert_eq!(fifo.calls.iter().map(Duration::as_secs).collect::<Vec<_>>(), [5, 6, 16, 17, 27]);
}

#[test]
fn no_window_holds_more_calls_than_the_rate_allows() {
    for scenario in scenarios::scenarios() {
        let world = scenario.world(3, rate());
        for (name, discipline) in scenarios::disciplines(Backoff::new(Strategy::Adaptive, S, S * 600, Jitter::NONE).unwrap()) {
            let calls = engine::run(&world, discipline, 3).calls;
            let crowded = calls.windows(11).any(|calls| calls[10] < calls[0] + S * 60);
            assert!(!crowded, "{name}: {}", scenario.name);
        }
    }
}

#[test]
fn the_earliest_end_of_a_burst_is_its_useful_calls_its_outages_or_both() {
    // Three calls, one in ten seconds.
    assert_eq!(oracle::earliest_end(&world(&[(0, 0), (0, 0), (0, 0)], "1/10s")), S * 20);
    // Two messages, one of which fails: three calls.
    assert_eq!(oracle::earliest_end(&world(&[(0, 5), (0, 0)], "1/10s")), S * 20);
    // One long outage.
    assert_eq!(oracle::earliest_end(&world(&[(3, 100), (0, 0)], "2/10s")), S * 103);
    // Two long outages, and one call in ten seconds to begin them.
    assert_eq!(oracle::earliest_end(&world(&[(0, 100), (0, 95)], "1/10s")), S * 105);
}

#[test]
fn on_the_challenges_bursts_a_clairvoyant_schedule_comes_within_a_hundredth_of_the_earliest_end() {
    for scenario in &scenarios::scenarios()[..2] {
        let figures = figures::figures(scenario, Discipline::Clairvoyant, 200, rate());
        let (mean, p95) = figures.to_oracle.unwrap();
        assert!((1.0..1.01).contains(&mean) && p95 < 1.01, "{}: {mean} {p95}", scenario.name);
    }
}

#[test]
fn every_target_is_met_and_the_simulation_says_so() {
    let backoff = Backoff::new(Strategy::Adaptive, S, S * 600, Jitter::new(0.1).unwrap()).unwrap();
    let report = simulate(backoff, 200, |_| {});
    assert!(report.targets().iter().all(report::Target::is_met), "{report}");
    assert!(report.to_string().contains("pass") && !report.to_string().contains("fall short"));
}

#[test]
fn a_policy_that_is_worse_falls_short() {
    let backoff = Backoff::new(Strategy::Fixed, S * 400, S * 600, Jitter::NONE).unwrap();
    let report = simulate(backoff, 20, |_| {});
    assert!(!report.targets().iter().all(report::Target::is_met), "{report}");
    assert!(report.to_string().contains("fall short"));
}

#[test]
fn first_come_first_served_lets_retries_wait_longer_than_our_bound() {
    let scenario = scenarios::scenarios().into_iter().find(|scenario| scenario.name == "300 at once").unwrap();
    let of = |discipline| figures::figures(&scenario, discipline, 20, rate()).part_of_bound;
    assert!(of(Discipline::Fifo) > 1.0 && of(ours()) <= 1.0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn nobody_ends_before_the_earliest_end(
        messages in prop::collection::vec((0u32..100, prop_oneof![Just(0u32), 1u32..300]), 1..25), calls in 1u16..5, seed: u64,
    ) {
        let mut messages = messages;
        messages.sort_unstable();
        let world = world(&messages, &format!("{calls}/30s"));
        for discipline in [Discipline::Fifo, ours(), Discipline::Clairvoyant] {
            let run = engine::run(&world, discipline, seed);
            let end = run.signed.iter().map(|end| end.unwrap()).max().unwrap();
            prop_assert!(end >= oracle::earliest_end(&world), "{discipline:?}: {end:?}");
        }
    }

    #[test]
    fn every_message_is_signed_and_none_waits_longer_than_its_bound(
        messages in prop::collection::vec((0u32..2000, prop_oneof![Just(0u32), 1u32..900]), 1..80), calls in 1u16..12, seed: u64,
    ) {
        let mut messages = messages;
        messages.sort_unstable();
        let run = engine::run(&world(&messages, &format!("{calls}/60s")), ours(), seed);
        prop_assert!(run.signed.iter().all(Option::is_some));
        prop_assert!(run.largest_part_of_bound <= 1.0, "{}", run.largest_part_of_bound);
    }
}
