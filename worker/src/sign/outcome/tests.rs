//! Tests of what a reply means, and of what is decided after it.

use rand::{SeedableRng, rngs::SmallRng};
use shared::backoff::Strategy;

use super::*;

#[test]
fn while_there_is_time_a_message_is_tried_again_however_long_the_delay_would_be() {
    let [second, minute, hour] = [Duration::from_secs(1), Duration::from_mins(1), Duration::from_hours(1)];
    assert_eq!(before_deadline(second, minute), Some(second));
    assert_eq!(before_deadline(hour, minute), Some(minute / 2));
    assert_eq!(before_deadline(second, second / 2), None);
    let mut left = minute;
    let mut tries = 0;
    while let Some(delay) = before_deadline(hour, left) {
        left -= delay;
        tries += 1;
    }
    assert_eq!(tries, 6, "it ends");
}

fn answered(status: u16, body: &str) -> Reply {
    Reply::Answered { status, body: Ok(body.as_bytes().to_vec()), retry_after: None }
}

fn outcome(reply: Reply) -> Outcome {
    judge(reply, &"408,425,429,500,502,503,504".parse().unwrap()).outcome
}

#[test]
fn a_signature_is_taken_byte_for_byte() {
    assert_eq!(outcome(answered(200, " c2ln\n")), Outcome::Signed(" c2ln\n".to_owned()));
}

#[test]
fn what_is_no_signature_is_tried_again() {
    assert_eq!(outcome(answered(200, "")), Outcome::TryAgain);
    assert_eq!(outcome(answered(204, "")), Outcome::TryAgain);
    for body in [Err(BodyError::Truncated), Err(BodyError::TooLarge), Ok(vec![0xff])] {
        assert_eq!(outcome(Reply::Answered { status: 200, body, retry_after: None }), Outcome::TryAgain);
    }
}

#[test]
fn failures_of_a_message_are_tried_again_and_refusals_are_final() {
    for status in [408, 425, 500, 502, 503, 504] {
        assert_eq!(outcome(answered(status, "no")), Outcome::TryAgain, "{status}");
    }
    for status in [400, 410, 413, 422, 501] {
        assert_eq!(outcome(answered(status, "no")), Outcome::Refused, "{status}");
    }
    assert_eq!(outcome(Reply::TimedOut), Outcome::TryAgain);
    assert_eq!(outcome(Reply::Broken), Outcome::TryAgain);
}

#[test]
fn failures_of_the_upstream_are_told_from_failures_of_a_message() {
    for status in [302, 401, 403, 404, 405] {
        assert_eq!(outcome(answered(status, "no")), Outcome::Unavailable { answered: true }, "{status}");
    }
    let refused = judge(Reply::NotConnected(CallError::Connection), &"500".parse().unwrap());
    assert_eq!((refused.outcome, refused.call), (Outcome::Unavailable { answered: false }, Call::NotMade));
}

#[test]
fn the_configured_statuses_win() {
    let judged = |status, list: &str| judge(answered(status, ""), &list.parse().unwrap()).outcome;
    assert_eq!(judged(403, "403"), Outcome::TryAgain);
    assert_eq!(judged(502, "503"), Outcome::Refused);
    assert_eq!(judged(429, "503"), Outcome::Refused);
    assert_eq!(judged(429, "429"), Outcome::Throttled(None));
}

const SECOND: Duration = Duration::from_secs(1);
const DEADLINE: Duration = Duration::from_hours(1);

/// Waits ten seconds after each failure, but up to two after the first one.
fn policy() -> RetryPolicy {
    let backoff = Backoff::new(Strategy::Fixed, 10 * SECOND, 10 * SECOND, Jitter::NONE).unwrap();
    RetryPolicy { backoff, initial_delay: 2 * SECOND, max_attempts: 5, deadline: DEADLINE }
}

fn attempt(attempt: u32, age: Duration) -> FailedAttempt {
    FailedAttempt { attempt, competing: 1, interval: 6 * SECOND, age }
}

fn decide(attempt: FailedAttempt, breaker_failures: u32, outcome: Outcome) -> (SignEnding, UpstreamNews) {
    policy().decide(attempt, breaker_failures, outcome, Instant::now(), &mut SmallRng::seed_from_u64(1))
}

#[test]
fn an_answer_about_the_message_closes_the_breaker_and_otherwise_is_no_news() {
    for outcome in [Outcome::Signed("c2ln".to_owned()), Outcome::Refused, Outcome::TryAgain] {
        assert_eq!(decide(attempt(1, SECOND), 0, outcome.clone()).1, UpstreamNews::None, "{outcome:?}");
        assert_eq!(decide(attempt(1, SECOND), 3, outcome.clone()).1, UpstreamNews::Up, "{outcome:?}");
    }
}

#[test]
fn a_failure_is_tried_again_until_its_attempts_or_its_time_are_used_up() {
    let ending = |number, age| decide(attempt(number, age), 0, Outcome::TryAgain).0;
    let SignEnding::Retry(first) = ending(1, SECOND) else { panic!("no retry") };
    assert!(first <= 2 * SECOND, "{first:?}");
    assert_eq!(ending(2, SECOND), SignEnding::Retry(10 * SECOND));
    assert_eq!(ending(2, DEADLINE.saturating_sub(8 * SECOND)), SignEnding::Retry(4 * SECOND));
    assert_eq!(ending(5, SECOND), SignEnding::Failed(Failure::AttemptsExhausted));
    assert_eq!(ending(2, DEADLINE), SignEnding::Failed(Failure::DeadlineExceeded));
}

#[test]
fn a_message_that_an_absent_upstream_answered_waits_with_the_retries_but_not_past_its_deadline() {
    let ending = |answered, age| decide(attempt(1, age), 0, Outcome::Unavailable { answered }).0;
    assert_eq!(ending(false, SECOND), SignEnding::Unavailable { again_in: None });
    assert_eq!(ending(true, SECOND), SignEnding::Unavailable { again_in: Some(10 * SECOND) });
    assert_eq!(ending(true, DEADLINE.saturating_sub(SECOND / 2)), SignEnding::Unavailable { again_in: Some(SECOND / 2) });
    assert_eq!(ending(true, 2 * DEADLINE), SignEnding::Unavailable { again_in: Some(Duration::ZERO) });
}

#[test]
fn an_absent_upstream_is_probed_less_and_less_often_but_never_less_than_every_fifteen_seconds() {
    for breaker_failures in 0..40 {
        let (_, news) = decide(attempt(1, SECOND), breaker_failures, Outcome::Unavailable { answered: false });
        let UpstreamNews::Down { probe_in, failures } = news else { panic!("{news:?}") };
        assert_eq!(failures, breaker_failures + 1);
        let nominal = doubling(FIRST_PROBE_AFTER, PROBE_EVERY, failures);
        assert!(probe_in >= nominal.mul_f64(0.8) && probe_in <= PROBE_EVERY, "{probe_in:?} after {failures}");
    }
}

/// How long all pause after a 429, how long its message waits with the retries, and whether it answered a probe.
fn throttled(wait: Option<Duration>, breaker_failures: u32) -> (Duration, Duration, bool) {
    let (now, outcome) = (Instant::now(), Outcome::Throttled(wait));
    let (ending, news) = policy().decide(attempt(1, SECOND), breaker_failures, outcome, now, &mut SmallRng::seed_from_u64(1));
    let SignEnding::Unavailable { again_in: Some(again_in) } = ending else { panic!("{ending:?}") };
    let UpstreamNews::Pause { until, probed } = news else { panic!("{news:?}") };
    (until - now, again_in, probed)
}

#[test]
fn an_upstream_that_asks_all_to_wait_gets_at_least_an_interval_and_at_most_an_hour() {
    let pause = |wait, breaker_failures| {
        let (pause, _, probed) = throttled(wait, breaker_failures);
        (pause, probed)
    };
    assert_eq!(pause(None, 0), (6 * SECOND, false));
    assert_eq!(pause(Some(Duration::ZERO), 0), (6 * SECOND, false));
    assert_eq!(pause(Some(20 * SECOND), 1), (20 * SECOND, true));
    assert_eq!(pause(Some(10 * LONGEST_PAUSE), 0), (LONGEST_PAUSE, false));
}

#[test]
fn a_message_that_is_answered_429_waits_with_the_retries_as_after_a_failure_unless_it_is_told_how_long() {
    let again_in = |wait| throttled(wait, 0).1;
    assert_eq!(again_in(None), 10 * SECOND);
    assert_eq!(again_in(Some(Duration::ZERO)), 10 * SECOND);
    assert_eq!(again_in(Some(SECOND)), 6 * SECOND, "not sooner than all others");
    assert_eq!(again_in(Some(20 * SECOND)), 20 * SECOND);
    assert_eq!(again_in(Some(10 * LONGEST_PAUSE)), DEADLINE.saturating_sub(SECOND) / 2, "not past its deadline");
}
