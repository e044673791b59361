//! The scenarios in which the disciplines are compared, and the disciplines.

use std::time::Duration;

use super::discipline::Discipline;
use super::world::{Arrivals, Outages, Scenario};
use crate::backoff::{Backoff, Jitter, Strategy};

const USUAL: std::ops::RangeInclusive<Duration> = Duration::from_mins(1)..=Duration::from_mins(5);
const LONG: std::ops::RangeInclusive<Duration> = Duration::from_mins(30)..=Duration::from_hours(2);

/// The challenge's burst, at once.
pub const AT_ONCE: &str = "60 at once";
/// The challenge's burst, over a minute.
pub const OVER_A_MINUTE: &str = "60 over a minute";
/// A load that no discipline can keep up with.
pub const OVERLOAD: &str = "150 % of capacity, 3 h";

/// All scenarios.
///
/// Half of the messages fail at first, so a message costs a clairvoyant 1.5 calls. Ten calls per minute are therefore enough for 6.67
/// messages per minute, which is the capacity.
#[must_use]
pub fn scenarios() -> Vec<Scenario> {
    let capacity = 10.0 / 1.5;
    let burst = |count, seconds| Arrivals::Burst(count, Duration::from_secs(seconds));
    let load = |share: f64, hours| Arrivals::Sustained(share * capacity, Duration::from_hours(hours));
    let scenario = |name, arrivals, outages, one_in| Scenario { name, arrivals, failing: 0.5, outages, one_in };
    let long = |share| Outages::Mixed(USUAL, share, LONG);
    vec![
        scenario(AT_ONCE, burst(60, 0), Outages::Even(USUAL), 1),
        scenario(OVER_A_MINUTE, burst(60, 60), Outages::Even(USUAL), 1),
        scenario("60 over three minutes", burst(60, 180), Outages::Even(USUAL), 2),
        scenario("300 at once", burst(300, 0), Outages::Even(USUAL), 10),
        scenario("60 at once, a fifth of outages ½ to 2 h", burst(60, 0), long(0.2), 10),
        scenario("80 % of capacity, 2 h", load(0.8, 2), Outages::Even(USUAL), 50),
        scenario(OVERLOAD, load(1.5, 3), Outages::Even(USUAL), 100),
        scenario(
            "60 at once into 60 % of capacity, a tenth long, 2 h",
            Arrivals::Both(60, 0.6 * capacity, Duration::from_hours(2)),
            long(0.1),
            50,
        ),
    ]
}

/// The disciplines to compare, by name; `ours` uses the given delays.
pub fn disciplines(ours: Backoff) -> Vec<(&'static str, Discipline)> {
    let bullmq = |seconds| {
        let longest = Duration::from_hours(24 * 365);
        let delays = Backoff::new(Strategy::Exponential, Duration::from_secs(seconds), longest, Jitter::NONE);
        Discipline::Delayed(delays.expect("the longest is not the shortest"))
    };
    vec![
        ("plain FIFO", Discipline::Fifo),
        ("BullMQ, exponential from 1 s", bullmq(1)),
        ("BullMQ, exponential from 60 s", bullmq(60)),
        ("ours", Discipline::Ours(ours)),
        ("clairvoyant", Discipline::Clairvoyant),
    ]
}
