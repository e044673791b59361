//! Idle: an api and a worker that have nothing to do.
//!
//! Statements are counted in the log of Postgres, where each is a line; the counters of Postgres count transactions. The CPU time of
//! Postgres itself is not counted: it is too small to measure, and shared.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde_json::json;

use super::Workload;
use crate::bench::report::{Row, Target};
use crate::bench::sink::Sink;
use crate::bench::stats::Runs;
use crate::bench::world::{Database, Service, World};

const PER_CENT_OF_A_CORE: f64 = 1.0;
const STATEMENTS_PER_SECOND: f64 = 5.0;

/// Measures over a few long intervals instead of many short ones.
pub(super) async fn run(world: &World) -> Result<Vec<Row>> {
    let (rest, watched) = if world.plan.quick { (2, 4) } else { (10, 30) };
    let (rest, watched) = (Duration::from_secs(rest), Duration::from_secs(watched));
    let (cluster, url) = world.another_cluster(&[("log_statement", "all")]).await?;
    let database = Database { url };
    let upstream = Sink::start(Duration::ZERO).await?;
    let upstream_url = upstream.url();
    let api = world.api(&database).await?;
    let worker = world.worker(&database, &[("UPSTREAM_URL", &upstream_url), ("UPSTREAM_API_KEY", "upstream-key")]).await?;
    let log = || std::fs::read_to_string(cluster.folder().join("postgres.log")).context("reading Postgres's log");
    let (mut cores, mut statements, mut last) = (Vec::new(), Vec::new(), serde_json::Value::Null);
    tokio::time::sleep(rest).await;
    for run in 1..=world.plan.runs.min(3) {
        let before = (api.cpu()?, worker.cpu()?, log()?.len());
        tokio::time::sleep(watched).await;
        let text = log()?;
        let new = &text[before.2..];
        let seconds = watched.as_secs_f64();
        let (of_api, of_worker) = (used(&api, before.0)? / seconds, used(&worker, before.1)? / seconds);
        let count = count(new);
        #[expect(clippy::cast_precision_loss, reason = "a count of lines")]
        let per_second = count as f64 / seconds;
        cores.push((of_api + of_worker) * 100.0);
        statements.push(per_second);
        world.progress.note(format!("run {run}: {:.2} % of a core, {per_second:.2} statements per second", (of_api + of_worker) * 100.0));
        last = json!({ "apiPerCent": of_api * 100.0, "workerPerCent": of_worker * 100.0, "seconds": seconds, "statements": count });
    }
    let row = |what: &str, unit, target, figures| {
        let runs = Runs::of(figures).ok_or_else(|| anyhow!("nothing was measured"))?;
        anyhow::Ok(Row::bound(Workload::Idle, what, unit, target, runs).with(last.clone()))
    };
    Ok(vec![
        row("api and worker together, processor", "% of a core", Target::Below(PER_CENT_OF_A_CORE), cores)?,
        row("api and worker together, statements", "per second", Target::Below(STATEMENTS_PER_SECOND), statements)?,
    ])
}

/// The CPU time used since `before`, in seconds.
fn used(service: &Service, before: Duration) -> Result<f64> {
    Ok(service.cpu()?.saturating_sub(before).as_secs_f64())
}

/// The number of statements in a part of the log: prepared ones are logged as `execute`, others as `statement`.
fn count(log: &str) -> usize {
    log.lines().filter(|line| line.contains("LOG:  execute ") || line.contains("LOG:  statement: ")).count()
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_statement_is_a_line_and_what_follows_it_is_none() {
        let log = "x LOG:  execute sqlx_s_1: -- sign.claim\n\twith gate as\nx DETAIL:  parameters: $1 = '1'\nx LOG:  statement: BEGIN\nx LOG:  checkpoint\n";
        assert_eq!(super::count(log), 2);
    }
}
