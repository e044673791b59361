//! What an answer means for the delivery and for its receiver. Pure: the random generator is an argument.

use std::time::Duration;

use rand::Rng;
use shared::backoff::{Jitter, doubling};
use shared::call_error::CallError;
use shared::store::webhook_finish::{ReceiverNews, WebhookEnding, WebhookFailure};

use super::sender::Answer;
use crate::settings::Schedule;

/// The longest delay that a receiver can ask for. It may be longer than the schedule's, but not longer than the longest delay of the
/// default schedule.
const LONGEST_WAIT: Duration = Duration::from_hours(24);

/// Decides what becomes of a delivery after `answer`. `attempt` is counted from 1.
pub fn decide(answer: &Answer, attempt: u32, schedule: &Schedule, rng: &mut impl Rng) -> WebhookEnding {
    match answer.status {
        Some(200..=299) => return WebhookEnding::Delivered,
        Some(410) => return WebhookEnding::Exhausted(WebhookFailure::Gone),
        _ => {}
    }
    let Some(delay) = schedule.after(attempt) else { return WebhookEnding::Exhausted(WebhookFailure::AttemptsExhausted) };
    let delay = Jitter::FIFTH.apply(delay, rng);
    WebhookEnding::Retry(delay.max(asked(answer).min(LONGEST_WAIT)))
}

/// How long the receiver asks us to wait, for the statuses for which the specification defines it.
fn asked(answer: &Answer) -> Duration {
    answer.retry_after.filter(|_| matches!(answer.status, Some(429 | 503))).unwrap_or_default()
}

/// From this many failures in a row on, the receiver is tried less and less often.
const PATIENT_FAILURES: u32 = 3;

/// The longest pause between two deliveries to a failing receiver, unless the receiver asks for more.
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// The longest pause that a receiver can ask for. The next delivery shows whether it still wants one.
const LONGEST_ASKED_PAUSE: Duration = Duration::from_hours(1);

/// A receiver whose answer takes longer than this gets one delivery at a time. Otherwise it would hold calls that others wait for.
const SLOW: Duration = Duration::from_secs(1);

/// What `answer` says about the receiver, which had failed `before` times in a row. Our own pause is never longer than the longest delay of
/// `schedule`: whoever configures an attempt each second does not want to wait for a minute.
///
/// The receiver works if it answered in time, whatever the status, unless it asked for a pause: with 429, or 503 with `Retry-After`. A
/// quick 500 delays no other delivery and may concern only this webhook, which the schedule handles. An answer that does not arrive
/// completely in time shows that the receiver is slow, and counts as a failure. A webhook that can't be read says nothing about the
/// receiver: waiting would not fix it, and it costs nothing either.
#[must_use]
pub fn news(answer: &Answer, before: u32, schedule: &Schedule) -> ReceiverNews {
    match (answer.status, answer.error) {
        (_, Some(CallError::Unreadable)) => ReceiverNews::None { before },
        (Some(status), None) if status != 429 && asked(answer).is_zero() => ReceiverNews::Works { slow: answer.took > SLOW },
        _ => {
            // The requested pause applies to the receiver, not only to this webhook.
            let own = pause(before.saturating_add(1)).min(schedule.longest().unwrap_or(LONGEST_PAUSE));
            let pause = own.max(asked(answer).min(LONGEST_ASKED_PAUSE));
            ReceiverNews::Fails { before, pause }
        }
    }
}

/// The pause after `failures` in a row: none at first, then one second, doubled with each further failure, up to a minute.
fn pause(failures: u32) -> Duration {
    match failures.checked_sub(PATIENT_FAILURES) {
        None => Duration::ZERO,
        Some(doublings) => doubling(Duration::from_secs(1), LONGEST_PAUSE, doublings + 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usual() -> Schedule {
        "5s,5m".parse().unwrap()
    }

    fn after(status: u16, attempt: u32, retry_after: Option<u64>) -> WebhookEnding {
        let answer = Answer { status: Some(status), retry_after: retry_after.map(Duration::from_secs), ..Answer::default() };
        decide(&answer, attempt, &"5s,5m".parse().unwrap(), &mut rand::rng())
    }

    #[test]
    fn only_2xx_is_success_and_410_ends_the_delivery() {
        assert_eq!(after(204, 1, None), WebhookEnding::Delivered);
        assert_eq!(after(410, 1, None), WebhookEnding::Exhausted(WebhookFailure::Gone));
        for status in [199, 301, 302, 400, 404, 500] {
            assert!(matches!(after(status, 1, None), WebhookEnding::Retry(_)), "{status}");
        }
    }

    #[test]
    fn the_schedule_is_kept_within_a_fifth_and_then_the_delivery_is_exhausted() {
        for (attempt, nominal) in [(1, 5.0), (2, 300.0)] {
            let WebhookEnding::Retry(delay) = after(500, attempt, None) else { panic!("not retried") };
            assert!((delay.as_secs_f64() / nominal - 1.0).abs() <= 0.2 + 1e-9, "{delay:?}");
        }
        assert_eq!(after(500, 3, None), WebhookEnding::Exhausted(WebhookFailure::AttemptsExhausted));
    }

    #[test]
    fn retry_after_is_honoured_within_bounds_where_the_specification_has_it() {
        assert_eq!(after(429, 1, Some(60)), WebhookEnding::Retry(Duration::from_mins(1)));
        assert_eq!(after(503, 1, Some(99_999_999)), WebhookEnding::Retry(LONGEST_WAIT));
        assert!(matches!(after(500, 1, Some(60)), WebhookEnding::Retry(delay) if delay < Duration::from_secs(7)));
    }

    #[test]
    fn timeouts_and_refused_connections_are_tried_again() {
        for error in
            [CallError::Timeout, CallError::Connection, CallError::Tls, CallError::Reset, CallError::Address, CallError::Unreadable]
        {
            let answer = Answer { error: Some(error), ..Answer::default() };
            assert!(matches!(decide(&answer, 1, &"5s".parse().unwrap(), &mut rand::rng()), WebhookEnding::Retry(_)), "{error:?}");
        }
    }

    #[test]
    fn a_status_of_success_counts_even_if_the_rest_of_the_answer_does_not_come() {
        let answer = Answer { status: Some(200), error: Some(CallError::Body), ..Answer::default() };
        assert_eq!(decide(&answer, 1, &"5s".parse().unwrap(), &mut rand::rng()), WebhookEnding::Delivered);
        assert!(matches!(news(&answer, 0, &usual()), ReceiverNews::Fails { .. }), "but the receiver is slow");
    }

    #[test]
    fn a_receiver_works_if_it_answers_and_else_is_asked_less_and_less_often() {
        let answered = |status| Answer { status: Some(status), ..Answer::default() };
        for status in [200, 204, 302, 400, 404, 410, 500, 502, 503] {
            assert_eq!(news(&answered(status), 5, &usual()), ReceiverNews::Works { slow: false }, "{status}");
        }
        let silent = Answer { error: Some(CallError::Timeout), ..Answer::default() };
        let cut_off = Answer { error: Some(CallError::Body), ..answered(500) };
        for failed in [answered(429), silent, cut_off] {
            assert_eq!(news(&failed, 0, &usual()), ReceiverNews::Fails { before: 0, pause: Duration::ZERO }, "{failed:?}");
        }
        let late = Answer { took: Duration::from_millis(1001), ..answered(200) };
        assert_eq!(news(&late, 0, &usual()), ReceiverNews::Works { slow: true });
        let seconds: Vec<u64> = [1, 2, 3, 4, 5, 8, 9, 10, u32::MAX].map(|failures| pause(failures).as_secs()).into();
        assert_eq!(seconds, [0, 0, 1, 2, 4, 32, 60, 60, 60]);
    }

    #[test]
    fn a_receiver_that_fails_is_not_left_alone_for_longer_than_the_schedule_has_it() {
        let failed = Answer { error: Some(CallError::Connection), ..Answer::default() };
        for (schedule, expected) in [("1s,1s,1s", 1), ("1s,5s", 5), ("5s,5m", 60), ("", 60)] {
            let ReceiverNews::Fails { pause, .. } = news(&failed, 20, &schedule.parse().unwrap()) else { panic!("it fails") };
            assert_eq!(pause.as_secs(), expected, "{schedule}");
        }
    }

    #[test]
    fn a_receiver_that_asks_to_wait_is_left_alone_for_as_long_within_an_hour() {
        let asking =
            |status, seconds| Answer { status: Some(status), retry_after: Some(Duration::from_secs(seconds)), ..Answer::default() };
        for (status, seconds, expected) in [(429, 300, 300), (503, 300, 300), (503, 99_999, 3600)] {
            let pause = Duration::from_secs(expected);
            assert_eq!(news(&asking(status, seconds), 0, &usual()), ReceiverNews::Fails { before: 0, pause }, "{status}");
        }
        assert_eq!(news(&asking(500, 300), 0, &usual()), ReceiverNews::Works { slow: false }, "the specification has it for others");
        let ReceiverNews::Fails { pause, .. } = news(&asking(429, 1), 10, &usual()) else { panic!("it fails") };
        assert_eq!(pause, LONGEST_PAUSE, "but never for less than it would be");
    }
}
