//! The Postgres, its databases, and the programs under test.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::machine::kib;
use super::plan::Plan;
use crate::http;
use crate::ports::free_port;
use crate::postgres::{Cluster, ClusterOptions, Durability};
use crate::processes::{self, Process};
use crate::wait::within;
use crate::workspace::{self, Profile};

/// The API key that every api under test has from the start.
pub(super) const API_KEY: &str = "cs_bench";
/// The webhook secret of that key.
pub(super) const WEBHOOK_SECRET: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
/// A call budget that is no limit: enough slots that a job that is done at once never waits for one, but no more, because every claim
/// searches for free slots.
pub(super) const UNLIMITED: &str = "24576/100ms";

/// How long a program may take to become ready.
const READY_WITHIN: Duration = Duration::from_mins(1);

/// An empty database with our schema, which the others are copies of.
const TEMPLATE: &str = "countersign_template";
const DATABASE: &str = "countersign";

/// Reports progress on standard error.
#[derive(Debug)]
pub(super) struct Progress {
    started: Instant,
}

impl Progress {
    /// Prints the name of the part that begins.
    pub(super) fn section(&self, name: &str) {
        eprintln!("{} {name}", self.clock());
    }

    /// Prints what was done, or what begins.
    pub(super) fn note(&self, text: impl AsRef<str>) {
        eprintln!("{}   {}", self.clock(), text.as_ref());
    }

    fn clock(&self) -> String {
        let seconds = self.started.elapsed().as_secs();
        format!("[{:02}:{:02}]", seconds / 60, seconds % 60)
    }
}

/// The state shared by all workloads.
pub(super) struct World {
    pub(super) plan: Plan,
    pub(super) root: PathBuf,
    pub(super) profile: Profile,
    pub(super) cluster: Cluster,
    pub(super) progress: Progress,
}

impl World {
    /// Builds the programs and starts Postgres.
    pub(super) async fn start(plan: Plan) -> Result<Self> {
        let progress = Progress { started: Instant::now() };
        progress.section("building api and worker, starting Postgres");
        tokio::task::block_in_place(processes::build)?;
        let cluster = start_cluster(&plan, &[]).await?;
        let world = Self { plan, root: workspace::root()?, profile: Profile::of_this_process()?, cluster, progress };
        world.make_template(&world.cluster).await?;
        Ok(world)
    }

    /// Starts another server with further settings, and returns it with the URL of an empty database with our schema.
    pub(super) async fn another_cluster(&self, settings: &[(&str, &str)]) -> Result<(Cluster, String)> {
        let cluster = start_cluster(&self.plan, settings).await?;
        self.make_template(&cluster).await?;
        let url = cluster.url(TEMPLATE);
        Ok((cluster, url))
    }

    async fn make_template(&self, cluster: &Cluster) -> Result<()> {
        cluster.create_database(TEMPLATE).await?;
        cluster.migrate(TEMPLATE, &self.root.join("migrations")).await
    }

    /// Replaces the database with an empty one with our schema, and settles it, so that the remains of the previous one are out of the way.
    pub(super) async fn fresh(&self) -> Result<Database> {
        self.fresh_named(DATABASE).await
    }

    /// Like [`fresh`](Self::fresh), with another name, for workloads that need two databases.
    pub(super) async fn fresh_named(&self, name: &str) -> Result<Database> {
        self.cluster.drop_database(name).await?;
        self.cluster.create_database_from(name, TEMPLATE).await?;
        let database = Database { url: self.cluster.url(name) };
        database.settle().await?;
        Ok(database)
    }

    /// An empty database without a schema.
    pub(super) async fn bare(&self, name: &str) -> Result<Database> {
        self.cluster.drop_database(name).await?;
        self.cluster.create_database(name).await?;
        let database = Database { url: self.cluster.url(name) };
        database.settle().await?;
        Ok(database)
    }

    /// Starts an api, and waits until it is ready.
    pub(super) async fn api(&self, database: &Database) -> Result<Service> {
        // Raise the limits that no workload is about.
        let fixed = [
            ("BOOTSTRAP_API_KEY", API_KEY),
            ("BOOTSTRAP_WEBHOOK_SECRET", WEBHOOK_SECRET),
            ("MAX_WAITERS", "10000"),
            ("MAX_PENDING", "1000000000"),
        ];
        self.service("api", "API_LISTEN", database, &fixed).await
    }

    /// Starts a worker, and waits until it is ready.
    pub(super) async fn worker(&self, database: &Database, settings: &[(&str, &str)]) -> Result<Service> {
        self.service("worker", "WORKER_LISTEN", database, settings).await
    }

    async fn service(&self, name: &str, listen: &str, database: &Database, settings: &[(&str, &str)]) -> Result<Service> {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let address = addr.to_string();
        let fixed = [("DATABASE_URL", database.url.as_str()), (listen, address.as_str())];
        let own = fixed.iter().chain(settings).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let process = Process::spawn(&processes::program(name)?, [""; 0], own.chain(self.plan.set.iter().cloned()))?;
        let (client, url) = (http::client(Duration::from_secs(2))?, format!("http://{address}/health/ready"));
        within(READY_WITHIN, async || Ok(http::is_ready(&client, &url).await))
            .await
            .with_context(|| format!("{name} is not ready; its log: {}", process.log()))?;
        Ok(Service { addr, process })
    }

    /// Builds the worker's engine without calls, and returns its path.
    ///
    /// It is built together with all other programs, as `make bench` has just done, so that Cargo selects the same features and compiles
    /// nothing twice.
    pub(super) fn engine(&self) -> Result<PathBuf> {
        let mut build = workspace::cargo();
        build.args(["build", "--quiet", "--workspace", "--bins", "--features", "worker/bench"]);
        build.args(self.profile.arguments()).current_dir(&self.root);
        tokio::task::block_in_place(|| workspace::build(build, "the engine without calls"))?;
        processes::program("engine")
    }
}

/// Starts a server with all crash safety on, and with enough memory and write-ahead log that the defaults are not the limit.
async fn start_cluster(plan: &Plan, more: &[(&str, &str)]) -> Result<Cluster> {
    let safety = [("fsync", "on"), ("synchronous_commit", "on"), ("full_page_writes", "on")];
    let sizes = [("shared_buffers", plan.shared_buffers.as_str()), ("max_wal_size", "4GB")];
    let settings = safety.iter().chain(&sizes).chain(more).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Cluster::start(ClusterOptions { durability: Durability::Full, max_connections: 400, settings, ..ClusterOptions::default() }).await
}

/// A database of the server.
#[derive(Clone, Debug)]
pub(super) struct Database {
    pub(super) url: String,
}

impl Database {
    /// Opens a connection for the harness.
    pub(super) async fn connect(&self) -> Result<PgConnection> {
        PgConnection::connect(&self.url).await.context("connecting to Postgres")
    }

    /// Vacuums, analyzes and makes a checkpoint, so that every measurement begins alike: with the statistics of a running system and
    /// nothing left to write.
    pub(super) async fn settle(&self) -> Result<()> {
        let mut connection = self.connect().await?;
        self.statement(&mut connection, "vacuum analyze").await?;
        self.statement(&mut connection, "checkpoint").await
    }

    /// Runs a statement of the harness.
    pub(super) async fn statement(&self, connection: &mut PgConnection, statement: &str) -> Result<()> {
        sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(connection).await.with_context(|| statement.to_owned())?;
        Ok(())
    }

    /// Returns the number that a query of the harness yields.
    pub(super) async fn number(&self, connection: &mut PgConnection, query: &str) -> Result<i64> {
        sqlx::query_scalar(AssertSqlSafe(query.to_owned())).fetch_one(connection).await.with_context(|| query.to_owned())
    }

    /// Waits until the query, which asks for one of the remaining rows, finds none.
    ///
    /// The query is polled every few milliseconds, so it should look first at what is done last: polls that step over everything that is
    /// already done would take a share of what is measured, the peers' as well as ours.
    pub(super) async fn until_none(&self, bound: Duration, query: &str) -> Result<()> {
        let mut connection = self.connect().await?;
        // Nor should the polls read the whole table.
        self.statement(&mut connection, "set enable_seqscan = off").await?;
        let query = format!("select count(*) from ({query}) one_left");
        within(bound, async || Ok(self.number(&mut connection, &query).await? == 0)).await
    }
}

/// A running api or worker.
#[derive(Debug)]
pub(super) struct Service {
    pub(super) addr: SocketAddr,
    pub(super) process: Process,
}

impl Service {
    /// Memory in use, in MB: current and peak.
    pub(super) fn memory(&self) -> Result<(f64, f64)> {
        let status = self.kernel_file("status")?;
        let megabytes = |name| kib(&status, name).map(|kib| kib * 1024.0 / 1e6).ok_or_else(|| anyhow!("no {name}"));
        Ok((megabytes("VmRSS")?, megabytes("VmHWM")?))
    }

    /// The CPU time that it has used so far.
    pub(super) fn cpu(&self) -> Result<Duration> {
        processor_time(&self.kernel_file("stat")?).ok_or_else(|| anyhow!("/proc/PID/stat is not understood"))
    }

    fn kernel_file(&self, name: &str) -> Result<String> {
        let pid = self.process.pid().ok_or_else(|| anyhow!("the process has ended"))?;
        let path = Path::new("/proc").join(pid.to_string()).join(name);
        std::fs::read_to_string(&path).with_context(|| format!("reading {}; this needs Linux", path.display()))
    }
}

/// The sum of fields 14 and 15 of `/proc/PID/stat`, in hundredths of a second, which is what Linux shows on every architecture.
fn processor_time(stat: &str) -> Option<Duration> {
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(Duration::from_millis((next()? + next()?) * 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_that_of_the_program_and_of_the_kernel_for_it() {
        let stat = "12 (a ) b) S 1 12 12 0 -1 4194304 88 0 0 0 150 7 0 0 20 0 1 0 4242 2752512 190\n";
        assert_eq!(processor_time(stat), Some(Duration::from_millis(1570)));
        assert_eq!(processor_time("nonsense"), None);
    }
}
