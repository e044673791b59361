//! The peers that we are compared with: which there are, what has to be fetched and built first, and how each is run at its fastest.
//!
//! A peer that cannot be run is reported with the reason. Each peer is tried briefly with several settings, and then measured with the best
//! of them.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Error, Result};
use tokio::sync::OnceCell;

use super::driven::Program;
use super::plan::PeerName;
use super::redis::{Fsync, Redis};
use super::world::World;
use crate::error::line;
use crate::workspace;

/// The folder of the peers, below the root.
const FOLDER: &str = "devkit/peers";

/// A job queue that processes no-op jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    River,
    GraphileWorker,
    PgBoss,
    Bullmq(Fsync),
}

/// The settings of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Setup {
    /// Processes of the peer's program.
    pub(super) processes: usize,
    /// Concurrent jobs or loops in each process.
    pub(super) concurrency: u32,
    /// Jobs fetched at a time, where that can be set.
    pub(super) batch: Option<u32>,
}

impl Setup {
    /// The text for the report.
    pub(super) fn text(self) -> String {
        let batch = self.batch.map(|batch| format!(", batch {batch}")).unwrap_or_default();
        format!("{}, concurrency {}{batch}", processes(self.processes), self.concurrency)
    }
}

/// A number of processes, as text for the report.
pub(super) fn processes(count: usize) -> String {
    if count == 1 { "1 process".to_owned() } else { format!("{count} processes") }
}

impl Engine {
    /// All engines.
    pub(super) const ALL: [Self; 5] =
        [Self::River, Self::GraphileWorker, Self::PgBoss, Self::Bullmq(Fsync::Everysec), Self::Bullmq(Fsync::Always)];

    /// The name on the command line.
    pub(super) fn name(self) -> PeerName {
        match self {
            Self::River => PeerName::River,
            Self::GraphileWorker => PeerName::GraphileWorker,
            Self::PgBoss => PeerName::PgBoss,
            Self::Bullmq(_) => PeerName::Bullmq,
        }
    }

    /// Its title, with its version if that is known before it runs.
    pub(super) fn title(self, world: &World) -> String {
        let package = |name: &str| node_version(world, name).map_or_else(|| name.to_owned(), |version| format!("{name} {version}"));
        match self {
            Self::River => format!("River for Rust {}", river_version(world).unwrap_or_default()),
            Self::GraphileWorker => package("graphile-worker"),
            Self::PgBoss => package("pg-boss"),
            Self::Bullmq(fsync) => format!("{}, appendfsync {}", package("bullmq"), fsync.word()),
        }
    }

    /// The settings to try: a Node process has one thread, so both a single process and one per core are tried.
    pub(super) fn setups(self, cores: usize) -> Vec<Setup> {
        let processes = if cores > 1 && self != Self::River { vec![1, cores] } else { vec![1] };
        let ways: &[(u32, Option<u32>)] = match self {
            Self::River => &[(100, None), (500, None), (2000, None)],
            Self::GraphileWorker => &[(10, Some(200)), (24, Some(500)), (100, Some(1000))],
            Self::PgBoss => &[(1, Some(500)), (2, Some(1000)), (4, Some(2000))],
            Self::Bullmq(_) => &[(50, None), (200, None), (500, None)],
        };
        let all = processes.iter().flat_map(|processes| {
            ways.iter().map(|(concurrency, batch)| Setup { processes: *processes, concurrency: *concurrency, batch: *batch })
        });
        all.collect()
    }

    /// The query for one unfinished job, looking first at those that finish last; `None` for Redis.
    pub(super) fn unfinished(self) -> Option<&'static str> {
        match self {
            Self::River => Some(
                "select from river_job where state in ('available', 'pending', 'retryable', 'running', 'scheduled')
                order by id desc limit 1",
            ),
            Self::GraphileWorker => Some("select from graphile_worker._private_jobs order by id desc limit 1"),
            Self::PgBoss => Some(
                "select from pgboss.job where name = 'bench' and state < 'completed'
                order by name desc, created_on desc limit 1",
            ),
            Self::Bullmq(_) => None,
        }
    }

    /// The query for jobs that did not succeed; `None` if jobs that did are removed.
    pub(super) fn unsuccessful(self) -> Option<&'static str> {
        match self {
            Self::River => Some("select from river_job where state <> 'completed'"),
            Self::PgBoss => Some("select from pgboss.job where name = 'bench' and state <> 'completed'"),
            // A failed job stays, so the measurement would not end.
            Self::GraphileWorker | Self::Bullmq(_) => None,
        }
    }

    /// The program, without settings; fetched and built if necessary.
    pub(super) async fn program(self, world: &World) -> Result<Program> {
        match self {
            Self::River => Ok(Program::new([river(world).await?.to_string_lossy().into_owned()])),
            Self::GraphileWorker => node(world, "graphile-worker.js").await,
            Self::PgBoss => node(world, "pg-boss.js").await,
            Self::Bullmq(_) => {
                Redis::version().await?;
                node(world, "bullmq.js").await
            }
        }
    }
}

/// A script of `devkit/peers/node`, run by Node.
pub(super) async fn node(world: &World, script: &str) -> Result<Program> {
    static INSTALLED: OnceCell<Result<(), String>> = OnceCell::const_new();
    INSTALLED.get_or_init(|| async { install(world).map_err(|error| line(&error)) }).await.clone().map_err(Error::msg)?;
    Ok(Program::new(["node".to_owned(), world.root.join(FOLDER).join("node").join(script).to_string_lossy().into_owned()]))
}

/// Fetches the packages of `package-lock.json`, unless they are there.
fn install(world: &World) -> Result<()> {
    let version = Command::new("node").arg("--version").output().context("no Node; install `nodejs` and `npm`")?;
    let folder = world.root.join(FOLDER).join("node");
    let (wanted, there) = (folder.join("package-lock.json"), folder.join("node_modules/.package-lock.json"));
    let modified = |path: &PathBuf| path.metadata().and_then(|meta| meta.modified()).ok();
    world.progress.note(format!("Node {}", String::from_utf8_lossy(&version.stdout).trim()));
    if modified(&there).is_some_and(|there| modified(&wanted).is_some_and(|wanted| there >= wanted)) {
        return Ok(());
    }
    world.progress.note("fetching the peers that run on Node");
    let mut npm = Command::new("npm");
    // Scripts of packages are not run: what they compile is optional. `npm ci` is not used: it requires the optional packages of every
    // platform in the lock file, and npm writes only those that it sees. The versions are those of the lock file either way.
    npm.args(["install", "--no-save", "--ignore-scripts", "--no-audit", "--no-fund"]).current_dir(&folder);
    tokio::task::block_in_place(|| workspace::build(npm, "the peers that run on Node"))
}

/// The version of a package in the lock file.
fn node_version(world: &World, package: &str) -> Option<String> {
    let text = std::fs::read(world.root.join(FOLDER).join("node/package-lock.json")).ok()?;
    let lock: serde_json::Value = serde_json::from_slice(&text).ok()?;
    Some(lock["packages"][format!("node_modules/{package}")]["version"].as_str()?.to_owned())
}

/// Builds the peer on River in its own target folder, and returns its path.
async fn river(world: &World) -> Result<PathBuf> {
    static BUILT: OnceCell<Result<PathBuf, String>> = OnceCell::const_new();
    let build = || {
        world.progress.note("building the peer on River (minutes, the first time)");
        let target = world.profile.target(&world.root).join("peers");
        let mut cargo = workspace::cargo();
        cargo
            .args(["build", "--quiet", "--release", "--locked", "--target-dir"])
            .arg(&target)
            .current_dir(world.root.join(FOLDER).join("river"));
        tokio::task::block_in_place(|| workspace::build(cargo, "the peer on River"))?;
        Ok(target.join("release/bench-peer-river"))
    };
    BUILT.get_or_init(|| async { build().map_err(|error: Error| line(&error)) }).await.clone().map_err(Error::msg)
}

fn river_version(world: &World) -> Option<String> {
    let lock = std::fs::read_to_string(world.root.join(FOLDER).join("river/Cargo.lock")).ok()?;
    let (_, after) = lock.split_once("name = \"riverqueue\"\nversion = \"")?;
    Some(after.split('"').next()?.to_owned())
}
