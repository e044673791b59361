//! Faults that a test can switch on: what goes wrong, and for which calls.

use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

/// All active faults of the upstream. [`Default`] has none.
///
/// As JSON: `{"calls":[{"kind":"hang","when":{"next":3}}],"dropConnections":"always","goneForMs":5000}`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Faults {
    /// The faults that replace the answer to a call; the first one that applies is used.
    pub calls: Vec<Fault>,
    /// Which new connections are accepted and closed before anything is read; their calls never arrive.
    pub drop_connections: Option<When>,
    /// Refuses connections, as if the upstream were stopped, until the faults are set again.
    #[serde(skip)]
    pub gone: bool,
    /// Refuses connections for this many milliseconds. Over HTTP, an upstream that is gone for good could not be brought back.
    pub gone_for_ms: Option<u64>,
}

/// A fault and the calls that it affects.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fault {
    /// What happens instead of the answer.
    #[serde(flatten)]
    pub kind: FaultKind,
    /// The calls that it affects.
    pub when: When,
}

/// What happens instead of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum FaultKind {
    /// No answer, for as long as the client waits.
    Hang,
    /// The connection is reset (RST).
    Reset,
    /// The connection is closed without a byte.
    Close,
    /// A 200 that promises a whole signature and ends in the middle of it.
    Truncate,
    /// 429 with `Retry-After` in seconds.
    TooMany {
        /// Seconds until the client may call again.
        retry_after: u64,
    },
    /// 401, as for a wrong key.
    Unauthorized,
    /// 500.
    Error,
    /// 502 with the text of a message's outage.
    Outage,
}

/// The calls (or connections) that a fault affects.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum When {
    /// All of them.
    Always,
    /// This many of the next ones; the number is counted down in place.
    Next(u32),
    /// Each with this probability, from 0 to 1.
    Probability(f64),
}

impl Faults {
    /// Faults with a single fault of calls.
    #[must_use]
    pub fn one(kind: FaultKind, when: When) -> Self {
        Self { calls: vec![Fault { kind, when }], ..Self::default() }
    }

    /// The fault that the call arriving now meets, if any.
    pub(super) fn pick(&mut self, rng: &mut impl Rng) -> Option<FaultKind> {
        self.calls.iter_mut().find_map(|fault| fault.when.applies(rng).then_some(fault.kind))
    }

    /// Returns whether all probabilities are valid.
    pub(super) fn valid(&self) -> bool {
        let whens = self.calls.iter().map(|fault| fault.when).chain(self.drop_connections);
        whens.into_iter().all(|when| !matches!(when, When::Probability(share) if !(0.0..=1.0).contains(&share)))
    }
}

impl When {
    pub(super) fn applies(&mut self, rng: &mut impl Rng) -> bool {
        match self {
            Self::Always => true,
            Self::Next(0) => false,
            Self::Next(left) => {
                *left -= 1;
                true
            }
            Self::Probability(share) => rng.random_bool(*share),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_written_in_json_as_documented() {
        let text = r#"{"calls":[{"kind":"hang","when":{"next":3}},{"kind":"tooMany","retryAfter":5,"when":"always"},
            {"kind":"error","when":{"probability":0.5}}],"dropConnections":"always","goneForMs":5000}"#;
        let faults: Faults = serde_json::from_str(text).unwrap();
        assert_eq!(faults.calls[0], Fault { kind: FaultKind::Hang, when: When::Next(3) });
        assert_eq!(faults.calls[1].kind, FaultKind::TooMany { retry_after: 5 });
        assert_eq!((faults.drop_connections, faults.gone_for_ms), (Some(When::Always), Some(5000)));
        assert!(faults.valid());
        assert!(serde_json::from_str::<Faults>(r#"{"calls":[{"kind":"nonsense","when":"always"}]}"#).is_err());
        assert!(!Faults::one(FaultKind::Hang, When::Probability(2.0)).valid());
    }

    #[test]
    fn a_fault_for_the_next_calls_runs_out_and_the_one_below_it_takes_over() {
        let mut faults = Faults::one(FaultKind::Reset, When::Next(2));
        faults.calls.push(Fault { kind: FaultKind::Error, when: When::Next(1) });
        let picked: Vec<_> = (0..4).map(|_| faults.pick(&mut rand::rng())).collect();
        assert_eq!(picked, [Some(FaultKind::Reset), Some(FaultKind::Reset), Some(FaultKind::Error), None]);
    }
}
