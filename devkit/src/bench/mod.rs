//! `devkit bench`: what Countersign can do on this machine, beside what others can do on it, in one run.
//!
//! A figure means nothing by itself: it is as much the disk's and the processor's. So whatever is compared runs in the same invocation, on
//! the same Postgres with every safety on, in turns; and the report says on what machine, with which versions and settings.
//! `docs/performance.md` says what each workload measures and how.
//!
//! - `plan` is what was asked for; `world` the Postgres, the databases and the programs under test; `machine` what all of it runs on;
//! - `load` makes requests, `sink` takes calls and answers at once, `fill` writes rows by the million;
//! - `peers` are those that we are compared with: `driven` programs in `devkit/peers`, `pgbench`, and `redis` below some of them;
//! - `workloads` has a file for each kind of work; `stats` and `report` turn what they measured into rows with a verdict.

mod driven;
mod fill;
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

use crate::error::Result;
use crate::workspace;
use machine::Machine;
use plan::Plan;
use report::Report;
use world::World;

/// Runs the workloads, prints the table, writes the results. The code is 1 when something could not be measured; falling short of a
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
        // After each, so that what took an hour is not lost with what comes after it.
        report.write(&root, &args.output(&root))?;
    }
    say!("\n{report}");
    say!("results: {}", args.output(&root).display());
    if args.markdown {
        say!("table: {}", report.fill_document(&root)?.display());
    }
    Ok(if report.failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
