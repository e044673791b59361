//! Webhooks: deliveries per second to receivers that answer at once, after 10 ms and after 100 ms.
//!
//! Each is compared with the rate of the same receiver under a plain load generator with the same concurrency. At 0 ms, that is what the
//! receiver can do; otherwise, it is the concurrency divided by the latency, as the receiver's timer makes it (the timer is late by half a
//! millisecond or more).

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow};
use serde_json::json;

use super::Workload;
use super::engine::{PATIENCE, UNDELIVERED};
use crate::bench::fill::{Rows, fill};
use crate::bench::load::{Load, warm_up};
use crate::bench::report::{Figures, Row, Target};
use crate::bench::sink::Sink;
use crate::bench::stats::{Runs, rate};
use crate::bench::world::World;

/// The default concurrency of the worker.
const CONCURRENCY: u16 = 64;
const SHARE_OF_CEILING: f64 = 0.5;
const SHARE_OF_CONCURRENCY: f64 = 0.9;
const LATENCIES_MS: [u16; 3] = [0, 10, 100];

/// Measures every latency in turns.
pub(super) async fn run(world: &World) -> Result<Vec<Row>> {
    let mut figures: [(Vec<f64>, Vec<f64>); 3] = Default::default();
    let mut memory = Vec::new();
    for run in 1..=world.plan.runs {
        for ((rates, ceilings), latency) in figures.iter_mut().zip(LATENCIES_MS) {
            let ceiling = ceiling(world, latency).await?;
            let (rate, peak) = deliver(world, latency).await?;
            let text = format!("run {run}: {latency} ms: {rate:.0} deliveries per second, {peak:.0} MB; a load generator: {ceiling:.0}");
            world.progress.note(text);
            rates.push(rate);
            ceilings.push(ceiling);
            memory.push(peak);
        }
    }
    let missing = || anyhow!("nothing was measured");
    let mut rows = Vec::new();
    for ((rates, ceilings), latency) in figures.into_iter().zip(LATENCIES_MS) {
        let (target, name) = if latency == 0 {
            (SHARE_OF_CEILING, "the receiver under a plain load generator")
        } else {
            (SHARE_OF_CONCURRENCY, "WEBHOOK_CONCURRENCY × 1/latency, by a plain load generator")
        };
        let what = format!("deliveries to a receiver that takes {latency} ms");
        let row = Row::bound(Workload::Webhooks, what, "deliveries/s", Target::Times(target), Runs::of(rates).ok_or_else(missing)?);
        let theirs = Figures::Measured(Runs::of(ceilings).ok_or_else(missing)?);
        let detail = json!({ "concurrency": CONCURRENCY, "concurrencyByNominalLatency": possible(latency) });
        rows.push(row.beside(name, format!("{CONCURRENCY} at a time"), theirs).with(detail));
    }
    let memory = Runs::of(memory).ok_or_else(missing)?;
    rows.push(Row::bound(Workload::Webhooks, "worker, the most memory it ever used", "MB", Target::Told, memory));
    Ok(rows)
}

/// Deliveries per second if only the latency of the receiver limited them.
fn possible(latency_ms: u16) -> f64 {
    f64::from(CONCURRENCY) * 1000.0 / f64::from(latency_ms)
}

/// The rate of the receiver with this many clients that do nothing but send.
async fn ceiling(world: &World, latency_ms: u16) -> Result<f64> {
    let receiver = Sink::start(Duration::from_millis(latency_ms.into())).await?;
    // As long as the body of a webhook.
    let body = "x".repeat(420);
    let head = "POST /hook HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    let request = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes();
    let request = Arc::new(move |_| request.clone());
    let time = world.plan.time;
    let load = Load { servers: vec![receiver.addr()], clients: CONCURRENCY, warm_up: warm_up(time), time, request, statuses: &[200] };
    Ok(load.run().await?.rate)
}

/// Deliveries per second, from the arrival of the first one to the last durable outcome; and the peak memory of the worker, in MB.
async fn deliver(world: &World, latency_ms: u16) -> Result<(f64, f64)> {
    let receiver = Sink::start(Duration::from_millis(latency_ms.into())).await?;
    let count = if latency_ms == 0 { f64::from(world.plan.jobs) } else { possible(latency_ms) * world.plan.time.as_secs_f64() };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a positive count far below 2^52")]
    let count = count.min(f64::from(world.plan.jobs)).max(100.0) as u64;
    let (database, url) = (world.fresh().await?, format!("{}/hook", receiver.url()));
    fill(&database, &world.progress, Rows::Undelivered { url: &url }, count, "webhook ").await?;
    let concurrency = CONCURRENCY.to_string();
    let settings = [
        ("WORKER_QUEUES", "webhook"),
        ("WEBHOOK_ALLOW_NETWORKS", "127.0.0.0/8"),
        ("WEBHOOK_CONCURRENCY", concurrency.as_str()),
        // There is only one receiver.
        ("WEBHOOK_RECEIVER_CONCURRENCY", concurrency.as_str()),
    ];
    let worker = world.worker(&database, &settings).await?;
    database.until_none(PATIENCE, UNDELIVERED).await?;
    let time = receiver.first().map(|first| first.elapsed()).ok_or_else(|| anyhow!("nothing was delivered"))?;
    if receiver.calls() != count {
        return Err(anyhow!("{count} webhooks were delivered in {} deliveries", receiver.calls()));
    }
    Ok((rate(count, time), worker.memory()?.1))
}
