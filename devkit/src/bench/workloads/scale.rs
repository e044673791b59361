//! Scaling out: one, two and four processes on one Postgres. On a machine whose cores are busy with one process, more cannot be faster, but
//! they must not be slower.

use anyhow::{Result, anyhow};

use super::{Workload, accept, engine};
use crate::bench::report::{Figures, Row, Target};
use crate::bench::stats::Runs;
use crate::bench::world::World;

const PROCESSES: [usize; 3] = [1, 2, 4];
/// The target, as a fraction of the rate of one process: less than that is more than the spread of the measurement.
const SHARE: f64 = 0.95;

/// Measures accepting and processing, in turns. The callers are as many as for one process, spread over all, and as many for each of four.
pub(super) async fn run(world: &World) -> Result<Vec<Row>> {
    let program = engine::engine(world)?;
    let (mut accepts, mut engines): ([[Vec<f64>; 3]; 2], [Vec<f64>; 3]) = Default::default();
    for run in 1..=world.plan.runs {
        for (place, processes) in PROCESSES.into_iter().enumerate() {
            for (callers, accepts) in world.plan.callers().into_iter().zip(&mut accepts) {
                let rate = accept::ours(world, processes, callers, world.plan.time).await?.rate;
                world.progress.note(format!("run {run}: {processes} api, {callers} callers: {rate:.0} requests per second"));
                accepts[place].push(rate);
            }
            let rate = engine::ours(world, &program, processes).await?;
            world.progress.note(format!("run {run}: {processes} worker: {rate:.0} jobs per second"));
            engines[place].push(rate);
        }
    }
    let mut rows = Vec::new();
    for (callers, accepts) in world.plan.callers().into_iter().zip(accepts) {
        rows.extend(self::rows("api", &format!(", {callers} callers in all"), "requests/s", accepts)?);
    }
    rows.extend(self::rows("worker", "", "jobs/s", engines)?);
    Ok(rows)
}

fn rows(program: &str, callers: &str, unit: &'static str, rates: [Vec<f64>; 3]) -> Result<Vec<Row>> {
    let runs: Option<Vec<Runs>> = rates.into_iter().map(Runs::of).collect();
    let runs = runs.ok_or_else(|| anyhow!("nothing was measured"))?;
    let row = |place: usize| {
        let row = Row::bound(
            Workload::Scale,
            format!("{} {program} processes{callers}", PROCESSES[place]),
            unit,
            Target::Times(SHARE),
            runs[place].clone(),
        );
        row.beside(format!("one {program}"), "", Figures::Measured(runs[0].clone()))
    };
    Ok((1..PROCESSES.len()).map(row).collect())
}
