//! How a webhook receiver answers: properly, or with one of the faults that receivers have.

use serde::{Deserialize, Serialize};

/// How deliveries are answered. [`Default`] answers 204 to all of them.
///
/// As JSON: `{"status":204,"misbehave":{"kind":"status","status":500},"first":2,"retryAfter":5}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Behaviour {
    /// The status of an ordinary answer.
    pub status: u16,
    /// The misbehaviour that replaces an ordinary answer; `None` for none.
    pub misbehave: Option<Misbehaviour>,
    /// The number of deliveries of each webhook ID that meet the misbehaviour, from the first one; `None` for all.
    pub first: Option<u32>,
    /// `Retry-After`, in seconds, on answers that are not 2xx.
    pub retry_after: Option<u64>,
    /// The delay of every answer, in milliseconds.
    pub latency_ms: u64,
}

/// What a receiver does instead of giving an ordinary answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase")]
pub enum Misbehaviour {
    /// Answers with another status.
    Status {
        /// The status.
        status: u16,
    },
    /// Does not answer for as long as the sender waits.
    Hang,
    /// Answers 200 with a body that arrives byte by byte and never ends.
    SlowBody,
    /// Closes the connection without an answer.
    Drop,
    /// Redirects to another address with 302.
    Redirect {
        /// The target of the redirect.
        location: String,
    },
}

impl Default for Behaviour {
    fn default() -> Self {
        Self { status: 204, misbehave: None, first: None, retry_after: None, latency_ms: 0 }
    }
}

impl Behaviour {
    /// Misbehaves with every delivery.
    #[must_use]
    pub fn always(misbehave: Misbehaviour) -> Self {
        Self { misbehave: Some(misbehave), ..Self::default() }
    }

    /// Answers the first `count` deliveries of each webhook ID with `status`, and the following ones with 204.
    #[must_use]
    pub fn fail_first(count: u32, status: u16) -> Self {
        Self { misbehave: Some(Misbehaviour::Status { status }), first: Some(count), ..Self::default() }
    }

    /// The misbehaviour for the delivery with this number, counted from 1 for each webhook ID; `None` for an ordinary answer.
    pub(super) fn of(&self, number: u32) -> Option<&Misbehaviour> {
        self.misbehave.as_ref().filter(|_| self.first.is_none_or(|first| number <= first))
    }

    /// Returns whether all statuses are valid.
    pub(super) fn valid(&self) -> bool {
        let other = match self.misbehave {
            Some(Misbehaviour::Status { status }) => status,
            _ => 200,
        };
        [self.status, other].into_iter().all(|status| (200..=599).contains(&status))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn behaviour_is_written_in_json_as_documented() {
        let text = r#"{"misbehave":{"kind":"status","status":500},"first":2,"retryAfter":5}"#;
        let behaviour: Behaviour = serde_json::from_str(text).unwrap();
        assert_eq!(behaviour, Behaviour { retry_after: Some(5), ..Behaviour::fail_first(2, 500) });
        assert!(behaviour.valid() && !Behaviour { status: 99, ..behaviour }.valid());
    }

    #[test]
    fn only_the_first_deliveries_are_misbehaved() {
        let behaviour = Behaviour::fail_first(2, 503);
        assert_eq!([1, 2, 3].map(|number| behaviour.of(number).is_some()), [true, true, false]);
        assert!(Behaviour::always(Misbehaviour::Hang).of(9).is_some());
    }
}
