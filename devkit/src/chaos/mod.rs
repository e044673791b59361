//! `devkit chaos`: runs several of the real `api` and `worker` under steady load while faults are injected, and checks the guarantees
//! against what callers, the upstream, the receiver and Postgres saw.
//!
//! - `plan`: which faults, in which order; only the seed determines it;
//! - `world`: everything that is started (two `api`, three `worker`, a Postgres, the simulated upstream, a receiver), each on free ports,
//!   and stopped with the run, however it ends;
//! - `load`: the callers; `faults`: each fault, the condition that ends it, and when everything that it affected works again;
//! - `record`: what Postgres saw, by a trigger that tells the processes apart; `report`: the verdict.
//!
//! No fault lasts for a fixed time: it ends when calls, callers or webhooks have met it, or when other workers have taken over the jobs of
//! a stopped worker. The seed repeats the faults but not their timing, which depends on the machine.

mod faults;
mod load;
mod plan;
mod record;
mod report;
mod world;

use std::collections::HashSet;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::http;
use faults::Overcome;
use load::{Load, Seen};
use plan::{KINDS, Plan};
pub use report::Report;
use world::{KEY, PATIENCE, World, until};

/// The settings of `devkit chaos`.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct ChaosArgs {
    /// Decides the faults; without: another one in every run. It is printed.
    #[arg(long, env = "SEED")]
    seed: Option<u64>,
    /// How long faults happen, in minutes; every kind happens at least once.
    #[arg(long, env = "MINUTES", default_value_t = 2.0, value_parser = minutes)]
    minutes: f64,
}

fn minutes(text: &str) -> Result<f64, String> {
    let minutes = text.trim().parse().ok().filter(|minutes| (0.0..=1440.0).contains(minutes));
    minutes.ok_or_else(|| "accepted: a number from 0 to 1440".to_owned())
}

/// The interval between two POSTs: about two thirds of what the budget allows. So windows are full whenever a fault has held something up
/// (otherwise nothing would show whether the budget is kept), and the backlog is caught up.
const PACE: Duration = Duration::from_millis(450);

/// `devkit chaos`. The exit code is 1 if a guarantee was broken.
pub(crate) async fn main(args: ChaosArgs) -> Result<ExitCode> {
    let seed = args.seed.unwrap_or_else(|| rand::random_range(0..1_000_000));
    let report = run(seed, Duration::from_secs_f64(args.minutes * 60.0), |line| say!("{line}")).await?;
    say!("{report}");
    Ok(if report.failures().is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Injects every kind of fault once, and more of them until `lasting` is over; then waits until every accepted request has ended.
///
/// # Errors
/// If something cannot be started, or an expected event does not happen within a minute.
pub async fn run(seed: u64, lasting: Duration, progress: impl Fn(&str)) -> Result<Report> {
    progress(&format!("seed {seed}: starting Postgres, the upstream, a receiver, {} api, {} worker", world::APIS, world::WORKERS));
    let mut world = World::start(seed).await?;
    let began = Instant::now();
    let load = Load {
        client: world.client.clone(),
        targets: world.apis.iter().map(|api| Arc::clone(&api.target)).collect(),
        key: KEY,
        webhook_url: world.receiver.url("/chaos"),
        seed,
        pace: PACE,
        began,
    };
    let stop = CancellationToken::new();
    let callers = AbortOnDropHandle::new(tokio::spawn(load.run(stop.clone())));
    // What never worked cannot recover.
    until("the first messages are signed and told", async || {
        world.receiver.count(|delivery| delivery.verified) > 0 && world.database.signatures().await.is_ok_and(|signed| signed > 1)
    })
    .await?;

    let mut overcome: Vec<Overcome> = Vec::new();
    let note = |done: Vec<Overcome>, all: &mut Vec<Overcome>| {
        for Overcome { kind, what, recovered_in } in &done {
            progress(&format!("{:6.1} s  {kind}, {what}: recovered in {:.2} s", began.elapsed().as_secs_f64(), recovered_in.as_secs_f64()));
        }
        all.extend(done);
    };
    for (count, fault) in Plan::new(seed).enumerate() {
        if count >= KINDS.len() && began.elapsed() >= lasting {
            break;
        }
        // The other workers have to do the work, so only one worker is stopped at a time.
        if fault.kind == plan::Kind::WorkerStopped && world.workers.iter().any(|worker| worker.frozen) {
            note(world.taken_over(true).await?, &mut overcome);
        }
        let suffered = world.suffer(fault).await.with_context(|| format!("{} (seed {seed}, fault {count})", fault.kind))?;
        note(suffered.into_iter().collect(), &mut overcome);
        note(world.taken_over(false).await?, &mut overcome);
    }
    note(world.taken_over(true).await?, &mut overcome);

    stop.cancel();
    let seen = tokio::time::timeout(PATIENCE, callers).await.map_err(|_| anyhow!("a caller never got its receipt"))?;
    let seen = seen.context("the callers")?;
    progress(&format!("{:6.1} s  no more faults; {} requests were accepted", began.elapsed().as_secs_f64(), seen.accepted.len()));
    until("every job has ended", async || world.database.unfinished().await.is_ok_and(|unfinished| unfinished == 0)).await?;
    let report = judge(&world, seed, began.elapsed(), seen, overcome).await?;
    world.stop().await?;
    Ok(report)
}

/// Compares what callers, the upstream, the receiver and Postgres saw.
async fn judge(world: &World, seed: u64, lasted: Duration, seen: Seen, faults: Vec<Overcome>) -> Result<Report> {
    let mut report = Report { seed, lasted, accepted: seen.accepted.len(), faults, ..Report::default() };
    (report.answered_in, report.refused, report.excused) = (seen.answered_in, seen.refused, seen.excused);
    (report.late, report.unanswered) = (seen.late, seen.unanswered);
    report.answered_in.sort_unstable();
    report.tables = world.database.tables().await?;

    let delivered: HashSet<String> = {
        let right = |delivery: &crate::receiver::Delivery| delivery.verified && delivery.status == Some(204);
        let deliveries = world.receiver.deliveries();
        let ids = deliveries.iter().filter(|delivery| right(delivery)).filter_map(|delivery| delivery.body["data"]["id"].as_str());
        ids.map(str::to_owned).collect()
    };
    report.unverified = world.receiver.count(|delivery| !delivery.verified);
    for (id, message) in &seen.accepted {
        let state = state(world, id).await?;
        match (state["status"].as_str(), state["signature"].as_str()) {
            (Some("signed"), Some(signature)) => {
                report.signed += 1;
                report.wrong_signatures += usize::from(!world.upstream.verify(message.as_bytes(), signature.as_bytes()));
            }
            (Some("failed"), _) => report.failed += 1,
            _ => {}
        }
        if delivered.contains(id) {
            report.delivered += 1;
        } else if state["webhook"]["status"] == "exhausted" {
            report.kept += 1;
        }
    }

    report.fenced_off = world.fenced_off + world.workers.iter().map(world::Worker::fenced_off).sum::<usize>();
    let audit = world.upstream.audit();
    (report.calls, report.limit, report.max_in_window) = (audit.calls, audit.limit, audit.max_in_window);
    (report.over_budget, report.repeated) = (audit.over_budget, audit.signed_twice);
    report.max_in_flight = audit.max_in_flight_per_message;
    Ok(report)
}

/// The state of a request, as its caller sees it.
async fn state(world: &World, id: &str) -> Result<Value> {
    let address = world.apis.first().map(|api| api.target.address()).unwrap_or_default();
    let get = world.client.get(format!("{address}/crypto/sign/{id}")).header("X-API-Key", KEY);
    let (status, state) = http::json(get).await.with_context(|| format!("the state of {id}"))?;
    if status.is_success() || status.as_u16() == 404 { Ok(state) } else { Err(anyhow!("the state of {id}: {status}")) }
}
