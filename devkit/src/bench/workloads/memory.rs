//! Memory: callers that wait for an answer that does not come.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Workload;
use crate::bench::load::{Connection, post};
use crate::bench::report::{Row, Target};
use crate::bench::stats::Runs;
use crate::bench::world::World;
use crate::wait::within;

const MEGABYTES: f64 = 100.0;
const CALLERS: i64 = 10_000;
/// The interval between two callers: all have arrived before the first ones have waited for long.
const ARRIVAL: Duration = Duration::from_millis(2);
const COMES_AGAIN_AFTER: Duration = Duration::from_millis(500);
const STORED_WITHIN: Duration = Duration::from_secs(50);
/// Sockets of a process in addition to those of the callers.
const SPARE: u64 = 200;

/// Runs all callers, each over its own connection. No worker runs, so no caller is answered.
pub(super) async fn run(world: &World) -> Result<Vec<Row>> {
    let callers = if world.plan.quick { CALLERS / 20 } else { CALLERS };
    allow_sockets(callers.unsigned_abs() + SPARE)?;
    let (mut peaks, mut last) = (Vec::new(), serde_json::Value::Null);
    for run in 1..=world.plan.runs.min(3) {
        let database = world.fresh().await?;
        let api = world.api(&database).await?;
        let (before, _) = api.memory()?;
        let (mut held, refused, begin) = (JoinSet::new(), Arc::new(AtomicU64::new(0)), Instant::now());
        for n in 0..callers.unsigned_abs() {
            let (refused, addr) = (Arc::clone(&refused), api.addr);
            held.spawn(async move {
                tokio::time::sleep_until(begin + ARRIVAL.mul_f64(f64::from(u32::try_from(n).unwrap_or(u32::MAX)))).await;
                let mut connection = Connection::open(addr).await?;
                // The answer is a 202 when the time is up, long after the measurement. A caller that is refused retries.
                while connection.exchange(&post(&format!("memory {n}"), "wait=60")).await?.0 == 503 {
                    refused.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(COMES_AGAIN_AFTER).await;
                }
                Ok(())
            });
        }
        let (mut connection, mut stored) = (database.connect().await?, 0);
        let waiting = within(STORED_WITHIN, async || {
            stored = database.number(&mut connection, "select count(*) from messages").await?;
            Ok(stored >= callers)
        });
        let refused = || refused.load(Ordering::Relaxed);
        if waiting.await.is_err() {
            let (megabytes, _) = api.memory()?;
            let text = format!("only {stored} of {callers} callers wait, with {megabytes:.0} MB; {} answers were 503", refused());
            return Err(Error::msg(text));
        }
        // The memory needed to accept them may or may not be released: both figures are of interest.
        tokio::time::sleep(Duration::from_secs(2)).await;
        if let Some(ended) = held.try_join_next() {
            return Err(ended.context("a caller")?.err().unwrap_or_else(|| anyhow!("a caller was answered")));
        }
        let (during, peak) = api.memory()?;
        world.progress.note(format!("run {run}: {during:.0} MB while {callers} wait, {peak:.0} MB at most, {before:.0} MB before"));
        last = json!({ "callers": callers, "beforeMb": before, "whileWaitingMb": during, "peakMb": peak, "answered503": refused() });
        peaks.push(peak);
    }
    let runs = Runs::of(peaks).ok_or_else(|| anyhow!("nothing was measured"))?;
    let what = format!("api, {callers} callers waiting, the most it ever used");
    Ok(vec![Row::bound(Workload::Memory, what, "MB", Target::Below(MEGABYTES), runs).with(last)])
}

/// Raises the number of files that this process and its child processes may have open.
fn allow_sockets(needed: u64) -> Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("reading the limit of open files")?;
    if soft >= needed {
        return Ok(());
    }
    if hard < needed {
        return Err(anyhow!("{needed} open files are needed and {hard} allowed; raise `ulimit -Hn`"));
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raising the limit of open files")
}
