//! The engine: no-op jobs claimed, run and completed durably.
//!
//! Ours is the program `engine` of the worker's package: the worker's loop, claim and finisher, without the HTTP call, because the peers
//! make none. The real `worker` with an upstream that answers at once has its own row.

use std::time::{Duration, Instant};

use anyhow::{Error, Result, anyhow};
use serde_json::json;

use super::Workload;
use crate::bench::driven::{Driven, Program};
use crate::bench::fill::{Rows, fill};
use crate::bench::peers::{Engine, Setup};
use crate::bench::redis::Redis;
use crate::bench::report::{Figures, Row, Target};
use crate::bench::sink::Sink;
use crate::bench::stats::{Runs, rate};
use crate::bench::world::{Database, UNLIMITED, World};
use crate::error::line;
use crate::wait::within;

/// The target, as a multiple of the throughput of every peer.
const TIMES_PEERS: f64 = 1.5;
/// The number of webhook jobs that a worker with default settings holds at a time.
const WEBHOOKS_LEASED: &str = "512";
/// The longest one measurement may take.
pub(super) const PATIENCE: Duration = Duration::from_mins(10);
/// A trial of a setting runs the jobs of a measurement divided by this.
const TRIAL: u32 = 5;

/// Selects one of our unfinished sign jobs, if there is one.
pub(super) const UNSIGNED: &str = "select from jobs where kind = 'sign' and state = 'pending' and next_run_at < 'infinity'
    order by lane desc, next_run_at desc, id desc limit 1";
/// Selects one of our unfinished webhook jobs, if there is one.
pub(super) const UNDELIVERED: &str = "select from jobs where kind = 'webhook' and state = 'pending' and next_run_at < 'infinity'
    order by lane desc, next_run_at desc, id desc limit 1";
/// Selects our jobs that did not succeed.
const UNSUCCESSFUL: &str = "select from jobs where state <> 'succeeded'";

/// A peer with its best settings.
struct Contestant {
    engine: Engine,
    setup: Option<Setup>,
    rates: Vec<f64>,
    failure: Option<String>,
}

/// Measures ours and all peers in turns.
pub(super) async fn run(world: &World) -> Result<Vec<Row>> {
    let (plan, program) = (&world.plan, engine(world)?);
    let mut peers = Vec::new();
    for peer in Engine::ALL.into_iter().filter(|peer| plan.wants(peer.name())) {
        let (setup, failure) = match best(world, peer).await {
            Ok(setup) => (Some(setup), None),
            Err(error) => (None, Some(line(&error))),
        };
        peers.push(Contestant { engine: peer, setup, rates: Vec::new(), failure });
    }
    let (mut sign, mut webhook, mut whole) = (Vec::new(), Vec::new(), Vec::new());
    for run in 1..=plan.runs {
        let note = |who: &str, rate: f64| world.progress.note(format!("run {run} of {}: {who}: {rate:.0} jobs per second", plan.runs));
        sign.push(ours(world, &program, 1).await?);
        note("ours", sign[sign.len() - 1]);
        for peer in peers.iter_mut().filter(|peer| peer.failure.is_none()) {
            let Some(setup) = peer.setup else { continue };
            match measure(world, peer.engine, setup, plan.jobs).await {
                Ok(rate) => {
                    note(&peer.engine.title(world), rate);
                    peer.rates.push(rate);
                }
                Err(error) => peer.failure = Some(line(&error)),
            }
        }
        webhook.push(ours_webhooks(world, &program).await?);
        note("ours, webhook jobs", webhook[webhook.len() - 1]);
        whole.push(with_calls(world, 1).await?);
        note("ours, the whole worker", whole[whole.len() - 1]);
    }
    let row = |what: &str, target, rates: Vec<f64>| {
        let runs = Runs::of(rates).ok_or_else(|| anyhow!("nothing was measured"))?;
        Ok::<_, Error>(Row::bound(Workload::Engine, what, "jobs/s", target, runs).with(json!({ "jobs": plan.jobs, "rate": UNLIMITED })))
    };
    let mut rows = Vec::new();
    for peer in peers {
        let figures = match (peer.failure, Runs::of(peer.rates)) {
            (None, Some(rates)) => Figures::Measured(rates),
            (reason, _) => Figures::NotRun(reason.unwrap_or_default()),
        };
        let settings = peer.setup.map(Setup::text).unwrap_or_default();
        let ours = row("sign jobs that do nothing", Target::Times(TIMES_PEERS), sign.clone())?;
        rows.push(ours.beside(peer.engine.title(world), settings, figures));
    }
    if rows.is_empty() {
        rows.push(row("sign jobs that do nothing", Target::Told, sign)?);
    }
    rows.push(row("webhook jobs that do nothing", Target::Told, webhook)?);
    rows.push(row("the whole worker, with a call over HTTP for each job", Target::Told, whole)?);
    Ok(rows)
}

/// Builds the engine without calls.
pub(super) fn engine(world: &World) -> Result<Program> {
    world.progress.note("building the engine without calls");
    Ok(Program::new([world.engine()?.to_string_lossy().into_owned()]))
}

/// Sign jobs per second of this many processes, on a new database.
pub(super) async fn ours(world: &World, program: &Program, processes: usize) -> Result<f64> {
    let database = world.fresh().await?;
    fill(&database, &world.progress, Rows::Waiting, world.plan.jobs.into(), "engine ").await?;
    ours_on(world, program, &database, processes).await
}

/// Sign jobs per second of this many processes, until none is left in this database.
async fn ours_on(world: &World, program: &Program, database: &Database, processes: usize) -> Result<f64> {
    let program = configured(world, program, database);
    let mut engines = Vec::new();
    for _ in 0..processes {
        engines.push(program.start(&[]).await?);
    }
    let time = timed(&mut engines, async || database.until_none(PATIENCE, UNSIGNED).await).await?;
    stop(engines).await?;
    none(database, UNSUCCESSFUL).await?;
    Ok(rate(world.plan.jobs.into(), time))
}

/// The engine with this database, and with the settings that were given for all programs.
pub(super) fn configured(world: &World, program: &Program, database: &Database) -> Program {
    let program = program.clone().set("DATABASE_URL", &database.url).set("UPSTREAM_RATE", UNLIMITED);
    world.plan.set.iter().fold(program, |program, (name, value)| program.set(name, value))
}

async fn ours_webhooks(world: &World, program: &Program) -> Result<f64> {
    let database = world.fresh().await?;
    fill(&database, &world.progress, Rows::Undelivered { url: "http://localhost/" }, world.plan.jobs.into(), "engine ").await?;
    let program = configured(world, program, &database).set("WORKER_QUEUES", "webhook").set("MOST_LEASED", WEBHOOKS_LEASED);
    let mut engines = vec![program.start(&[]).await?];
    let time = timed(&mut engines, async || database.until_none(PATIENCE, UNDELIVERED).await).await?;
    stop(engines).await?;
    none(&database, UNSUCCESSFUL).await?;
    Ok(rate(world.plan.jobs.into(), time))
}

/// Jobs per second of this many complete workers with an upstream that answers at once: from the first claim to the last durable
/// completion.
pub(super) async fn with_calls(world: &World, processes: usize) -> Result<f64> {
    let database = world.fresh().await?;
    fill(&database, &world.progress, Rows::Waiting, world.plan.jobs.into(), "engine ").await?;
    let upstream = Sink::start(Duration::ZERO).await?;
    let url = upstream.url();
    let settings =
        [("UPSTREAM_URL", url.as_str()), ("UPSTREAM_API_KEY", "upstream-key"), ("UPSTREAM_RATE", UNLIMITED), ("WORKER_QUEUES", "sign")];
    let mut workers = Vec::new();
    for _ in 0..processes {
        workers.push(world.worker(&database, &settings).await?);
    }
    database.until_none(PATIENCE, UNSIGNED).await?;
    none(&database, UNSUCCESSFUL).await?;
    let mut connection = database.connect().await?;
    // The starts of attempts and the ends of jobs are the times of their transactions, so the last commit itself is not included: less than
    // a millisecond out of seconds.
    let query = "select (extract(epoch from max(j.finished_at) - (select min(started_at) from attempts)) * 1e6)::bigint from jobs j";
    let micros = database.number(&mut connection, query).await?;
    Ok(rate(world.plan.jobs.into(), Duration::from_micros(micros.unsigned_abs())))
}

/// Tells the engines to begin, waits until nothing is left, and returns how long that took.
pub(super) async fn timed(engines: &mut [Driven], until_done: impl AsyncFnOnce() -> Result<()>) -> Result<Duration> {
    let started = Instant::now();
    for engine in engines {
        engine.go().await?;
    }
    until_done().await?;
    Ok(started.elapsed())
}

/// Ends the engines.
pub(super) async fn stop(engines: Vec<Driven>) -> Result<()> {
    for engine in engines {
        engine.stop().await?;
    }
    Ok(())
}

/// Fails if the query, which looks for jobs that did not succeed, finds one: failing fast does not count as fast.
async fn none(database: &Database, query: &str) -> Result<()> {
    let count = database.number(&mut database.connect().await?, &query.replacen("select", "select count(*)", 1)).await?;
    if count == 0 { Ok(()) } else { Err(anyhow!("{count} jobs did not end well")) }
}

/// The fastest settings of a peer, each tried with fewer jobs.
async fn best(world: &World, engine: Engine) -> Result<Setup> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut best: Option<(Setup, f64)> = None;
    for setup in engine.setups(cores) {
        let rate = measure(world, engine, setup, world.plan.jobs / TRIAL).await?;
        world.progress.note(format!("trial: {}, {}: {rate:.0} jobs per second", engine.title(world), setup.text()));
        if best.is_none_or(|(_, most)| rate > most) {
            best = Some((setup, rate));
        }
    }
    best.map(|(setup, _)| setup).ok_or_else(|| anyhow!("it has no settings"))
}

/// Jobs per second of a peer. Everything is empty at first.
async fn measure(world: &World, engine: Engine, setup: Setup, jobs: u32) -> Result<f64> {
    let (program, count) = (engine.program(world).await?.set("CONCURRENCY", setup.concurrency.to_string()), jobs.to_string());
    let start = async |program: &Program| {
        let mut engines = Vec::new();
        for _ in 0..setup.processes {
            engines.push(program.start(&["work"]).await?);
        }
        Ok::<_, Error>(engines)
    };
    let time = if let Engine::Bullmq(fsync) = engine {
        let redis = Redis::start(fsync).await?;
        let program = program.set("REDIS_PORT", redis.port().to_string());
        program.run(&["fill", &count]).await?;
        let mut engines = start(&program).await?;
        let time = timed(&mut engines, async || {
            let left =
                async || Ok(redis.command(&["LLEN", "bull:bench:wait"]).await? + redis.command(&["LLEN", "bull:bench:active"]).await? == 0);
            within(PATIENCE, left).await
        })
        .await?;
        stop(engines).await?;
        time
    } else {
        let database = world.bare("peer").await?;
        let batch = setup.batch.unwrap_or_default().to_string();
        let program = program.set("DATABASE_URL", &database.url).set("LOCAL_QUEUE", batch.as_str()).set("BATCH", batch.as_str());
        program.run(&["fill", &count]).await?;
        database.settle().await?;
        let mut engines = start(&program).await?;
        let time = timed(&mut engines, async || database.until_none(PATIENCE, engine.unfinished().unwrap_or_default()).await).await?;
        stop(engines).await?;
        if let Some(query) = engine.unsuccessful() {
            none(&database, query).await?;
        }
        time
    };
    Ok(rate(jobs.into(), time))
}
