//! The simulated world: messages with their outages, and the budget. Everything is decided before a run, so that every discipline and the
//! oracle get the same world.

use std::ops::RangeInclusive;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::units::Rate;

/// A message and what the upstream does to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// When it is posted, relative to the start.
    pub arrives: Duration,
    /// How long it fails, counted from its first call; zero if it never fails. As in `upstream::outages`, but drawn in advance.
    pub outage: Duration,
}

/// Messages in the order of their arrival, and the rules for calls.
#[derive(Clone, Debug)]
pub struct World {
    /// The messages.
    pub messages: Vec<Message>,
    /// The agreed rate.
    pub rate: Rate,
    /// How long an answer takes.
    pub latency: RangeInclusive<Duration>,
    /// The time after which no calls are made; it cuts off load that never ends.
    pub horizon: Duration,
}

/// How messages arrive.
#[derive(Clone, Copy, Debug)]
pub enum Arrivals {
    /// A number of messages, spread evenly over a time; if that is zero, all at once.
    Burst(u32, Duration),
    /// A Poisson process with this mean number of messages per window, for this long.
    Sustained(f64, Duration),
    /// A burst at once, and sustained load from the same time on.
    Both(u32, f64, Duration),
}

/// How long outages last.
#[derive(Clone, Debug)]
pub enum Outages {
    /// Uniformly distributed between two lengths.
    Even(RangeInclusive<Duration>),
    /// Like the first range, but with this probability (0 to 1) like the second one.
    Mixed(RangeInclusive<Duration>, f64, RangeInclusive<Duration>),
}

/// A kind of world. [`Scenario::world`] generates one of them.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The name of the scenario.
    pub name: &'static str,
    /// How messages arrive.
    pub arrivals: Arrivals,
    /// The share of messages that fail at first.
    pub failing: f64,
    /// How long those messages fail.
    pub outages: Outages,
    /// Only one in this many of `--seeds` is run: a long run says as much as many short ones.
    pub one_in: u32,
}

impl Scenario {
    /// Generates the world of a seed.
    #[must_use]
    pub fn world(&self, seed: u64, rate: Rate) -> World {
        let rng = &mut SmallRng::seed_from_u64(seed);
        let window = rate.window();
        let burst = |count: u32, over: Duration| (0..count).map(move |n| over * n / count.max(1));
        let (mut times, horizon) = match self.arrivals {
            Arrivals::Burst(count, over) => (burst(count, over).collect(), Duration::MAX),
            Arrivals::Sustained(per_window, length) => (poisson(window.div_f64(per_window), length, rng), length),
            Arrivals::Both(count, per_window, length) => {
                let sustained = poisson(window.div_f64(per_window), length, rng);
                (burst(count, Duration::ZERO).chain(sustained).collect::<Vec<_>>(), length)
            }
        };
        times.sort_unstable();
        let messages = times.into_iter().map(|arrives| Message { arrives, outage: self.outage(rng) }).collect();
        World { messages, rate, latency: Duration::from_millis(50)..=Duration::from_millis(300), horizon }
    }

    fn outage(&self, rng: &mut SmallRng) -> Duration {
        if !rng.random_bool(self.failing) {
            return Duration::ZERO;
        }
        let length = match &self.outages {
            Outages::Mixed(_, share, long) if rng.random_bool(*share) => long,
            Outages::Even(usual) | Outages::Mixed(usual, ..) => usual,
        };
        rng.random_range(length.clone())
    }
}

/// Arrival times with exponentially distributed gaps of this mean.
fn poisson(mean_gap: Duration, length: Duration, rng: &mut SmallRng) -> Vec<Duration> {
    let mut times = Vec::new();
    let mut now = Duration::ZERO;
    loop {
        now += mean_gap.mul_f64(-(1.0 - rng.random::<f64>()).ln());
        if now >= length {
            return times;
        }
        times.push(now);
    }
}
