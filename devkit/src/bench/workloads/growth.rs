//! Growth: the rates of a database with millions of rows compared with those of an empty one, in turns.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::engine::{PATIENCE, configured, engine, stop, timed};
use super::{Workload, accept};
use crate::bench::driven::Program;
use crate::bench::fill::{Rows, fill};
use crate::bench::filler::Filler;
use crate::bench::load::{Load, get, warm_up};
use crate::bench::report::{Figures, Row, Target};
use crate::bench::stats::{Runs, rate};
use crate::bench::world::{Database, World};
use crate::wait::within;

/// The target, as a fraction of the rate of the empty database.
const SHARE: f64 = 0.9;
/// The warm-up, as a multiple of the measured time, until the page of each digest has been written since the checkpoint. The first write to
/// a page after a checkpoint logs the whole page, and digests land anywhere: with ten million of them, nearly every POST writes a new page
/// for a while.
const PAGES_WRITTEN_AFTER: f64 = 2.5;
/// The number of requests that are read in turns.
const READ: i64 = 1000;
/// The age in days of requests to delete; the retention is 30 days.
const OLD: i32 = 60;

/// How long to wait for deletions; what is left then is ignored.
const FORGOTTEN_WITHIN: Duration = Duration::from_mins(1);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The kind of measurement.
#[derive(Clone, Copy)]
enum Kind {
    Engine,
    Accept,
    AcceptAfterCheckpoint,
    Get,
    Retention,
}

const KINDS: [(Kind, &str, &str); 5] = [
    (Kind::Engine, "claim and finish", "jobs/s"),
    (Kind::Accept, "accept", "requests/s"),
    (Kind::AcceptAfterCheckpoint, "accept, right after a checkpoint", "requests/s"),
    (Kind::Get, "GET", "requests/s"),
    (Kind::Retention, "retention", "requests/s"),
];

/// Measures every kind, on the grown database and on a new one.
pub(super) async fn run(world: &World) -> Result<Vec<Row>> {
    let (plan, program) = (&world.plan, engine(world)?);
    let grown = world.fresh_named("grown").await?;
    world.progress.note(format!("filling: {} finished and {} waiting requests", plan.finished, plan.waiting));
    fill(&grown, &world.progress, Rows::Finished { days_ago: 1 }, plan.finished, "grown ").await?;
    fill(&grown, &world.progress, Rows::Waiting, plan.waiting, "waiting ").await?;
    let bytes = grown.number(&mut grown.connect().await?, "select pg_database_size(current_database())").await?;
    let what = format!("with {} finished and {} waiting rows, {} MB", plan.finished, plan.waiting, bytes / 1_000_000);
    let filler = Filler::make(world).await?;
    let mut rows = Vec::new();
    for (kind, name, unit) in KINDS {
        let (mut on_grown, mut on_empty) = (Vec::new(), Vec::new());
        for run in 1..=plan.runs {
            let label = format!("{name} {run} ");
            let empty = world.fresh_named("empty").await?;
            // In alternating order, so that a machine that gets slower or faster favors neither.
            for is_empty in [run % 2 == 1, run % 2 == 0] {
                let (database, rates) = if is_empty { (&empty, &mut on_empty) } else { (&grown, &mut on_grown) };
                filler.fill().await?;
                database.statement(&mut database.connect().await?, "checkpoint").await?;
                rates.push(measure(world, &program, database, kind, &label, is_empty).await?);
            }
            let (empty, grown) = (on_empty[on_empty.len() - 1], on_grown[on_grown.len() - 1]);
            world.progress.note(format!("run {run}: {name}: {grown:.0} per second, on an empty database {empty:.0}"));
        }
        let missing = || anyhow!("nothing was measured");
        let (ours, empty) = (Runs::of(on_grown).ok_or_else(missing)?, Runs::of(on_empty).ok_or_else(missing)?);
        let target = if matches!(kind, Kind::AcceptAfterCheckpoint) { Target::Told } else { Target::Times(SHARE) };
        let row = Row::bound(Workload::Growth, format!("{name}, {what}"), unit, target, ours);
        rows.push(row.beside("the same on an empty database", "", Figures::Measured(empty)));
    }
    filler.drop(world).await?;
    world.cluster.drop_database("grown").await?;
    world.cluster.drop_database("empty").await?;
    Ok(rows)
}

async fn measure(world: &World, program: &Program, database: &Database, kind: Kind, label: &str, is_empty: bool) -> Result<f64> {
    let (jobs, time) = (u64::from(world.plan.jobs), world.plan.time);
    match kind {
        Kind::Engine => {
            // Slightly more than is measured, so that the last claims are as full as the first ones.
            if is_empty {
                fill(database, &world.progress, Rows::Waiting, jobs + jobs / 10, label).await?;
            }
            claim_and_finish(world, program, database).await
        }
        Kind::Accept => Ok(accept::ours_on(world, database, time.mul_f64(PAGES_WRITTEN_AFTER), time).await?.rate),
        Kind::AcceptAfterCheckpoint => Ok(accept::ours_on(world, database, warm_up(time), time).await?.rate),
        Kind::Get => {
            if is_empty {
                fill(database, &world.progress, Rows::Finished { days_ago: 1 }, READ.unsigned_abs(), label).await?;
                fill(database, &world.progress, Rows::Waiting, READ.unsigned_abs() / 2, &format!("{label}waiting ")).await?;
            }
            read(world, database).await
        }
        Kind::Retention => {
            fill(database, &world.progress, Rows::Finished { days_ago: OLD }, jobs / 2, label).await?;
            forget(world, database).await
        }
    }
}

/// Jobs per second. Every claim uses a slot, and slots count their uses: reading the counts is cheaper than counting millions of rows.
async fn claim_and_finish(world: &World, program: &Program, database: &Database) -> Result<f64> {
    const USES: &str = "select coalesce(sum(uses), 0)::bigint from upstream_slots";
    let mut engines = vec![configured(world, program, database).start(&[]).await?];
    let mut connection = database.connect().await?;
    let jobs = u64::from(world.plan.jobs).min(world.plan.waiting / u64::from(world.plan.runs + 1)).max(100);
    let before = database.number(&mut connection, USES).await?;
    let mut claimed = 0;
    let time = timed(&mut engines, async || {
        within(PATIENCE, async || {
            claimed = (database.number(&mut connection, USES).await? - before).unsigned_abs();
            Ok(claimed >= jobs)
        })
        .await
    })
    .await?;
    stop(engines).await?;
    Ok(rate(claimed, time))
}

async fn read(world: &World, database: &Database) -> Result<f64> {
    let ids: Vec<String> = sqlx::query_scalar(
        "(select id::text from requests order by id limit $1 / 2) union (select id::text from requests order by id desc limit $1 / 2)",
    )
    .bind(READ)
    .fetch_all(&mut database.connect().await?)
    .await
    .context("choosing requests to read")?;
    if ids.is_empty() {
        return Err(anyhow!("there are no requests to read"));
    }
    let api = world.api(database).await?;
    let requests: Vec<Vec<u8>> = ids.iter().map(|id| get(&format!("/crypto/sign/{id}"))).collect();
    let request = move |n: u64| requests[usize::try_from(n).unwrap_or_default() % requests.len()].clone();
    let (clients, time) = (world.plan.clients, world.plan.time);
    let load = Load { servers: vec![api.addr], clients, warm_up: warm_up(time), time, request: Arc::new(request), statuses: &[200] };
    Ok(load.run().await?.rate)
}

/// Deleted requests per second, from the first ones to the last one, or until [`FORGOTTEN_WITHIN`] is over. Before the first ones, a worker
/// that has just started counts the unfinished requests.
async fn forget(world: &World, database: &Database) -> Result<f64> {
    const OLD_REQUESTS: &str = "select count(*) from requests where created_at < now() - interval '30 days'";
    let mut connection = database.connect().await?;
    let all = database.number(&mut connection, OLD_REQUESTS).await?;
    let _worker = world.worker(database, &[("WORKER_QUEUES", "webhook"), ("RETENTION", "30d")]).await?;
    let mut before = all;
    within(PATIENCE, async || {
        before = database.number(&mut connection, OLD_REQUESTS).await?;
        Ok(before < all)
    })
    .await?;
    let (started, mut left) = (Instant::now(), before);
    while left > 0 && started.elapsed() < FORGOTTEN_WITHIN {
        tokio::time::sleep(LOOK_EVERY).await;
        left = database.number(&mut connection, OLD_REQUESTS).await?;
    }
    Ok(rate((before - left).unsigned_abs(), started.elapsed()))
}
