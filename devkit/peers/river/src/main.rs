//! River for Rust as a peer of the benchmarks: `fill JOBS` inserts no-op jobs, `work` works them.
//!
//! `work` prints `ready`, begins when a line comes on standard input, and ends when standard input does. `CONCURRENCY` is the number of
//! jobs at a time. Pool, cooldown and poll interval are those of River's own benchmark (`riverqueue bench`), except that the cooldown is
//! the smallest that River accepts.

use std::error::Error;
use std::time::Duration;

use riverqueue::migrate::PostgresMigrator;
use riverqueue::sqlx::postgres::PgPoolOptions;
use riverqueue::{BoxError, Client, Job, JobArgs, QUEUE_DEFAULT, QueueConfig, WorkContext, WorkOutcome, Workers};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};

#[derive(Clone, Debug, Deserialize, JobArgs, Serialize)]
#[river(kind = "noop")]
struct Noop {
    number: u64,
}

async fn noop(_: WorkContext, _: Job<Noop>) -> Result<WorkOutcome, BoxError> {
    Ok(WorkOutcome::Complete)
}

const INSERTED_AT_ONCE: u64 = 2_000;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let pool = PgPoolOptions::new().min_connections(10).max_connections(50).connect(&std::env::var("DATABASE_URL")?).await?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["fill", jobs] => {
            PostgresMigrator::new(pool.clone()).migrate_up().await?;
            let client = Client::builder(pool).build()?;
            let jobs: u64 = jobs.parse()?;
            for first in (0..jobs).step_by(usize::try_from(INSERTED_AT_ONCE)?) {
                client.insert_many((first..jobs.min(first + INSERTED_AT_ONCE)).map(|number| Noop { number })).await?;
            }
        }
        ["work"] => {
            let concurrency = std::env::var("CONCURRENCY")?.parse()?;
            let mut workers = Workers::new();
            workers.add_fn(noop)?;
            let queue = QueueConfig::new(concurrency)
                .with_fetch_cooldown(Duration::from_millis(1))
                .with_fetch_poll_interval(Duration::from_millis(20));
            let client = Client::builder(pool).workers(workers).queue(QUEUE_DEFAULT, queue).build()?;
            println!("ready");
            let mut input = BufReader::new(tokio::io::stdin()).lines();
            if input.next_line().await?.is_some() {
                let mut run = client.start()?;
                while input.next_line().await?.is_some() {}
                run.stop().await?;
            }
        }
        _ => return Err("usage: bench-peer-river fill JOBS | work".into()),
    }
    Ok(())
}
