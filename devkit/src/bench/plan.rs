//! What to measure, how often and for how long.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::workloads::Workload;
use crate::units::duration;

/// The settings of `devkit bench`.
#[derive(Args, Clone, Debug)]
pub(crate) struct BenchArgs {
    /// What to measure; without: all but `soak`.
    #[arg(value_enum)]
    workloads: Vec<Workload>,
    /// A smoke test: everything once, for a moment, with few rows. Its figures mean nothing.
    #[arg(long)]
    quick: bool,
    /// How often each measurement is repeated [default: 5; with --quick: 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: Option<u32>,
    /// How long a measurement of a rate lasts [default: 10s; with --quick: 1s]
    #[arg(long, value_parser = duration)]
    time: Option<Duration>,
    /// How many jobs an engine works off in one measurement [default: 50000; with --quick: 2000]
    #[arg(long, value_parser = clap::value_parser!(u32).range(100..=10_000_000))]
    jobs: Option<u32>,
    /// Requests in flight at a time. `accept` and `scale` are measured with four times as many, too.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    clients: u16,
    /// With whom to compare; `none`: with nobody.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "pgbench,river,graphile-worker,pg-boss,bullmq,fastify")]
    peers: Vec<PeerName>,
    /// Memory that Postgres keeps pages in.
    #[arg(long, default_value = "1GB")]
    shared_buffers: String,
    /// Rows of finished requests in the grown database [default: 10000000; with --quick: 20000]
    #[arg(long)]
    finished: Option<u64>,
    /// Rows of waiting requests in the grown database [default: 1000000; with --quick: 5000]
    #[arg(long)]
    waiting: Option<u64>,
    /// Minutes of the soak [default: 30; with --quick: 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    minutes: Option<u32>,
    /// A setting for every api and worker that is measured, such as `DATABASE_MAX_CONNECTIONS=20`; may be given again.
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = name_and_value)]
    set: Vec<(String, String)>,
    /// Put the table into docs/performance.md too.
    #[arg(long)]
    pub(super) markdown: bool,
    /// Where the results are written, as JSON [default: .countersign/bench/latest.json, and beside it one with the time in its name]
    #[arg(long)]
    output: Option<PathBuf>,
}

impl BenchArgs {
    /// The path of the results.
    pub(super) fn output(&self, root: &Path) -> PathBuf {
        self.output.clone().unwrap_or_else(|| root.join(".countersign/bench/latest.json"))
    }
}

/// A peer to compare with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum PeerName {
    /// Single-row inserts by Postgres's own load generator.
    Pgbench,
    /// River for Rust.
    River,
    /// graphile-worker with its local queue.
    GraphileWorker,
    /// pg-boss in batches.
    PgBoss,
    /// `BullMQ` on Redis.
    Bullmq,
    /// A service on Fastify, Postgres and `BullMQ`.
    Fastify,
    /// Nobody.
    None,
}

/// The settings of a run, with all defaults filled in.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Plan {
    pub(super) workloads: Vec<Workload>,
    pub(super) quick: bool,
    pub(super) runs: u32,
    /// How long a measurement of a rate lasts.
    #[serde(serialize_with = "as_seconds")]
    pub(super) time: Duration,
    pub(super) jobs: u32,
    pub(super) clients: u16,
    pub(super) peers: Vec<PeerName>,
    pub(super) shared_buffers: String,
    pub(super) finished: u64,
    pub(super) waiting: u64,
    pub(super) minutes: u32,
    /// Settings of the programs under test, in addition to the defaults.
    pub(super) set: Vec<(String, String)>,
}

impl Plan {
    /// Fills in the defaults.
    pub(super) fn of(args: &BenchArgs) -> Result<Self> {
        let quick = args.quick;
        let mut workloads = args.workloads.clone();
        if workloads.is_empty() {
            workloads = Workload::value_variants().iter().copied().filter(|workload| *workload != Workload::Soak).collect();
        }
        workloads.dedup();
        if args.time.is_some_and(|time| time < Duration::from_millis(100)) {
            return Err(anyhow!("--time: accepted: 100ms or more"));
        }
        Ok(Self {
            workloads,
            quick,
            runs: args.runs.unwrap_or(if quick { 1 } else { 5 }),
            time: args.time.unwrap_or(Duration::from_secs(if quick { 1 } else { 10 })),
            jobs: args.jobs.unwrap_or(if quick { 2_000 } else { 50_000 }),
            clients: args.clients,
            peers: args.peers.clone(),
            shared_buffers: args.shared_buffers.clone(),
            finished: args.finished.unwrap_or(if quick { 20_000 } else { 10_000_000 }),
            waiting: args.waiting.unwrap_or(if quick { 5_000 } else { 1_000_000 }),
            minutes: args.minutes.unwrap_or(if quick { 1 } else { 30 }),
            set: args.set.clone(),
        })
    }

    /// With how many callers accepting is measured: few, and four times as many.
    pub(super) fn callers(&self) -> [u16; 2] {
        [self.clients, self.clients.saturating_mul(4)]
    }

    /// Returns whether this peer was requested.
    pub(super) fn wants(&self, peer: PeerName) -> bool {
        self.peers.contains(&peer)
    }
}

fn name_and_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("accepted: NAME=VALUE".to_owned()),
    }
}

fn as_seconds<S: serde::Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        bench: BenchArgs,
    }

    fn plan(args: &[&str]) -> Plan {
        Plan::of(&Cli::try_parse_from(["bench"].iter().chain(args)).unwrap().bench).unwrap()
    }

    #[test]
    fn without_names_everything_is_measured_but_the_soak() {
        let all = plan(&[]);
        assert!(all.workloads.len() > 7 && !all.workloads.contains(&Workload::Soak));
        assert_eq!((all.runs, all.time, all.finished), (5, Duration::from_secs(10), 10_000_000));
        assert_eq!(plan(&["soak", "accept"]).workloads, [Workload::Soak, Workload::Accept]);
    }

    #[test]
    fn quick_is_small_and_what_is_given_wins() {
        let quick = plan(&["--quick", "--runs", "2", "--peers", "none"]);
        assert_eq!((quick.runs, quick.time), (2, Duration::from_secs(1)));
        assert!(quick.finished < 100_000 && !quick.wants(PeerName::Pgbench));
    }

    #[test]
    fn a_setting_is_a_name_and_a_value() {
        assert_eq!(plan(&["--set", "A=b=c"]).set, [("A".to_owned(), "b=c".to_owned())]);
        assert!(Cli::try_parse_from(["bench", "--set", "A"]).is_err());
    }
}
