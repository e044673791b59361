//! Everything that a run starts: Postgres, the simulated upstream, the receiver, and the processes. Dropped, all of it stops.

use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::Client;

use super::faults::Takeover;
use super::load::{Target, client};
use super::record::Database;
use crate::error::{Error, Result};
use crate::http;
use crate::ports::free_port;
use crate::postgres::{Cluster, ClusterOptions};
use crate::processes::{self, Process, Signal};
use crate::receiver::{Receiver, ReceiverOptions};
use crate::units::Rate;
use crate::upstream::{Simulator, SimulatorOptions};

pub(super) const KEY: &str = "cs_chaos_key";
const SECRET: &str = crate::stack::WEBHOOK_SECRET;

pub(super) const APIS: usize = 2;
pub(super) const WORKERS: usize = 3;

/// The challenge's minute is two seconds here: an outage of a message takes as long as it does there, thirty times as fast.
const RATE: &str = "10/2s";
/// A lease is ten seconds longer than this.
const TIMEOUT: &str = "1s";

/// The longest that anything is waited for. Longer than a lease, a window, and a Postgres that recovers; never waited for in full
/// unless something is broken.
pub(super) const PATIENCE: Duration = Duration::from_mins(1);
pub(super) const POLL: Duration = Duration::from_millis(20);

/// An `api` process.
pub(super) struct Api {
    pub(super) process: Process,
    pub(super) target: Arc<Target>,
}

/// A `worker` process.
pub(super) struct Worker {
    pub(super) process: Process,
    /// Who it is to Postgres.
    pub(super) role: String,
    /// Does it stand still?
    pub(super) frozen: bool,
}

pub(super) struct World {
    // In this order they are dropped: the processes before what they are connected to.
    pub(super) apis: Vec<Api>,
    pub(super) workers: Vec<Worker>,
    pub(super) upstream: Simulator,
    pub(super) receiver: Receiver,
    pub(super) database: Arc<Database>,
    /// What others have still to take over from workers that were killed or stopped.
    pub(super) takeovers: Vec<Takeover>,
    pub(super) client: Client,
    /// Results that workers since killed had brought too late.
    pub(super) fenced_off: usize,
    /// Processes started so far; makes a role for each.
    started: usize,
}

impl Worker {
    /// Results that it brought when the job was somebody else's, and that changed nothing: how often it says so in its log.
    pub(super) fn fenced_off(&self) -> usize {
        self.process.log().matches("the lease had run out: nothing was changed").count()
    }
}

impl World {
    pub(super) async fn start(seed: u64) -> Result<Self> {
        tokio::task::spawn_blocking(processes::build).await.map_err(|_| Error::new("building api and worker was abandoned"))??;
        let any = ([127, 0, 0, 1], 0).into();
        let rate: Rate = RATE.parse().map_err(Error::new)?;
        let options = SimulatorOptions {
            rate,
            failure_probability: 0.3,
            outage: Duration::from_secs(2)..=Duration::from_secs(6),
            // Slow enough that jobs are under way when something happens.
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

    /// Starts an `api`, on a free port, and waits until it is ready; its address.
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
        waited.map_err(|error| Error::new(format!("{}; its log: {}", error.line(), process.log())))?;
        Ok((process, address))
    }

    /// Ends what still runs in good order. What a drop would kill at once gets the chance to finish; nothing depends on it.
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

/// Looks again and again until the condition holds.
///
/// # Errors
/// When it does not within [`PATIENCE`].
pub(super) async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) -> Result<()> {
    let started = Instant::now();
    while !condition().await {
        if started.elapsed() > PATIENCE {
            return Err(Error::new(format!("waited for {PATIENCE:?} in vain until {what}")));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}
