//! What the upstream decides about a call: a mapping from what arrived to what happens. Pure: no socket, no clock, no sleep.

use std::ops::RangeInclusive;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::audit::{CallKind, CallNumber, Log};
use super::faults::{FaultKind, Faults};
use super::outages::Outages;
use super::window::SlidingWindow;
use super::{Digest, SimulatorOptions};

/// A call, as far as it could be parsed.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) kind: CallKind,
    /// Whether the key is the right one.
    pub(super) key_matches: bool,
    /// The digest of the message; `None` if it is missing, empty or not UTF-8.
    pub(super) message: Option<Digest>,
}

/// What happens to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// A complete signature.
    Sign,
    /// A signature that is cut off in the middle.
    SignTruncated,
    /// The signature sent with the call is checked.
    Verify,
    /// 400: no readable message.
    BadRequest,
    /// 401.
    Unauthorized,
    /// 429, with seconds to wait.
    TooMany {
        retry_after: u64,
    },
    /// 500.
    Error,
    /// 502 of an outage.
    Degraded,
    Hang,
    Close,
    Reset,
}

/// The state of the upstream. Times are since its start.
#[derive(Debug)]
pub(super) struct Model {
    limit: u16,
    enforce: bool,
    latency: RangeInclusive<Duration>,
    budget: SlidingWindow,
    outages: Outages,
    rng: StdRng,
    pub(super) log: Log,
    pub(super) faults: Faults,
}

impl Model {
    pub(super) fn new(options: &SimulatorOptions) -> Self {
        Self {
            limit: options.rate.calls(),
            enforce: options.enforce_rate,
            latency: options.latency.clone(),
            budget: SlidingWindow::new(options.rate.window()),
            outages: Outages::new(options.failure_probability, options.outage.clone()),
            rng: options.seed.map_or_else(rand::make_rng, StdRng::seed_from_u64),
            log: Log::default(),
            faults: Faults::default(),
        }
    }

    /// Decides what happens to a call that arrives now, and how long its answer is delayed.
    pub(super) fn arrive(&mut self, now: Duration, call: &Call) -> (CallNumber, Verdict, Duration) {
        let over_budget = self.budget.push(now) > usize::from(self.limit);
        let number = self.log.arrived(now, call.kind, call.message, over_budget);
        let verdict = self.verdict(now, call, over_budget);
        (number, verdict, self.rng.random_range(self.latency.clone()))
    }

    fn verdict(&mut self, now: Duration, call: &Call, over_budget: bool) -> Verdict {
        if !call.key_matches {
            return Verdict::Unauthorized;
        }
        if let Some(fault) = self.faults.pick(&mut self.rng) {
            return match fault {
                FaultKind::Hang => Verdict::Hang,
                FaultKind::Reset => Verdict::Reset,
                FaultKind::Close => Verdict::Close,
                FaultKind::Truncate => Verdict::SignTruncated,
                FaultKind::TooMany { retry_after } => Verdict::TooMany { retry_after },
                FaultKind::Unauthorized => Verdict::Unauthorized,
                FaultKind::Error => Verdict::Error,
                FaultKind::Outage => Verdict::Degraded,
            };
        }
        if over_budget && self.enforce {
            let wait = self.budget.free_in(self.limit.into(), now);
            return Verdict::TooMany { retry_after: wait.as_secs() + u64::from(wait.subsec_nanos() > 0) };
        }
        match (call.message, call.kind) {
            (None, _) => Verdict::BadRequest,
            (Some(_), CallKind::Verify) => Verdict::Verify,
            (Some(message), CallKind::Sign) if self.outages.fails(message, now, &mut self.rng) => Verdict::Degraded,
            (Some(_), CallKind::Sign) => Verdict::Sign,
        }
    }

    /// Returns whether a connection that arrives now is served.
    pub(super) fn accepts(&mut self) -> bool {
        !self.faults.drop_connections.as_mut().is_some_and(|when| when.applies(&mut self.rng))
    }

    pub(super) fn outages(&self) -> &Outages {
        &self.outages
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::When;

    const CALL: Call = Call { kind: CallKind::Sign, key_matches: true, message: Some([7; 32]) };

    fn model(change: impl FnOnce(&mut SimulatorOptions)) -> Model {
        let mut options = SimulatorOptions { rate: "2/10s".parse().unwrap(), failure_probability: 0.0, ..SimulatorOptions::default() };
        change(&mut options);
        Model::new(&options)
    }

    fn verdict(model: &mut Model, seconds: u64, call: &Call) -> Verdict {
        model.arrive(Duration::from_secs(seconds), call).1
    }

    #[test]
    fn calls_over_the_budget_are_refused_and_count_themselves() {
        let mut model = model(|_| {});
        let verdicts: Vec<_> = [0, 3, 4, 10, 11, 24].map(|at| verdict(&mut model, at, &CALL)).into();
        let wait = |retry_after| Verdict::TooMany { retry_after };
        // At 10 the window still holds 3, 4 and itself; at 24 only itself.
        assert_eq!(verdicts, [Verdict::Sign, Verdict::Sign, wait(9), wait(4), wait(9), Verdict::Sign]);
    }

    #[test]
    fn without_enforcement_the_budget_is_only_audited() {
        let mut model = model(|options| options.enforce_rate = false);
        assert!((0..5).all(|at| verdict(&mut model, at, &CALL) == Verdict::Sign));
        let audit = model.log.audit(2, Duration::from_secs(10), Duration::from_secs(5), Duration::ZERO);
        assert_eq!((audit.over_budget, audit.max_in_window), (3, 5));
    }

    #[test]
    fn a_wrong_key_comes_before_everything_and_spends_budget() {
        let mut model = model(|_| {});
        model.faults = Faults::one(FaultKind::Hang, When::Always);
        let stranger = Call { key_matches: false, ..CALL };
        assert_eq!([0, 1, 2].map(|at| verdict(&mut model, at, &stranger)), [Verdict::Unauthorized; 3]);
        model.faults = Faults::default();
        assert!(matches!(verdict(&mut model, 3, &CALL), Verdict::TooMany { .. }));
    }

    #[test]
    fn a_fault_is_not_the_first_call_of_a_message() {
        let mut model = model(|options| {
            options.failure_probability = 1.0;
            options.outage = Duration::from_mins(1)..=Duration::from_mins(1);
            options.rate = "100/10s".parse().unwrap();
        });
        model.faults = Faults::one(FaultKind::Outage, When::Next(1));
        assert_eq!(
            [0, 100, 159, 160].map(|at| verdict(&mut model, at, &CALL)),
            [Verdict::Degraded, Verdict::Degraded, Verdict::Degraded, Verdict::Sign]
        );
    }

    #[test]
    fn a_seed_repeats_every_decision() {
        let fates = || {
            let mut model = model(|options| {
                options.seed = Some(42);
                options.failure_probability = 0.5;
                options.rate = "100/10s".parse().unwrap();
            });
            (0..40)
                .map(|n| model.arrive(Duration::ZERO, &Call { message: Some([n; 32]), ..CALL }))
                .map(|(_, v, l)| (v, l))
                .collect::<Vec<_>>()
        };
        assert_eq!(fates(), fates());
        assert!(fates().iter().any(|(verdict, _)| *verdict == Verdict::Degraded));
    }
}
