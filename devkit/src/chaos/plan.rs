//! What goes wrong, in which order, and in which process: only the seed determines it.

use std::fmt;

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use crate::receiver::Misbehaviour;
use crate::upstream::FaultKind;

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// An `api` process is killed and another one started.
    ApiKilled,
    /// An `api` process is stopped (SIGSTOP) until callers have noticed, and continued.
    ApiStopped,
    /// A `worker` process is killed while it holds jobs, and another one started.
    WorkerKilled,
    /// A `worker` process is stopped (SIGSTOP) while it holds jobs, until others have taken them over, and continued.
    WorkerStopped,
    /// Postgres is stopped as in a crash, and started again.
    PostgresCrashed,
    /// Every connection to Postgres is ended.
    ConnectionsEnded,
    /// The upstream does not answer.
    UpstreamHangs,
    /// The upstream resets connections.
    UpstreamResets,
    /// The upstream truncates its answers.
    UpstreamTruncates,
    /// The upstream answers 401.
    UpstreamUnauthorized,
    /// The upstream answers 429 with `Retry-After`.
    UpstreamThrottles,
    /// The upstream answers 500.
    UpstreamErrors,
    /// The upstream has no listener.
    UpstreamGone,
    /// The receiver of webhooks closes connections.
    ReceiverDrops,
    /// The receiver of webhooks does not answer.
    ReceiverHangs,
}

/// All kinds.
pub const KINDS: [Kind; 15] = [
    Kind::ApiKilled,
    Kind::ApiStopped,
    Kind::WorkerKilled,
    Kind::WorkerStopped,
    Kind::PostgresCrashed,
    Kind::ConnectionsEnded,
    Kind::UpstreamHangs,
    Kind::UpstreamResets,
    Kind::UpstreamTruncates,
    Kind::UpstreamUnauthorized,
    Kind::UpstreamThrottles,
    Kind::UpstreamErrors,
    Kind::UpstreamGone,
    Kind::ReceiverDrops,
    Kind::ReceiverHangs,
];

impl Kind {
    /// What the upstream does to calls; `None` if this is not a fault of calls.
    pub(super) fn of_calls(self) -> Option<FaultKind> {
        Some(match self {
            Self::UpstreamHangs => FaultKind::Hang,
            Self::UpstreamResets => FaultKind::Reset,
            Self::UpstreamTruncates => FaultKind::Truncate,
            Self::UpstreamUnauthorized => FaultKind::Unauthorized,
            Self::UpstreamThrottles => FaultKind::TooMany { retry_after: 1 },
            Self::UpstreamErrors => FaultKind::Error,
            _ => return None,
        })
    }

    pub(super) fn is_of_upstream(self) -> bool {
        self.of_calls().is_some() || self == Self::UpstreamGone
    }

    /// What the receiver does; `None` if this is not a fault of receivers.
    pub(super) fn of_receivers(self) -> Option<Misbehaviour> {
        match self {
            Self::ReceiverDrops => Some(Misbehaviour::Drop),
            Self::ReceiverHangs => Some(Misbehaviour::Hang),
            _ => None,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::ApiKilled => "api killed",
            Self::ApiStopped => "api stopped and continued",
            Self::WorkerKilled => "worker killed",
            Self::WorkerStopped => "worker stopped past its leases and continued",
            Self::PostgresCrashed => "Postgres crashed",
            Self::ConnectionsEnded => "connections to Postgres ended",
            Self::UpstreamHangs => "upstream hangs",
            Self::UpstreamResets => "upstream resets",
            Self::UpstreamTruncates => "upstream truncates",
            Self::UpstreamUnauthorized => "upstream answers 401",
            Self::UpstreamThrottles => "upstream answers 429",
            Self::UpstreamErrors => "upstream answers 500",
            Self::UpstreamGone => "upstream gone",
            Self::ReceiverDrops => "receiver down",
            Self::ReceiverHangs => "receiver never answers",
        })
    }
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) kind: Kind,
    /// Determines which process is hit, and at which point.
    pub(super) victim: usize,
}

/// An endless series of faults: every kind once in random order, then again in another order.
#[derive(Debug)]
pub(super) struct Plan {
    rng: SmallRng,
    deck: Vec<Kind>,
}

impl Plan {
    pub(super) fn new(seed: u64) -> Self {
        Self { rng: SmallRng::seed_from_u64(seed), deck: Vec::new() }
    }
}

impl Iterator for Plan {
    type Item = Fault;

    fn next(&mut self) -> Option<Fault> {
        if self.deck.is_empty() {
            self.deck = KINDS.to_vec();
            self.deck.shuffle(&mut self.rng);
        }
        Some(Fault { kind: self.deck.pop()?, victim: self.rng.random_range(0..1_000) })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_repeats_its_faults_and_every_kind_comes_once_before_any_comes_twice() {
        let faults = |seed| Plan::new(seed).take(2 * KINDS.len()).collect::<Vec<_>>();
        assert_eq!(faults(7), faults(7));
        assert_ne!(faults(7), faults(8));
        for deck in faults(7).chunks(KINDS.len()) {
            assert_eq!(deck.iter().map(|fault| fault.kind).collect::<BTreeSet<_>>().len(), KINDS.len());
        }
    }
}
