//! Those that we are compared with: what is there, what has to be fetched and built first, and how each is run at its fastest.
//!
//! A peer that can't be run is reported with the reason. Each is tried with several settings, for a moment, and then measured with the
//! best of them.

use std::path::PathBuf;
use std::process::Command;

use tokio::sync::OnceCell;

use super::driven::Program;
use super::plan::PeerName;
use super::redis::{Fsync, Redis};
use super::world::{World, run_build};
use crate::error::{Context, Error, Result};
use crate::workspace;

/// The folder of the peers, below the root.
const FOLDER: &str = "devkit/peers";

/// A queue that works off no-op jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    River,
    GraphileWorker,
    PgBoss,
    Bullmq(Fsync),
}

/// One way to set a peer up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Setup {
    /// Of the peer's program.
    pub(super) processes: usize,
    /// Jobs or loops at a time, in each.
    pub(super) concurrency: u32,
    /// Jobs fetched at a time, where that can be set.
    pub(super) batch: Option<u32>,
}

impl Setup {
    /// As the report says it.
    pub(super) fn text(self) -> String {
        let batch = self.batch.map(|batch| format!(", batch {batch}")).unwrap_or_default();
        format!("{}, concurrency {}{batch}", processes(self.processes), self.concurrency)
    }
}

/// So many processes, as the report says it.
pub(super) fn processes(count: usize) -> String {
    if count == 1 { "1 process".to_owned() } else { format!("{count} processes") }
}

impl Engine {
    /// All of them.
    pub(super) const ALL: [Self; 5] =
        [Self::River, Self::GraphileWorker, Self::PgBoss, Self::Bullmq(Fsync::Everysec), Self::Bullmq(Fsync::Always)];

    /// As one asks for it.
    pub(super) fn name(self) -> PeerName {
        match self {
            Self::River => PeerName::River,
            Self::GraphileWorker => PeerName::GraphileWorker,
            Self::PgBoss => PeerName::PgBoss,
            Self::Bullmq(_) => PeerName::Bullmq,
        }
    }

    /// What it is, with its version where that is known before it runs.
    pub(super) fn title(self, world: &World) -> String {
        let package = |name: &str| node_version(world, name).map_or_else(|| name.to_owned(), |version| format!("{name} {version}"));
        match self {
            Self::River => format!("River for Rust {}", river_version(world).unwrap_or_default()),
            Self::GraphileWorker => package("graphile-worker"),
            Self::PgBoss => package("pg-boss"),
            Self::Bullmq(fsync) => format!("{}, appendfsync {}", package("bullmq"), fsync.word()),
        }
    }

    /// The settings that are tried: a process of Node has one thread, so as many processes as there are cores as well as one.
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

    /// The query for one of the jobs that are not done, beginning with those that are done last; nothing for Redis.
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

    /// The query whose rows are jobs that did not end well; nothing where those that did are removed.
    pub(super) fn unsuccessful(self) -> Option<&'static str> {
        match self {
            Self::River => Some("select from river_job where state <> 'completed'"),
            Self::PgBoss => Some("select from pgboss.job where name = 'bench' and state <> 'completed'"),
            // One that failed stays, and so the measurement would not end.
            Self::GraphileWorker | Self::Bullmq(_) => None,
        }
    }

    /// The program, with nothing set yet; fetched and built if need be.
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
    INSTALLED.get_or_init(|| async { install(world).map_err(|error| error.line()) }).await.clone().map_err(Error::new)?;
    Ok(Program::new(["node".to_owned(), world.root.join(FOLDER).join("node").join(script).to_string_lossy().into_owned()]))
}

/// Fetches what `package-lock.json` names, unless it is there.
fn install(world: &World) -> Result<()> {
    let version = Command::new("node").arg("--version").output().context(|| "no Node; install `nodejs` and `npm`")?;
    let folder = world.root.join(FOLDER).join("node");
    let (wanted, there) = (folder.join("package-lock.json"), folder.join("node_modules/.package-lock.json"));
    let modified = |path: &PathBuf| path.metadata().and_then(|meta| meta.modified()).ok();
    world.progress.note(format!("Node {}", String::from_utf8_lossy(&version.stdout).trim()));
    if modified(&there).is_some_and(|there| modified(&wanted).is_some_and(|wanted| there >= wanted)) {
        return Ok(());
    }
    world.progress.note("fetching the peers that run on Node");
    let mut npm = Command::new("npm");
    // Nothing that a package brings is run: what they compile is optional. Not `ci`: it wants the optional packages of every platform in the
    // lock file, which npm writes only where it sees them; the versions are those of the lock file either way.
    npm.args(["install", "--no-save", "--ignore-scripts", "--no-audit", "--no-fund"]).current_dir(&folder);
    run_build(npm, "the peers that run on Node")
}

/// The version of a package that the lock file names.
fn node_version(world: &World, package: &str) -> Option<String> {
    let text = std::fs::read(world.root.join(FOLDER).join("node/package-lock.json")).ok()?;
    let lock: serde_json::Value = serde_json::from_slice(&text).ok()?;
    Some(lock["packages"][format!("node_modules/{package}")]["version"].as_str()?.to_owned())
}

/// The peer on River, built in a target folder of its own.
async fn river(world: &World) -> Result<PathBuf> {
    static BUILT: OnceCell<Result<PathBuf, String>> = OnceCell::const_new();
    let build = || {
        world.progress.note("building the peer on River (minutes, the first time)");
        let target = world.profile.target(&world.root).join("peers");
        let mut cargo = Command::new(workspace::cargo());
        cargo
            .args(["build", "--quiet", "--release", "--locked", "--target-dir"])
            .arg(&target)
            .current_dir(world.root.join(FOLDER).join("river"));
        run_build(cargo, "the peer on River")?;
        Ok(target.join("release/bench-peer-river"))
    };
    BUILT.get_or_init(|| async { build().map_err(|error: Error| error.line()) }).await.clone().map_err(Error::new)
}

fn river_version(world: &World) -> Option<String> {
    let lock = std::fs::read_to_string(world.root.join(FOLDER).join("river/Cargo.lock")).ok()?;
    let (_, after) = lock.split_once("name = \"riverqueue\"\nversion = \"")?;
    Some(after.split('"').next()?.to_owned())
}
