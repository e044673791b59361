//! Everything that a run starts: Postgres, the simulated upstream, the receiver, and the processes. All of it stops on drop.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow};
use reqwest::Client;

use super::faults::Takeover;
use super::load::{Target, client};
use super::record::Database;
use crate::error::line;
use crate::http;
use crate::ports::free_port;
use crate::postgres::{Cluster, ClusterOptions};
use crate::processes::{self, Process, Signal};
use crate::receiver::{Receiver, ReceiverOptions};
use crate::units::Rate;
use crate::upstream::{Simulator, SimulatorOptions};
use crate::wait::within;

pub(super) const KEY: &str = "cs_chaos_key";
const SECRET: &str = crate::stack::WEBHOOK_SECRET;

pub(super) const APIS: usize = 2;
pub(super) const WORKERS: usize = 3;

/// The rate of the challenge, thirty times as fast: its minute is two seconds here.
const RATE: &str = "10/2s";
/// A lease is ten seconds longer than this.
const TIMEOUT: &str = "1s";

/// How long to wait for any condition. Longer than a lease, a window, and a recovery of Postgres; the full time passes only if something is
/// broken.
pub(super) const PATIENCE: Duration = Duration::from_mins(1);

/// An `api` process.
pub(super) struct Api {
    pub(super) process: Process,
    pub(super) target: Arc<Target>,
}

/// A `worker` process.
pub(super) struct Worker {
    pub(super) process: Process,
    /// Its Postgres role.
    pub(super) role: String,
    /// Whether it is stopped (SIGSTOP).
    pub(super) frozen: bool,
}

pub(super) struct World {
    // The fields are dropped in this order: the processes before what they are connected to.
    pub(super) apis: Vec<Api>,
    pub(super) workers: Vec<Worker>,
    pub(super) upstream: Simulator,
    pub(super) receiver: Receiver,
    pub(super) database: Arc<Database>,
    /// Jobs of workers that were killed or stopped, and that others have not yet taken over.
    pub(super) takeovers: Vec<Takeover>,
    pub(super) client: Client,
    /// Late results of workers that have since been killed.
    pub(super) fenced_off: usize,
    /// The number of processes started so far; it makes their roles unique.
    started: usize,
}

impl Worker {
    /// The number of results that it wrote after losing the lease and that changed nothing, counted in its log.
    pub(super) fn fenced_off(&self) -> usize {
        self.process.log().matches("the lease had run out: nothing was changed").count()
    }
}

impl World {
    pub(super) async fn start(seed: u64) -> Result<Self> {
        tokio::task::spawn_blocking(processes::build).await.map_err(|_| anyhow!("building api and worker was abandoned"))??;
        let any = ([127, 0, 0, 1], 0).into();
        let rate: Rate = RATE.parse().map_err(Error::msg)?;
        let options = SimulatorOptions {
            rate,
            failure_probability: 0.3,
            outage: Duration::from_secs(2)..=Duration::from_secs(6),
            // Slow enough that jobs are in progress when a fault happens.
            latency: Duration::from_millis(100)..=Duration::from_millis(400),
            seed: Some(seed),
            ..SimulatorOptions::default()
        };
        let upstream = Simulator::start(any, options).await?;
        let receiver = Receiver::start(any, ReceiverOptions { secret: Some(SECRET.to_owned()) }).await?;
        let database = Arc::new(Database::create(Cluster::start(ClusterOptions::default()).await?, "chaos").await?);
        let (apis, workers, takeovers) = (Vec::new(), Vec::new(), Vec::new());
        let mut world = Self { apis, workers, takeovers, upstream, receiver, database, client: client()?, fenced_off: 0, started: 0 };
        for _ in 0..APIS {
            let (process, address) = world.spawn_api().await?;
            let target = Arc::new(Target::default());
            // Counted as disturbed until it is ready.
            target.disturbed();
            target.mended(Some(address));
            world.apis.push(Api { process, target });
        }
        world.database.record().await?;
        for _ in 0..WORKERS {
            let worker = world.spawn_worker().await?;
            world.workers.push(worker);
        }
        Ok(world)
    }

    /// Starts an `api` on a free port, waits until it is ready, and returns it with its address.
    pub(super) async fn spawn_api(&mut self) -> Result<(Process, String)> {
        let listen = format!("127.0.0.1:{}", free_port()?);
        let url = self.new_role("api").await?.1;
        let process = spawn(
            "api",
            &[
                ("DATABASE_URL", &url),
                ("API_LISTEN", &listen),
                ("BOOTSTRAP_API_KEY", KEY),
                ("BOOTSTRAP_WEBHOOK_SECRET", SECRET),
                ("WEBHOOK_ALLOW_NETWORKS", "127.0.0.0/8"),
            ],
        )?;
        self.ready(process, &listen).await
    }

    /// Starts a `worker`, and waits until it is ready.
    pub(super) async fn spawn_worker(&mut self) -> Result<Worker> {
        let listen = format!("127.0.0.1:{}", free_port()?);
        let (role, url) = self.new_role("worker").await?;
        let process = spawn(
            "worker",
            &[
                ("DATABASE_URL", &url),
                ("WORKER_LISTEN", &listen),
                ("UPSTREAM_URL", &self.upstream.url()),
                ("UPSTREAM_API_KEY", "upstream-key"),
                ("UPSTREAM_RATE", RATE),
                ("UPSTREAM_TIMEOUT", TIMEOUT),
                ("SIGN_RETRY_BASE", "100ms"),
                ("WEBHOOK_TIMEOUT", TIMEOUT),
                ("WEBHOOK_ALLOW_NETWORKS", "127.0.0.0/8"),
                ("WEBHOOK_RETRY_SCHEDULE", "200ms,500ms,1s,1s,2s,2s,2s,2s,2s,2s,2s,2s,2s,2s,2s,2s"),
            ],
        )?;
        let (process, _) = self.ready(process, &listen).await?;
        Ok(Worker { process, role, frozen: false })
    }

    async fn new_role(&mut self, program: &str) -> Result<(String, String)> {
        self.started += 1;
        let role = format!("{program}_{}", self.started);
        let url = self.database.url_for(&role).await?;
        Ok((role, url))
    }

    async fn ready(&self, process: Process, listen: &str) -> Result<(Process, String)> {
        let address = format!("http://{listen}");
        let waited = until("a new process is ready", async || http::is_ready(&self.client, &format!("{address}/health/ready")).await).await;
        waited.map_err(|error| anyhow!("{}; its log: {}", line(&error), process.log()))?;
        Ok((process, address))
    }

    /// Shuts down the processes gracefully. A drop would kill them at once; nothing depends on the difference.
    pub(super) async fn stop(mut self) -> Result<()> {
        let apis = self.apis.iter_mut().map(|api| &mut api.process);
        let mut processes: Vec<&mut Process> = apis.chain(self.workers.iter_mut().map(|worker| &mut worker.process)).collect();
        for process in &processes {
            process.signal(Signal::Term)?;
        }
        for process in &mut processes {
            process.wait_exit(PATIENCE).await?;
        }
        Ok(())
    }
}

fn spawn(program: &str, environment: &[(&str, &str)]) -> Result<Process> {
    let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Process::spawn(&processes::program(program)?, [""; 0], environment)
}

/// Waits until the condition holds.
///
/// # Errors
/// If it does not hold within [`PATIENCE`].
pub(super) async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) -> Result<()> {
    within(PATIENCE, async || Ok(condition().await)).await.with_context(|| format!("waiting until {what}"))
}
