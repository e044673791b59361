//! `devkit simulate`: simulates the scheduling policy, and compares it with others and with what is possible.
//!
//! - `world` and `scenarios`: what is posted when, and what the upstream does to it;
//! - `discipline`: the orders and delays that are compared. Ours is the production code: [`crate::backoff`] and [`crate::policy`] are the
//!   sources of `shared`, and a test there checks the SQL of the claim against `policy`;
//! - `engine`: one run, event by event, with slots as in production; no clock, no sleep;
//! - `oracle`: the earliest possible end, even for a scheduler that knows every outage;
//! - `figures`, `report`: the figures of many runs, and whether the targets are met.
//!
//! It leaves out the time that a claim takes (milliseconds), crashes, and faults other than a message's outage. The tests with real
//! processes cover those.

mod discipline;
mod engine;
mod figures;
pub(crate) mod oracle;
mod report;
mod scenarios;
#[cfg(test)]
mod tests;
pub(crate) mod world;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Error, Result};
use clap::Args;

use crate::backoff::{Backoff, Jitter, Strategy};
use crate::units::{Rate, duration};
use report::{Line, Report};

/// The settings of `devkit simulate`. The delays are those of the worker's settings of the same names.
#[derive(Args, Clone, Debug)]
pub(crate) struct SimulateArgs {
    /// Worlds for each scenario; the scenarios with long runs take fewer.
    #[arg(long, env = "SEEDS", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    seeds: u32,
    /// How the delay between tries grows.
    #[arg(long, env = "SIGN_RETRY_STRATEGY", value_enum, default_value = "adaptive")]
    strategy: Strategy,
    /// The smallest delay.
    #[arg(long, env = "SIGN_RETRY_BASE", default_value = "1s", value_parser = duration)]
    base: Duration,
    /// The largest delay.
    #[arg(long, env = "SIGN_RETRY_MAX", default_value = "10m", value_parser = duration)]
    max: Duration,
    /// By which fraction a delay may differ, either way: 0 to 1.
    #[arg(long, env = "SIGN_RETRY_JITTER", default_value = "0.1")]
    jitter: Jitter,
}

/// Runs every scenario under every discipline and prints the table. The exit code is 1 if a target is missed.
pub(crate) fn run(args: &SimulateArgs) -> Result<ExitCode> {
    let backoff = Backoff::new(args.strategy, args.base, args.max, args.jitter).map_err(Error::msg)?;
    let report = simulate(backoff, args.seeds, |line| say!("{line}"));
    say!("{report}");
    Ok(if report.targets().iter().all(report::Target::is_met) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The rate of the challenge: ten calls per minute.
fn rate() -> Rate {
    Rate::new(10, Duration::from_mins(1)).expect("it is a valid rate")
}

fn simulate(backoff: Backoff, seeds: u32, progress: impl Fn(&str)) -> Report {
    let (rate, disciplines) = (rate(), scenarios::disciplines(backoff));
    let mut lines = Vec::new();
    for scenario in scenarios::scenarios() {
        let started = Instant::now();
        // Each discipline runs on its own thread: they share nothing.
        let figures: Vec<_> = std::thread::scope(|scope| {
            let (scenario, rate) = (&scenario, &rate);
            let threads: Vec<_> = disciplines
                .iter()
                .map(|(_, discipline)| scope.spawn(move || figures::figures(scenario, *discipline, seeds, *rate)))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or_default()).collect()
        });
        let worlds = (seeds / scenario.one_in).max(1);
        progress(&format!("{}: {worlds} worlds, {} disciplines, {:.1?}", scenario.name, disciplines.len(), started.elapsed()));
        for ((discipline, _), figures) in disciplines.iter().zip(figures) {
            lines.push(Line { scenario: scenario.name, discipline, figures });
        }
    }
    Report { lines }
}
