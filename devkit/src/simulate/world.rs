//! What is simulated: messages with their fates, and the budget. Everything is decided before a run, so that every discipline and the
//! oracle meet the same world.

use std::ops::RangeInclusive;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::units::Rate;

/// A message and what the upstream will do to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// When it is posted, since the start.
    pub arrives: Duration,
    /// How long it fails, counted from its first call; zero: never. As `upstream::outages` has it, drawn beforehand.
    pub outage: Duration,
}

/// Messages in the order of their arrival, and the rules that hold for calls.
#[derive(Clone, Debug)]
pub struct World {
    /// The messages.
    pub messages: Vec<Message>,
    /// The agreed rate.
    pub rate: Rate,
    /// How long an answer takes.
    pub latency: RangeInclusive<Duration>,
    /// Calls later than this are not made: load that never ends is cut off here.
    pub horizon: Duration,
}

/// How messages come.
#[derive(Clone, Copy, Debug)]
pub enum Arrivals {
    /// So many, evenly over a time; zero: all at once.
    Burst(u32, Duration),
    /// At random moments (a Poisson process), this many in a window on average, for so long.
    Sustained(f64, Duration),
    /// A burst at once, and sustained load from the same moment on.
    Both(u32, f64, Duration),
}

/// How long outages last.
#[derive(Clone, Debug)]
pub enum Outages {
    /// Evenly between two lengths.
    Even(RangeInclusive<Duration>),
    /// Mostly as the first, and with this share (0 to 1) as the second.
    Mixed(RangeInclusive<Duration>, f64, RangeInclusive<Duration>),
}

/// A kind of world. [`Scenario::world`] makes one of them.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// What it is called.
    pub name: &'static str,
    /// How messages come.
    pub arrivals: Arrivals,
    /// The share of messages that fail at first.
    pub failing: f64,
    /// For how long those fail.
    pub outages: Outages,
    /// Of `--seeds`, one in so many is run: long runs tell as much as many short ones.
    pub one_in: u32,
}

impl Scenario {
    /// The world of a seed.
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

/// Moments with exponential gaps of this mean.
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
