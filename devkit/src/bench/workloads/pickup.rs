//! Pick-up: from the commit of the insert to the start of the upstream call, while nothing else happens.
//!
//! Both times are from the clock of this machine. The end is when the upstream has read the head of the call. The start is what Postgres
//! records as the time of the commit (`track_commit_timestamp`). It is taken before the commit is forced to disk, so the figure includes
//! the disk and is not flattered.

use std::collections::HashMap;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};
use rand::RngExt;
use serde_json::json;

use super::Workload;
use crate::bench::load::{Connection, post};
use crate::bench::report::{Row, Target};
use crate::bench::sink::Sink;
use crate::bench::stats::{Runs, Times};
use crate::bench::world::{Database, World};
use crate::wait::within;

const P50_MS: f64 = 3.0;
const P99_MS: f64 = 15.0;
/// The pause after a message, long enough for everything to come to rest.
const PAUSE_MS: std::ops::Range<u64> = 30..60;
const CALLS_WITHIN: Duration = Duration::from_secs(10);

/// Sends some hundred messages in each run, one at a time.
pub(super) async fn run(world: &World) -> Result<Vec<Row>> {
    let count: u64 = if world.plan.quick { 40 } else { 400 };
    let (cluster, url) = world.another_cluster(&[("track_commit_timestamp", "on")]).await?;
    let database = Database { url };
    let upstream = Sink::start(Duration::ZERO).await?;
    upstream.keep_arrivals();
    let upstream_url = upstream.url();
    let api = world.api(&database).await?;
    let settings = [("UPSTREAM_URL", upstream_url.as_str()), ("UPSTREAM_API_KEY", "upstream-key"), ("UPSTREAM_RATE", "1000/1s")];
    let _worker = world.worker(&database, &settings).await?;
    let mut connection = Connection::open(api.addr).await?;
    let (mut p50, mut p99) = (Vec::new(), Vec::new());
    for run in 1..=world.plan.runs {
        for n in 0..count {
            connection.ask(&post(&format!("pickup-{run}-{n}"), "respond-async"), &[200, 202]).await?;
            let pause = rand::rng().random_range(PAUSE_MS);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        within(CALLS_WITHIN, async || Ok(upstream.calls() >= count * u64::from(run))).await.context("the upstream was not called")?;
        let times = latencies(&database, &upstream, &format!("pickup-{run}-")).await?;
        if times.count() as u64 != count {
            return Err(anyhow!("{count} messages were posted, and the times of {} are known", times.count()));
        }
        world.progress.note(format!("run {run}: p50 {:.2} ms, p99 {:.2} ms", times.percentile(50.0), times.percentile(99.0)));
        p50.push(times.percentile(50.0));
        p99.push(times.percentile(99.0));
    }
    drop(cluster);
    let row = |what: &str, most, figures| {
        let runs = Runs::of(figures).ok_or_else(|| anyhow!("nothing was measured"))?;
        let what = format!("commit of the insert to the upstream call, idle, {what}");
        anyhow::Ok(Row::bound(Workload::PickUp, what, "ms", Target::AtMost(most), runs).with(json!({ "messagesInARun": count })))
    };
    Ok(vec![row("p50", P50_MS, p50)?, row("p99", P99_MS, p99)?])
}

/// The times from commit to call, of each message with this prefix.
async fn latencies(database: &Database, upstream: &Sink, prefix: &str) -> Result<Times> {
    let rows: Vec<(String, i64)> = sqlx::query_as(
        "select convert_from(m.body, 'UTF8'), (extract(epoch from pg_xact_commit_timestamp(r.xmin)) * 1e6)::bigint
        from requests r join jobs j on j.id = r.sign_job_id join messages m on m.id = j.message_id",
    )
    .fetch_all(&mut database.connect().await?)
    .await
    .context("reading when each request was committed")?;
    let commits: HashMap<String, u64> = rows.into_iter().map(|(message, micros)| (message, micros.unsigned_abs())).collect();
    let calls = upstream.arrivals();
    let times = calls.iter().filter_map(|(uri, at)| {
        let (_, message) = uri.split_once("message=")?;
        let commit = UNIX_EPOCH + Duration::from_micros(*commits.get(message).filter(|_| message.starts_with(prefix))?);
        // The clock is rarely stepped back; if it is, this is zero.
        Some(at.duration_since(commit).unwrap_or_default())
    });
    Ok(Times::of(times.collect()))
}
