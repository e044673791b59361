//! The workloads: a file for each kind of work. `docs/performance.md` explains each for readers of the table.

mod accept;
mod engine;
mod growth;
mod idle;
mod memory;
mod pickup;
mod scale;
mod soak;
mod sync;
mod webhooks;

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;

use super::report::Row;
use super::world::World;

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Workload {
    /// POST to a durable 202.
    Accept,
    /// No-op jobs claimed, run and completed durably.
    Engine,
    /// From the commit of an insert to the start of the upstream call, when nothing else happens.
    PickUp,
    /// What a synchronous answer adds to the upstream's own time.
    Sync,
    /// The rates of a database with millions of rows, beside those of an empty one.
    Growth,
    /// What it costs to wait for work.
    Idle,
    /// What ten thousand callers that wait cost.
    Memory,
    /// Deliveries of webhooks to receivers of several speeds.
    Webhooks,
    /// One, two and four of each process.
    Scale,
    /// Half of the peak rate for many minutes; only when named.
    Soak,
}

impl Workload {
    /// The name on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::Engine => "engine",
            Self::PickUp => "pick-up",
            Self::Sync => "sync",
            Self::Growth => "growth",
            Self::Idle => "idle",
            Self::Memory => "memory",
            Self::Webhooks => "webhooks",
            Self::Scale => "scale",
            Self::Soak => "soak",
        }
    }

    /// Runs the measurements of this workload.
    pub(super) async fn run(self, world: &World) -> Result<Vec<Row>> {
        match self {
            Self::Accept => accept::run(world).await,
            Self::Engine => engine::run(world).await,
            Self::PickUp => pickup::run(world).await,
            Self::Sync => sync::run(world).await,
            Self::Growth => growth::run(world).await,
            Self::Idle => idle::run(world).await,
            Self::Memory => memory::run(world).await,
            Self::Webhooks => webhooks::run(world).await,
            Self::Scale => scale::run(world).await,
            Self::Soak => soak::run(world).await,
        }
    }
}
