//! Soak: half of the peak rate for many minutes. In the second half of them, a transaction holds back the vacuum of every table, as a
//! forgotten session or a slow backup does.

use std::time::Duration;

use anyhow::{Result, anyhow};
use serde::Serialize;
use serde_json::json;
use sqlx::PgConnection;

use super::Workload;
use super::engine::{PATIENCE, UNSIGNED};
use crate::bench::load::{Load, Outcome};
use crate::bench::report::{Row, Target};
use crate::bench::sink::Sink;
use crate::bench::stats::Runs;
use crate::bench::world::{Database, UNLIMITED, World};

/// The target, an upper bound: the figure of the last quarter divided by that of the first quarter.
const FLAT: f64 = 1.5;

/// The figures of one minute.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Minute {
    horizon_held: bool,
    p50_ms: f64,
    p99_ms: f64,
    refused: u64,
    waiting: i64,
    dead_tuples: i64,
    bytes: i64,
    bytes_per_request: f64,
}

/// Measures the peak, then every minute.
pub(super) async fn run(world: &World) -> Result<Vec<Row>> {
    let (database, upstream) = (world.fresh().await?, Sink::start(Duration::ZERO).await?);
    let upstream_url = upstream.url();
    let api = world.api(&database).await?;
    let settings = [("UPSTREAM_URL", upstream_url.as_str()), ("UPSTREAM_API_KEY", "upstream-key"), ("UPSTREAM_RATE", UNLIMITED)];
    let worker = world.worker(&database, &settings).await?;
    let accept = Load::accept(vec![api.addr], world.plan.clients, world.plan.time);
    // The worker is so fast that some requests are signed before they are answered.
    let mut load = Load { statuses: &[200, 202], ..accept };
    let peak = load.run().await?;
    // Requests are accepted and signed during the same time; the slower of the two rates is the peak of the whole.
    let signed = f64::from(u32::try_from(upstream.calls()).unwrap_or(u32::MAX)) / (world.plan.time.as_secs_f64() * 1.2);
    let pace = peak.rate.min(signed) / 2.0;
    world.progress.note(format!("peak: {:.0} accepted and {signed:.0} signed per second; soaking at {pace:.0}", peak.rate));
    database.until_none(PATIENCE, UNSIGNED).await?;

    load.time = Duration::from_secs(if world.plan.quick { 5 } else { 60 });
    let (mut connection, mut holder, mut minutes) = (database.connect().await?, None, Vec::new());
    for minute in 0..world.plan.minutes.max(4) {
        if minute == world.plan.minutes.max(4) / 2 {
            holder = Some(hold_horizon(&database).await?);
            world.progress.note("from here on a transaction holds the vacuum horizon");
        }
        let outcome = load.run_paced(pace, (u64::from(minute) + 1) << 32).await?;
        let seen = look(&database, &mut connection, holder.is_some(), &outcome).await?;
        world.progress.note(format!(
            "minute {}: p50 {:.2} ms, p99 {:.2} ms, {} refused, {} waiting, {} dead tuples, {} MB",
            minute + 1,
            seen.p50_ms,
            seen.p99_ms,
            seen.refused,
            seen.waiting,
            seen.dead_tuples,
            seen.bytes / 1_000_000
        ));
        minutes.push(seen);
    }
    drop((holder, worker, api));
    let detail = json!({ "requestsPerSecond": pace, "minutes": minutes });
    let quarter = minutes.len() / 4;
    let growth = |figure: fn(&Minute) -> f64| {
        let of = |minutes: &[Minute]| Runs::of(minutes.iter().map(figure).collect()).map(|runs| runs.median());
        let (first, last) = of(&minutes[..quarter]).zip(of(&minutes[minutes.len() - quarter..])).unwrap_or((1.0, f64::INFINITY));
        Runs::one(last / first)
    };
    let row = |what: &str, figure| {
        let what = format!("{what}, the last quarter of {} minutes by the first, at {pace:.0} requests per second", minutes.len());
        Row::bound(Workload::Soak, what, "×", Target::AtMost(FLAT), growth(figure)).with(detail.clone())
    };
    if quarter == 0 {
        return Err(anyhow!("a soak has at least four minutes"));
    }
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let refused = Runs::one(minutes.iter().map(|minute| minute.refused).sum::<u64>() as f64);
    let refused = Row::bound(Workload::Soak, "requests that were refused, of all minutes", "requests", Target::AtMost(0.0), refused);
    Ok(vec![
        refused.with(detail.clone()),
        row("p50 of accepting", |minute| minute.p50_ms),
        row("p99 of accepting", |minute| minute.p99_ms),
        row("bytes per request", |minute| minute.bytes_per_request),
    ])
}

/// Takes a snapshot and keeps it open.
async fn hold_horizon(database: &Database) -> Result<PgConnection> {
    let mut connection = database.connect().await?;
    database.statement(&mut connection, "begin isolation level repeatable read").await?;
    database.number(&mut connection, "select count(*) from api_keys").await?;
    Ok(connection)
}

async fn look(database: &Database, connection: &mut PgConnection, horizon_held: bool, outcome: &Outcome) -> Result<Minute> {
    let mut number = async |query: &str| database.number(connection, query).await;
    let waiting = number("select count(*) from jobs where kind = 'sign' and state = 'pending' and next_run_at < 'infinity'").await?;
    let dead_tuples = number("select coalesce(sum(n_dead_tup), 0)::bigint from pg_stat_user_tables").await?;
    let bytes = number("select sum(pg_total_relation_size(relid))::bigint from pg_stat_user_tables").await?;
    let requests = number("select greatest(count(*), 1) from requests").await?;
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let bytes_per_request = bytes as f64 / requests as f64;
    let (p50_ms, p99_ms) = (outcome.times.percentile(50.0), outcome.times.percentile(99.0));
    Ok(Minute { horizon_held, p50_ms, p99_ms, refused: outcome.refused, waiting, dead_tuples, bytes, bytes_per_request })
}
