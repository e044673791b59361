//! The figures of many runs of one scenario under one discipline.

use std::time::Duration;

use super::discipline::Discipline;
use super::world::Scenario;
use super::{engine, oracle};
use crate::units::Rate;

/// The figures of one line of the table.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// The time until the last signature, as a multiple of the earliest possible end: mean and 95th percentile. `None` if the load is cut
    /// off at the horizon.
    pub to_oracle: Option<(f64, f64)>,
    /// The mean time from the POST to the signature, over the signed messages.
    pub to_signature: Duration,
    /// Calls made for each signature.
    pub calls_per_signature: f64,
    /// The fraction of the budget that was used while due work waited, 0 to 1.
    pub budget_used: f64,
    /// The longest that a due message waited for an attempt.
    pub longest_wait: Duration,
    /// The largest fraction of its [`engine::bound`] that a due message waited.
    pub part_of_bound: f64,
}

/// Runs the scenario with the seeds from 0 upwards.
#[must_use]
pub fn figures(scenario: &Scenario, discipline: Discipline, seeds: u32, rate: Rate) -> Figures {
    let mut figures = Figures::default();
    let (mut ratios, mut waited, mut signed, mut calls) = (Vec::new(), Duration::ZERO, 0_u32, 0_u32);
    let (mut spent, mut due) = (Duration::ZERO, Duration::ZERO);
    for seed in 0..u64::from((seeds / scenario.one_in).max(1)) {
        let world = scenario.world(seed, rate);
        let run = engine::run(&world, discipline, seed);
        if world.horizon == Duration::MAX {
            let end = run.signed.iter().flatten().max().copied().unwrap_or_default();
            ratios.push(end.div_duration_f64(oracle::earliest_end(&world)));
        }
        for (message, end) in world.messages.iter().zip(&run.signed) {
            waited += end.map_or(Duration::ZERO, |end| end.saturating_sub(message.arrives));
            signed += u32::from(end.is_some());
        }
        calls += u32::try_from(run.calls.len()).unwrap_or(u32::MAX);
        spent += run.spent_time;
        due += run.due_time;
        figures.longest_wait = figures.longest_wait.max(run.longest_wait);
        figures.part_of_bound = figures.part_of_bound.max(run.largest_part_of_bound);
    }
    ratios.sort_by(f64::total_cmp);
    figures.to_oracle = ratios.get((ratios.len() * 95).div_ceil(100).saturating_sub(1)).map(|p95| (mean(&ratios), *p95));
    figures.to_signature = waited / signed.max(1);
    figures.calls_per_signature = f64::from(calls) / f64::from(signed.max(1));
    // If nothing waited, no budget was left unused.
    figures.budget_used = if due.is_zero() { 1.0 } else { spent.div_duration_f64(due * u32::from(rate.calls())) };
    figures
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / f64::from(u32::try_from(values.len()).unwrap_or(u32::MAX))
}
