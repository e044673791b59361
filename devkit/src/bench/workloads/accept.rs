//! Accepting: POST to a durable 202, with the API, Postgres and the load generator on the same cores.

use std::time::Duration;

use anyhow::{Result, anyhow};
use serde_json::json;

use super::Workload;
use crate::bench::driven::Program;
use crate::bench::load::{Load, Outcome, warm_up};
use crate::bench::peers;
use crate::bench::pgbench;
use crate::bench::plan::PeerName;
use crate::bench::redis::{Fsync, Redis};
use crate::bench::report::{Figures, Row, Target};
use crate::bench::stats::Runs;
use crate::bench::world::{API_KEY, Database, World};
use crate::error::line;
use crate::ports::free_port;

/// The target, as a multiple of the throughput of the stack on Fastify.
const TIMES_FASTIFY: f64 = 5.0;
/// The target, as a multiple of the insert rate of pgbench.
const TIMES_PGBENCH: f64 = 1.0;

/// A participant, and its results so far.
struct Contestant {
    who: Who,
    settings: String,
    rates: Vec<f64>,
    failure: Option<String>,
}

#[derive(Clone, Copy)]
enum Who {
    Ours,
    Pgbench,
    Fastify(Fsync, usize),
}

/// Measures all participants in turns, with few callers and with more.
pub(super) async fn run(world: &World) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for callers in world.plan.callers() {
        rows.extend(run_with(world, callers).await?);
    }
    Ok(rows)
}

async fn run_with(world: &World, callers: u16) -> Result<Vec<Row>> {
    let plan = &world.plan;
    let contestant = |who, settings: String| Contestant { who, settings, rates: Vec::new(), failure: None };
    let mut all = vec![contestant(Who::Ours, String::new())];
    if plan.wants(PeerName::Pgbench) {
        all.push(contestant(Who::Pgbench, format!("{callers} clients, prepared")));
    }
    if plan.wants(PeerName::Fastify) {
        for fsync in Fsync::ALL {
            let (processes, failure) = match best_fastify(world, fsync, callers).await {
                Ok(processes) => (processes, None),
                Err(error) => (1, Some(line(&error))),
            };
            let settings = peers::processes(processes);
            all.push(Contestant { failure, ..contestant(Who::Fastify(fsync, processes), settings) });
        }
    }
    let mut last = Outcome::default();
    for run in 1..=plan.runs {
        for contestant in all.iter_mut().filter(|contestant| contestant.failure.is_none()) {
            let measured = match contestant.who {
                Who::Ours => {
                    last = ours(world, 1, callers, plan.time).await?;
                    Ok(last.rate)
                }
                Who::Pgbench => pgbench::inserts(world, callers, plan.time).await,
                Who::Fastify(fsync, processes) => fastify(world, fsync, processes, callers, plan.time).await,
            };
            match measured {
                Ok(rate) => {
                    let who = name(contestant.who);
                    world.progress.note(format!("run {run} of {}, {callers} clients: {who}: {rate:.0} per second", plan.runs));
                    contestant.rates.push(rate);
                }
                Err(error) => contestant.failure = Some(line(&error)),
            }
        }
    }
    let mut contestants = all.into_iter();
    let ours = contestants.next().and_then(|ours| Runs::of(ours.rates)).ok_or_else(|| anyhow!("nothing was measured"))?;
    let detail = json!({ "p50Ms": last.times.percentile(50.0), "p99Ms": last.times.percentile(99.0), "answersInTheLastRun": last.answers });
    let what = format!("POST to a durable 202, {callers} clients");
    let row = |target| Row::bound(Workload::Accept, what.clone(), "requests/s", target, ours.clone()).with(detail.clone());
    let rows: Vec<Row> = contestants
        .map(|contestant| {
            let target = match contestant.who {
                Who::Fastify(..) => Target::Times(TIMES_FASTIFY),
                _ => Target::Times(TIMES_PGBENCH),
            };
            let figures = match (contestant.failure, Runs::of(contestant.rates)) {
                (None, Some(rates)) => Figures::Measured(rates),
                (reason, _) => Figures::NotRun(reason.unwrap_or_default()),
            };
            row(target).beside(name(contestant.who), contestant.settings, figures)
        })
        .collect();
    Ok(if rows.is_empty() { vec![row(Target::Told)] } else { rows })
}

fn name(who: Who) -> String {
    match who {
        Who::Ours => "ours".to_owned(),
        Who::Pgbench => "pgbench, one row per transaction into a bare table".to_owned(),
        Who::Fastify(fsync, _) => format!("Fastify + Postgres + BullMQ, appendfsync {}", fsync.word()),
    }
}

/// Measures this many apis on an empty database, with this many callers.
pub(super) async fn ours(world: &World, processes: usize, callers: u16, time: Duration) -> Result<Outcome> {
    let database = world.fresh().await?;
    measure(world, &database, processes, callers, warm_up(time), time).await
}

/// Measures one api on this database, once it is warm.
pub(super) async fn ours_on(world: &World, database: &Database, warm_up: Duration, time: Duration) -> Result<Outcome> {
    measure(world, database, 1, world.plan.clients, warm_up, time).await
}

/// Measures apis on a database. Fails if a request that was accepted is not in the database.
async fn measure(world: &World, database: &Database, processes: usize, callers: u16, warm_up: Duration, time: Duration) -> Result<Outcome> {
    let mut apis = Vec::new();
    for _ in 0..processes {
        apis.push(world.api(database).await?);
    }
    let before = stored(database).await?;
    let load = Load { warm_up, ..Load::accept(apis.iter().map(|api| api.addr).collect(), callers, time) };
    let outcome = load.run().await?;
    let stored = stored(database).await? - before;
    if stored.unsigned_abs() < outcome.answers {
        return Err(anyhow!("{} requests were accepted and {stored} are stored", outcome.answers));
    }
    Ok(outcome)
}

async fn stored(database: &Database) -> Result<i64> {
    database.number(&mut database.connect().await?, "select count(*) from requests").await
}

/// The rate of the stack on Fastify. Everything is empty at first.
async fn fastify(world: &World, fsync: Fsync, processes: usize, callers: u16, time: Duration) -> Result<f64> {
    let program: Program = peers::node(world, "fastify.js").await?;
    let (redis, database, port) = (Redis::start(fsync).await?, world.bare("fastify").await?, free_port()?);
    let program = program
        .set("DATABASE_URL", &database.url)
        .set("REDIS_PORT", redis.port().to_string())
        .set("PROCESSES", processes.to_string())
        .set("PORT", port.to_string())
        .set("API_KEY", API_KEY);
    let service = program.start(&[]).await?;
    let load = Load::accept(vec![(std::net::Ipv4Addr::LOCALHOST, port).into()], callers, time);
    let outcome = load.run().await?;
    let stored = stored(&database).await?;
    // Every accepted request must be a job, too.
    let jobs = redis.command(&["LLEN", "bull:sign:wait"]).await?;
    service.stop().await?;
    if stored.unsigned_abs() < outcome.answers || jobs.unsigned_abs() < outcome.answers {
        return Err(anyhow!("{} requests were accepted, {stored} are stored and {jobs} are jobs", outcome.answers));
    }
    Ok(outcome.rate)
}

/// The number of processes with which it is fastest, each tried briefly.
async fn best_fastify(world: &World, fsync: Fsync, callers: u16) -> Result<usize> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut best = (1, 0.0);
    for processes in if cores > 1 { vec![1, cores] } else { vec![1] } {
        let rate = fastify(world, fsync, processes, callers, world.plan.time / 2).await?;
        world.progress.note(format!("trial: Fastify, appendfsync {}, {}: {rate:.0} per second", fsync.word(), peers::processes(processes)));
        if rate > best.1 {
            best = (processes, rate);
        }
    }
    Ok(best.0)
}
