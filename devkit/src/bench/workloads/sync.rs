//! The synchronous answer: how much longer a POST that is answered with its signature takes than the upstream itself.
//!
//! The upstream answers at once, so that its own time hides nothing. It is also called directly, in turns with the service, over a
//! persistent connection, as the worker calls it at this rate.

use std::time::Duration;

use anyhow::{Result, anyhow};
use serde_json::json;
use tokio::time::Instant;

use super::Workload;
use crate::bench::load::{Connection, get, post};
use crate::bench::report::{Row, Target};
use crate::bench::sink::Sink;
use crate::bench::stats::{Runs, Times};
use crate::bench::world::World;

const P50_MS: f64 = 5.0;
const PAUSE: Duration = Duration::from_millis(10);

/// Sends some hundred messages in each run, one at a time.
pub(super) async fn run(world: &World) -> Result<Vec<Row>> {
    let count = if world.plan.quick { 40 } else { 400 };
    let database = world.fresh().await?;
    let upstream = Sink::start(Duration::ZERO).await?;
    let upstream_url = upstream.url();
    let api = world.api(&database).await?;
    let settings = [("UPSTREAM_URL", upstream_url.as_str()), ("UPSTREAM_API_KEY", "upstream-key"), ("UPSTREAM_RATE", "1000/1s")];
    let _worker = world.worker(&database, &settings).await?;
    let (mut connection, mut upstream_directly) = (Connection::open(api.addr).await?, Connection::open(upstream.addr()).await?);
    let (mut added, mut last) = (Vec::new(), serde_json::Value::Null);
    for run in 1..=world.plan.runs {
        let (mut ours, mut direct) = (Vec::new(), Vec::new());
        for n in 0..count {
            let started = Instant::now();
            connection.ask(&post(&format!("sync-{run}-{n}"), ""), &[200]).await?;
            ours.push(started.elapsed());
            let started = Instant::now();
            upstream_directly.ask(&get(&format!("/crypto/sign?message=sync-{run}-{n}")), &[200]).await?;
            direct.push(started.elapsed());
            tokio::time::sleep(PAUSE).await;
        }
        let (ours, direct) = (Times::of(ours), Times::of(direct));
        let figures = [50.0, 99.0].map(|p| (ours.percentile(p), direct.percentile(p)));
        last = json!({ "p50Ms": figures[0].0, "p99Ms": figures[1].0, "upstreamP50Ms": figures[0].1, "upstreamP99Ms": figures[1].1 });
        let text =
            format!("run {run}: p50 {:.2} ms, of the upstream alone {:.2} ms; p99 {:.2} ms", figures[0].0, figures[0].1, figures[1].0);
        world.progress.note(text);
        added.push(figures[0].0 - figures[0].1);
    }
    let runs = Runs::of(added).ok_or_else(|| anyhow!("nothing was measured"))?;
    let what = "signed answer, added to the upstream's own time, p50";
    Ok(vec![Row::bound(Workload::Sync, what, "ms", Target::AtMost(P50_MS), runs).with(last)])
}
