//! What the upstream saw: every call at its arrival, and the summary by which tests and the demonstration judge the services.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Digest;
use super::window::most_in_a_window;
use crate::hex::hex;

/// The number of calls that are kept; the oldest are dropped first.
const REMEMBERED: usize = 250_000;

/// A summary of the calls since the start, the last reset, or the time asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Audit {
    /// Calls that arrived: to sign and to verify, answered or not.
    pub calls: u64,
    /// Calls to sign.
    pub sign_calls: u64,
    /// Calls to verify.
    pub verify_calls: u64,
    /// Calls allowed in one window.
    pub limit: u64,
    /// Length of the window, in milliseconds.
    pub window_ms: u64,
    /// The largest number of calls that arrived within any one window.
    pub max_in_window: u64,
    /// The largest number of calls to sign one message that were in flight at once.
    pub max_in_flight_per_message: u64,
    /// Calls that arrived when the window was full.
    pub over_budget: u64,
    /// Answers by status; `none` counts the calls that got no answer (yet).
    pub by_status: BTreeMap<String, u64>,
    /// Calls to sign a message that had already received a complete 200.
    pub signed_twice: u64,
    /// The time of the audit, in milliseconds since the start of the simulator; `since` is on the same scale.
    pub now_ms: u64,
    /// Calls that are no longer kept; if above 0, the figures leave them out.
    pub forgotten: u64,
    /// How long each message failed, or will have failed, in milliseconds, by its SHA-256 in hexadecimal. Messages that never failed, or
    /// were first called earlier, are missing.
    pub outages_ms: BTreeMap<String, u64>,
    /// The calls, in the order of arrival.
    pub recent: Vec<CallSummary>,
}

/// One call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CallSummary {
    /// Its arrival, in milliseconds since the start of the simulator.
    pub at_ms: u64,
    /// `/crypto/sign` or `/crypto/verify`.
    pub path: String,
    /// The status of the answer; `None` as long as there is no answer.
    pub status: Option<u16>,
    /// SHA-256 of the message, in hexadecimal; `None` if the call had no readable message.
    pub message_digest: Option<String>,
}

/// The two kinds of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallKind {
    Sign,
    Verify,
}

impl CallKind {
    pub(super) fn path(self) -> &'static str {
        match self {
            Self::Sign => "/crypto/sign",
            Self::Verify => "/crypto/verify",
        }
    }
}

#[derive(Debug)]
struct Call {
    at: Duration,
    kind: CallKind,
    message: Option<Digest>,
    status: Option<u16>,
    over_budget: bool,
    in_flight: u32,
    already_signed: bool,
}

/// Identifies a call until it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CallNumber(u64);

/// The calls that are kept. Times are since the start of the simulator.
#[derive(Debug, Default)]
pub(super) struct Log {
    calls: VecDeque<Call>,
    /// The number of the first call in `calls`.
    first: u64,
    /// The number of the first call since the last reset.
    reset: u64,
    in_flight: HashMap<Digest, u32>,
    signed: HashSet<Digest>,
}

impl Log {
    /// Records the arrival of a call, which must not be earlier than the previous one.
    pub(super) fn arrived(&mut self, at: Duration, kind: CallKind, message: Option<Digest>, over_budget: bool) -> CallNumber {
        let to_sign = message.filter(|_| kind == CallKind::Sign);
        let in_flight = to_sign.map_or(0, |message| {
            let count = self.in_flight.entry(message).or_default();
            *count += 1;
            *count
        });
        let already_signed = to_sign.is_some_and(|message| self.signed.contains(&message));
        if self.calls.len() == REMEMBERED {
            self.calls.pop_front();
            self.first += 1;
        }
        self.calls.push_back(Call { at, kind, message, status: None, over_budget, in_flight, already_signed });
        CallNumber(self.first + self.calls.len() as u64 - 1)
    }

    /// Records the end of a call, and whether its answer, if any, was complete.
    pub(super) fn ended(&mut self, call: CallNumber, kind: CallKind, message: Option<Digest>, status: Option<u16>, complete: bool) {
        if let (CallKind::Sign, Some(message)) = (kind, message) {
            if let Some(count) = self.in_flight.get_mut(&message) {
                *count -= 1;
                if *count == 0 {
                    self.in_flight.remove(&message);
                }
            }
            if complete && status == Some(200) {
                self.signed.insert(message);
            }
        }
        let index = call.0.checked_sub(self.first).and_then(|index| usize::try_from(index).ok());
        if let Some(call) = index.and_then(|index| self.calls.get_mut(index)) {
            call.status = status;
        }
    }

    /// Excludes all calls so far from later summaries. What is known about messages is kept.
    pub(super) fn reset(&mut self) {
        self.reset = self.first + self.calls.len() as u64;
    }

    /// The summary of the calls that arrived at `since` or later.
    pub(super) fn audit(&self, limit: u16, window: Duration, now: Duration, since: Duration) -> Audit {
        let skip = usize::try_from(self.reset.saturating_sub(self.first)).unwrap_or(usize::MAX);
        let calls = || self.calls.iter().skip(skip).filter(|call| call.at >= since);
        let count = |which: fn(&Call) -> bool| calls().filter(|call| which(call)).count() as u64;
        let mut by_status = BTreeMap::new();
        for call in calls() {
            let key = call.status.map_or_else(|| "none".to_owned(), |status| status.to_string());
            *by_status.entry(key).or_default() += 1;
        }
        Audit {
            calls: count(|_| true),
            sign_calls: count(|call| call.kind == CallKind::Sign),
            verify_calls: count(|call| call.kind == CallKind::Verify),
            limit: limit.into(),
            window_ms: millis(window),
            max_in_window: most_in_a_window(calls().map(|call| call.at), window) as u64,
            max_in_flight_per_message: calls().map(|call| u64::from(call.in_flight)).max().unwrap_or(0),
            over_budget: count(|call| call.over_budget),
            by_status,
            signed_twice: count(|call| call.already_signed),
            now_ms: millis(now),
            forgotten: self.first.saturating_sub(self.reset),
            outages_ms: BTreeMap::new(),
            recent: calls().map(CallSummary::from).collect(),
        }
    }
}

impl From<&Call> for CallSummary {
    fn from(call: &Call) -> Self {
        Self {
            at_ms: millis(call.at),
            path: call.kind.path().to_owned(),
            status: call.status,
            message_digest: call.message.map(|digest| hex(&digest)),
        }
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use CallKind::{Sign, Verify};

    const ONE: Option<Digest> = Some([1; 32]);
    const TWO: Option<Digest> = Some([2; 32]);
    const WINDOW: Duration = Duration::from_secs(1);

    fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    #[test]
    fn calls_under_way_for_one_message_are_seen_and_others_do_not_count() {
        let mut log = Log::default();
        let first = log.arrived(ms(0), Sign, ONE, false);
        log.arrived(ms(1), Sign, TWO, false);
        log.arrived(ms(2), Verify, ONE, false);
        assert_eq!(log.audit(10, WINDOW, ms(3), ms(0)).max_in_flight_per_message, 1);
        log.arrived(ms(3), Sign, ONE, false);
        log.ended(first, Sign, ONE, Some(502), true);
        log.arrived(ms(4), Sign, ONE, false);
        let audit = log.audit(10, WINDOW, ms(5), ms(0));
        assert_eq!((audit.max_in_flight_per_message, audit.calls, audit.sign_calls, audit.verify_calls), (2, 5, 4, 1));
        assert_eq!(audit.by_status, BTreeMap::from([("502".to_owned(), 1), ("none".to_owned(), 4)]));
    }

    #[test]
    fn only_a_complete_200_makes_the_next_call_one_too_many() {
        let mut log = Log::default();
        for (at, complete) in [(0, false), (1, true), (2, true)] {
            let call = log.arrived(ms(at), Sign, ONE, false);
            log.ended(call, Sign, ONE, Some(200), complete);
        }
        assert_eq!(log.audit(10, WINDOW, ms(3), ms(0)).signed_twice, 1);
    }

    #[test]
    fn a_reset_and_since_leave_out_what_came_before() {
        let mut log = Log::default();
        let before = log.arrived(ms(0), Sign, ONE, true);
        log.arrived(ms(10), Sign, TWO, false);
        assert_eq!(log.audit(1, WINDOW, ms(10), ms(0)).max_in_window, 2);
        assert_eq!(log.audit(1, WINDOW, ms(10), ms(5)).max_in_window, 1);
        log.reset();
        log.ended(before, Sign, ONE, Some(200), true);
        let audit = log.audit(1, WINDOW, ms(20), ms(0));
        assert_eq!((audit.calls, audit.over_budget, audit.max_in_window), (0, 0, 0));
        log.arrived(ms(20), Sign, ONE, false);
        assert_eq!(log.audit(1, WINDOW, ms(20), ms(0)).signed_twice, 1, "what is known of messages stays");
    }
}
