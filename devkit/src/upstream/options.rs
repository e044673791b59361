//! How the simulated upstream behaves, from code and from the command line.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use clap::Args;

use crate::units::{Rate, duration, fraction};

/// How the simulated upstream behaves. [`Default`] is the challenge: 10 calls per minute, and half of the messages fail for 1 to 5 minutes.
#[derive(Clone, Debug)]
pub struct SimulatorOptions {
    /// Calls that are allowed in any window.
    pub rate: Rate,
    /// Whether calls over the rate are refused, or only audited.
    pub enforce_rate: bool,
    /// The required value of `Authorization`.
    pub api_key: String,
    /// The share of messages whose first call starts an outage, from 0 to 1.
    pub failure_probability: f64,
    /// How long an outage lasts.
    pub outage: RangeInclusive<Duration>,
    /// How long an answer takes.
    pub latency: RangeInclusive<Duration>,
    /// Makes the random decisions repeatable.
    pub seed: Option<u64>,
}

impl Default for SimulatorOptions {
    fn default() -> Self {
        Self {
            rate: Rate::new(10, Duration::from_mins(1)).expect("it is a valid rate"),
            enforce_rate: true,
            api_key: "upstream-key".to_owned(),
            failure_probability: 0.5,
            outage: Duration::from_mins(1)..=Duration::from_mins(5),
            latency: Duration::from_millis(50)..=Duration::from_millis(300),
            seed: None,
        }
    }
}

impl SimulatorOptions {
    /// An upstream that signs everything at once and has enough budget for all of it: for tests of something else.
    #[must_use]
    pub fn reliable() -> Self {
        Self {
            rate: Rate::new(10_000, Duration::from_secs(1)).expect("it is a valid rate"),
            failure_probability: 0.0,
            latency: Duration::ZERO..=Duration::ZERO,
            ..Self::default()
        }
    }
}

/// The settings of `devkit upstream`.
#[derive(Args, Clone, Debug)]
pub(crate) struct UpstreamArgs {
    /// Where to listen.
    #[arg(long, env = "UPSTREAM_LISTEN", default_value = "127.0.0.1:9000")]
    pub(crate) listen: SocketAddr,
    /// Calls allowed in any window.
    #[arg(long, env = "UPSTREAM_RATE", default_value = "10/60s")]
    pub(crate) rate: Rate,
    /// Only audit the rate: never answer 429 for it.
    #[arg(long, env = "UPSTREAM_AUDIT_ONLY")]
    pub(crate) audit_only: bool,
    /// The key that callers must send.
    #[arg(long, env = "UPSTREAM_API_KEY", default_value = "upstream-key", hide_env_values = true)]
    pub(crate) api_key: String,
    /// The share of messages whose first call starts an outage, from 0 to 1.
    #[arg(long, env = "FAILURE_PROBABILITY", default_value = "0.5", value_parser = fraction)]
    pub(crate) failure_probability: f64,
    /// How long an outage lasts, from..to.
    #[arg(long, env = "OUTAGE", default_value = "60s..300s", value_parser = durations)]
    pub(crate) outage: RangeInclusive<Duration>,
    /// How long an answer takes, from..to.
    #[arg(long, env = "LATENCY", default_value = "50ms..300ms", value_parser = durations)]
    pub(crate) latency: RangeInclusive<Duration>,
    /// Makes outages and latencies repeatable.
    #[arg(long, env = "SEED")]
    pub(crate) seed: Option<u64>,
}

impl From<UpstreamArgs> for SimulatorOptions {
    fn from(args: UpstreamArgs) -> Self {
        Self {
            rate: args.rate,
            enforce_rate: !args.audit_only,
            api_key: args.api_key,
            failure_probability: args.failure_probability,
            outage: args.outage,
            latency: args.latency,
            seed: args.seed,
        }
    }
}

fn durations(text: &str) -> Result<RangeInclusive<Duration>, String> {
    const ACCEPTED: &str = "accepted: two durations, the shorter one first, such as 60s..300s";
    let (from, to) = text.split_once("..").unwrap_or((text, text));
    match (duration(from), duration(to)) {
        (Ok(from), Ok(to)) if from <= to => Ok(from..=to),
        _ => Err(ACCEPTED.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_has_two_ends_in_order_or_is_one_value() {
        assert_eq!(durations("60s..300s"), Ok(Duration::from_mins(1)..=Duration::from_mins(5)));
        assert_eq!(durations("0"), Ok(Duration::ZERO..=Duration::ZERO));
        assert!(durations("300s..60s").unwrap_err().contains("such as 60s..300s"));
        assert!(durations("60..300").is_err() && fraction("1.1").is_err() && fraction("NaN").is_err());
    }
}
