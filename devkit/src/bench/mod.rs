//! `devkit bench`: measures what Countersign can do on this machine, next to what its peers can do on it, in one run.
//!
//! A figure means nothing by itself: it depends on the disk and the CPU as much as on the program. So everything that is compared runs in
//! the same invocation, on the same Postgres with all crash safety on, in turns; and the report gives the machine, the versions and the
//! settings. `docs/performance.md` explains what each workload measures, and how.
//!
//! - `plan` is what to measure; `world` has the Postgres, the databases and the programs under test; `machine` describes the machine;
//! - `load` sends requests, `sink` answers calls, `fill` writes millions of rows, `filler` fills Postgres's buffers;
//! - `peers` are the systems to compare with: `driven` programs in `devkit/peers`, `pgbench`, and `redis`, which some of them need;
//! - `workloads` has a file for each kind of work; `stats` and `report` turn the measurements into rows with a verdict.

mod driven;
mod fill;
mod filler;
mod load;
mod machine;
mod peers;
mod pgbench;
mod plan;
mod redis;
mod report;
mod sink;
mod stats;
mod workloads;
mod world;

pub(crate) use plan::BenchArgs;

use std::process::ExitCode;

use anyhow::Result;

use crate::workspace;
use machine::Machine;
use plan::Plan;
use report::Report;
use world::World;

/// Runs the workloads, prints the table, and writes the results. The exit code is 1 if something could not be measured; falling short of a
/// target is a result, not a failure.
pub(crate) async fn run(args: BenchArgs) -> Result<ExitCode> {
    let root = workspace::root()?;
    let plan = Plan::of(&args)?;
    let world = World::start(plan).await?;
    let machine = Machine::inspect(&world).await?;
    say!("{machine}");
    let mut report = Report::new(machine, &world.plan);
    for workload in &world.plan.workloads {
        world.progress.section(workload.name());
        match workload.run(&world).await {
            Ok(rows) => report.add(rows),
            Err(error) => report.fail(*workload, &error),
        }
        // Written after each workload, so that an hour of measurements is not lost if a later one fails.
        report.write(&root, &args.output(&root))?;
    }
    say!("\n{report}");
    say!("results: {}", args.output(&root).display());
    if args.markdown {
        say!("table: {}", report.fill_document(&root)?.display());
    }
    Ok(if report.failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
