//! Medians, spreads and percentiles.

use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::report::percentile;

/// One figure, measured several times. Never empty.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Runs(Vec<f64>);

impl Runs {
    /// A single measurement.
    pub(super) fn one(figure: f64) -> Self {
        Self(vec![figure])
    }

    /// All measurements; `None` if there are none.
    pub(super) fn of(mut figures: Vec<f64>) -> Option<Self> {
        figures.sort_by(f64::total_cmp);
        if figures.is_empty() { None } else { Some(Self(figures)) }
    }

    /// The middle figure, or the mean of the two in the middle.
    pub(super) fn median(&self) -> f64 {
        let (lower, upper) = (self.0[(self.0.len() - 1) / 2], self.0[self.0.len() / 2]);
        f64::midpoint(lower, upper)
    }

    /// The smallest.
    pub(super) fn min(&self) -> f64 {
        self.0[0]
    }

    /// The largest.
    pub(super) fn max(&self) -> f64 {
        self.0[self.0.len() - 1]
    }
}

impl Serialize for Runs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Figures<'a> {
            median: f64,
            min: f64,
            max: f64,
            runs: &'a [f64],
        }
        Figures { median: self.median(), min: self.min(), max: self.max(), runs: &self.0 }.serialize(serializer)
    }
}

/// A set of durations.
#[derive(Clone, Debug, Default)]
pub(super) struct Times(Vec<Duration>);

impl Times {
    /// Takes the durations in any order.
    pub(super) fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        Self(times)
    }

    /// The number of durations.
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// The nearest-rank percentile, in milliseconds; zero if there are no durations.
    pub(super) fn percentile(&self, per_cent: f64) -> f64 {
        percentile(&self.0, per_cent).as_secs_f64() * 1000.0
    }
}

/// The rate per second of `count` events in `time`.
#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
pub(super) fn rate(count: u64, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64().max(1e-9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let runs = Runs::of(vec![3.0, 1.0, 2.0]).unwrap();
        assert_eq!((runs.median(), runs.min(), runs.max()), (2.0, 1.0, 3.0));
        assert!((Runs::of(vec![4.0, 1.0]).unwrap().median() - 2.5).abs() < 1e-9);
        assert_eq!(Runs::of(Vec::new()), None);
    }
}
