//! The outcome of the burst: the table, and the failures, if any.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use super::burst::Outcome;
use crate::receiver::Delivery;
use crate::report::{new_table, percentile, right};
use crate::simulate::oracle::earliest_end;
use crate::simulate::world::{Message, World};
use crate::units::Rate;
use crate::upstream::Audit;

/// The figures of one run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Report {
    posted: usize,
    answered_200: usize,
    answered_202: usize,
    slowest_answer: Duration,
    signed: usize,
    /// Median, 95th percentile and largest time to a signature.
    to_signature: [Duration; 3],
    /// The time from the first POST to the last signature.
    drained: Duration,
    /// The same for a scheduler that knows every outage in advance, or less.
    earliest: Duration,
    delivered: usize,
    unverified: usize,
    calls: u64,
    signed_twice: u64,
    max_in_window: u64,
    limit: u64,
    window: Duration,
}

impl Report {
    /// Combines what the callers, the receiver and the upstream saw.
    pub(super) fn new(outcomes: &[Outcome], deliveries: &[Delivery], audit: &Audit, max_in_window: u64) -> Self {
        let answered = |status| outcomes.iter().filter(|outcome| outcome.answer == Some(status)).count();
        let mut times: Vec<Duration> = outcomes.iter().filter_map(|outcome| Some(outcome.signature.as_ref()?.1)).collect();
        times.sort_unstable();
        let signatures: HashMap<&str, &str> =
            outcomes.iter().filter_map(|outcome| Some((outcome.id.as_deref()?, outcome.signature.as_ref()?.0.as_str()))).collect();
        let mut delivered: HashMap<&str, bool> = HashMap::new();
        for delivery in deliveries {
            let data = &delivery.body["data"];
            let id = data["id"].as_str().unwrap_or_default();
            // A webhook is correct if the independent library verifies it and it has the same signature as the API.
            let right = delivery.verified && signatures.get(id).copied() == data["signature"].as_str();
            delivered.entry(id).and_modify(|all| *all &= right).or_insert(right);
        }
        Self {
            posted: outcomes.len(),
            answered_200: answered(200),
            answered_202: answered(202),
            slowest_answer: outcomes.iter().map(|outcome| outcome.answered_in).max().unwrap_or_default(),
            signed: times.len(),
            to_signature: [50.0, 95.0, 100.0].map(|per_cent| percentile(&times, per_cent)),
            drained: outcomes.iter().filter_map(|outcome| Some(outcome.posted + outcome.signature.as_ref()?.1)).max().unwrap_or_default(),
            earliest: earliest(outcomes, audit),
            delivered: delivered.values().filter(|right| **right).count(),
            unverified: delivered.values().filter(|right| !**right).count(),
            calls: audit.calls,
            signed_twice: audit.signed_twice,
            max_in_window,
            limit: audit.limit,
            window: Duration::from_millis(audit.window_ms),
        }
    }

    fn drained_in(&self) -> String {
        let [drained, earliest] = [self.drained, self.earliest].map(|time| time.as_secs_f64());
        if earliest > 0.0 { format!("{drained:.1} s / {earliest:.1} s = {:.2}", drained / earliest) } else { format!("{drained:.1} s") }
    }

    /// The failures; empty if all is well.
    pub(super) fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        let mut check = |wrong: bool, what: String| {
            if wrong {
                failures.push(what);
            }
        };
        let lost = self.posted - self.signed;
        check(lost > 0, format!("{lost} requests without a signature"));
        check(self.unverified > 0, format!("{} webhooks that do not verify, or tell another signature than the API", self.unverified));
        let missing = self.signed.saturating_sub(self.delivered + self.unverified);
        check(missing > 0, format!("{missing} webhooks not delivered"));
        check(self.max_in_window > self.limit, format!("{} calls in one window, {} allowed", self.max_in_window, self.limit));
        check(self.signed_twice > 0, format!("{} calls for messages that were signed already", self.signed_twice));
        failures
    }
}

/// The earliest end of this burst that any scheduler can reach. Zero if the upstream does not say how long messages failed.
fn earliest(outcomes: &[Outcome], audit: &Audit) -> Duration {
    let message = |outcome: &Outcome| {
        let outage = audit.outages_ms.get(&outcome.message_digest).copied().map_or(Duration::ZERO, Duration::from_millis);
        Message { arrives: outcome.posted, outage }
    };
    let mut messages: Vec<Message> = outcomes.iter().map(message).collect();
    messages.sort_by_key(|message| message.arrives);
    let (Ok(calls), window) = (u16::try_from(audit.limit), Duration::from_millis(audit.window_ms)) else { return Duration::ZERO };
    Rate::new(calls, window).map_or(Duration::ZERO, |rate| {
        earliest_end(&World { messages, rate, latency: Duration::ZERO..=Duration::ZERO, horizon: Duration::MAX })
    })
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |time: Duration| format!("{:.2} s", time.as_secs_f64());
        let [median, p95, longest] = self.to_signature.map(seconds);
        let rows = [
            ("posted", self.posted.to_string()),
            ("answered 200 / 202", format!("{} / {}", self.answered_200, self.answered_202)),
            ("slowest answer to a POST", seconds(self.slowest_answer)),
            ("signed", self.signed.to_string()),
            ("time to the signature: p50 / p95 / max", format!("{median} / {p95} / {longest}")),
            ("last signature / earliest possible, if every outage were known", self.drained_in()),
            ("webhooks delivered and verified", self.delivered.to_string()),
            ("upstream calls made", self.calls.to_string()),
            ("most calls in any window / allowed", format!("{} / {} in {:?}", self.max_in_window, self.limit, self.window)),
            ("requests lost", (self.posted - self.signed).to_string()),
        ];
        let mut table = new_table();
        for (what, value) in rows {
            table.add_row([what.to_owned(), value]);
        }
        right(&mut table, 1);
        writeln!(f, "{table}")?;
        match self.failures() {
            failures if failures.is_empty() => write!(f, "nothing lost, every webhook verified, never over the budget"),
            failures => write!(f, "failed: {}", failures.join("; ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Report {
        Report { posted: 60, signed: 60, delivered: 60, max_in_window: 10, limit: 10, ..Report::default() }
    }

    #[test]
    fn the_end_is_compared_with_the_earliest_possible_one() {
        let outcome = |digest: &str, seconds| Outcome {
            message_digest: digest.to_owned(),
            signature: Some(("s".to_owned(), Duration::from_secs(seconds))),
            ..Outcome::default()
        };
        let outages_ms = [("fails".to_owned(), 30_000)].into();
        let audit = Audit { limit: 1, window_ms: 10_000, outages_ms, ..Audit::default() };
        let report = Report::new(&[outcome("works", 10), outcome("fails", 36)], &[], &audit, 1);
        assert_eq!(report.drained_in(), "36.0 s / 30.0 s = 1.20");
    }

    #[test]
    fn anything_lost_unverified_or_over_the_budget_is_a_failure() {
        assert!(good().failures().is_empty());
        assert!(good().to_string().contains("nothing lost"));
        for bad in [
            Report { signed: 59, ..good() },
            Report { delivered: 59, ..good() },
            Report { delivered: 59, unverified: 1, ..good() },
            Report { max_in_window: 11, ..good() },
            Report { signed_twice: 1, ..good() },
        ] {
            assert_eq!(bad.failures().len(), 1, "{bad:?}");
            assert!(bad.to_string().contains("failed: "));
        }
    }
}
