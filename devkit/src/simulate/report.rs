//! The table and the targets.

use std::fmt;

use super::figures::Figures;
use super::scenarios::{AT_ONCE, OVER_A_MINUTE, OVERLOAD};
use crate::report::{new_table, right};

/// One scenario under one discipline.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line {
    pub(super) scenario: &'static str,
    pub(super) discipline: &'static str,
    pub(super) figures: Figures,
}

/// All lines.
#[derive(Clone, Debug)]
pub(super) struct Report {
    pub(super) lines: Vec<Line>,
}

/// A target that our discipline has to reach.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Target {
    what: String,
    goal: f64,
    measured: f64,
    at_least: bool,
}

impl Target {
    pub(super) fn is_met(&self) -> bool {
        if self.at_least { self.measured >= self.goal } else { self.measured <= self.goal }
    }
}

impl Report {
    /// The targets, with the measured figures of our discipline.
    pub(super) fn targets(&self) -> Vec<Target> {
        let ours = || self.lines.iter().filter(|line| line.discipline == "ours");
        // A missing figure meets no target.
        let of = |scenario: &str, figure: fn(&Figures) -> Option<f64>| {
            ours().find(|line| line.scenario == scenario).and_then(|line| figure(&line.figures)).unwrap_or(f64::NAN)
        };
        let at_most = |what: String, goal, measured| Target { what, goal, measured, at_least: false };
        let mut targets: Vec<Target> = [AT_ONCE, OVER_A_MINUTE]
            .map(|name| {
                let mean = of(name, |figures| figures.to_oracle.map(|(mean, _)| mean));
                at_most(format!("{name}: end / earliest possible end, mean"), 1.15, mean)
            })
            .into();
        let least_used = ours().map(|line| line.figures.budget_used).fold(f64::INFINITY, f64::min);
        targets.push(Target {
            what: "budget used while due work waits, least of all scenarios".to_owned(),
            goal: 0.97,
            measured: least_used,
            at_least: true,
        });
        targets.push(at_most(
            format!("{OVERLOAD}: longest wait for a try / its bound"),
            1.0,
            of(OVERLOAD, |figures| Some(figures.part_of_bound)),
        ));
        let largest = ours().map(|line| line.figures.part_of_bound).fold(0.0, f64::max);
        targets.push(at_most("longest wait for a try / its bound, all scenarios".to_owned(), 1.0, largest));
        targets
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = new_table();
        table.set_header([
            "scenario",
            "discipline",
            "end / earliest end: mean",
            "p95",
            "POST to signature, mean",
            "calls / signature",
            "budget used",
            "longest wait",
            "/ bound",
        ]);
        let mut scenario = "";
        for line in &self.lines {
            let figures = &line.figures;
            let ratio = |pick: fn((f64, f64)) -> f64| figures.to_oracle.map_or_else(|| "-".to_owned(), |both| format!("{:.3}", pick(both)));
            table.add_row([
                if line.scenario == scenario { String::new() } else { line.scenario.to_owned() },
                line.discipline.to_owned(),
                ratio(|(mean, _)| mean),
                ratio(|(_, p95)| p95),
                format!("{:.0} s", figures.to_signature.as_secs_f64()),
                format!("{:.2}", figures.calls_per_signature),
                format!("{:.1} %", figures.budget_used * 100.0),
                format!("{:.0} s", figures.longest_wait.as_secs_f64()),
                format!("{:.2}", figures.part_of_bound),
            ]);
            scenario = line.scenario;
        }
        right(&mut table, 2);
        writeln!(f, "{table}")?;
        let mut table = new_table();
        table.set_header(["ours", "target", "measured", ""]);
        for target in self.targets() {
            let sign = if target.at_least { "≥" } else { "≤" };
            let verdict = if target.is_met() { "pass" } else { "fall short" };
            let cells = [format!("{sign} {:.3}", target.goal), format!("{:.3}", target.measured), verdict.to_owned()];
            table.add_row(std::iter::once(target.what).chain(cells));
        }
        right(&mut table, 1);
        write!(f, "{table}")
    }
}
