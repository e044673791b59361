//! `devkit up`: builds the services, starts everything in the background, and waits until it is ready.

use std::fs::{File, TryLockError};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::settings::{Environment, api_key, local, webhook_secret};
use super::state::Running;
use super::{StackArgs, State, daemon, down, folder, postgres_folder};
use crate::postgres::{ClusterOptions, Detached, Durability};
use crate::{http, processes};

/// How long a service may take to become ready; it first migrates the schema.
const READY_BOUND: Duration = Duration::from_mins(1);
const POLL: Duration = Duration::from_millis(50);

/// Starts the stack, or reports that it is already running.
pub(crate) async fn up(args: StackArgs) -> Result<()> {
    let folder = folder()?;
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let _lock = lock(&folder.join("lock"))?;
    if let Some(state) = State::load()? {
        if state.runs() && ready(&state).await? {
            say!("the stack runs already, with the programs and settings it was started with; to change them, `make down` first");
            announce(&state);
            return Ok(());
        }
        // The machine went down, or a process was killed.
        tokio::task::block_in_place(down::stop_all)?;
    }
    refuse_taken_ports(&args)?;
    say!("building api and worker");
    tokio::task::block_in_place(processes::build)?;
    let mut state = State::default();
    let started = start(&args, &mut state).await;
    if started.is_err() {
        // Half a stack is of no use. The first error is the one to report.
        let _ = tokio::task::block_in_place(down::stop_all);
    }
    started?;
    announce(&state);
    Ok(())
}

async fn start(args: &StackArgs, state: &mut State) -> Result<()> {
    let options = ClusterOptions {
        durability: Durability::Full,
        folder: Some(postgres_folder()?),
        port: Some(args.postgres_port),
        ..ClusterOptions::default()
    };
    let postgres = tokio::task::block_in_place(|| Detached::start(&options))?;
    if let Some(note) = postgres.note() {
        say!("{note}");
    }
    let database = postgres.database("countersign").await?;
    let url = |port| format!("http://{}", local(port));
    state.api_url = url(args.api_port);
    state.worker_url = url(args.worker_port);
    state.upstream_url = url(args.upstream_port);
    state.database_url.clone_from(&database);

    // The api creates the schema; a worker that starts earlier creates it, too. So the start order matters only because `down` reverses it.
    launch(state, "upstream", "devkit", &["upstream"], &args.upstream())?;
    launch(state, "worker", "worker", &[], &args.worker(&database))?;
    launch(state, "api", "api", &[], &args.api(&database))?;
    let addresses =
        [format!("{}/_audit", state.upstream_url), format!("{}/health/ready", state.worker_url), format!("{}/health/ready", state.api_url)];
    for (process, address) in state.processes.iter().zip(addresses) {
        wait_until_ready(process, &address).await?;
    }
    Ok(())
}

fn launch(state: &mut State, name: &str, program: &str, arguments: &[&str], environment: &Environment) -> Result<()> {
    let running = daemon::start(name, &processes::program(program)?, arguments, environment)?;
    state.processes.push(running);
    state.save()
}

async fn wait_until_ready(process: &Running, address: &str) -> Result<()> {
    let client = http::client(Duration::from_secs(2))?;
    let deadline = Instant::now() + READY_BOUND;
    while !http::is_ready(&client, address).await {
        let name = &process.name;
        let log = daemon::log_path(name)?;
        if !process.runs() {
            return Err(anyhow!("{name} ended: {} (log: {})", daemon::last_line(name), log.display()));
        }
        if Instant::now() > deadline {
            return Err(anyhow!("{name} is not ready at {address} within {READY_BOUND:?}; its log: {}", log.display()));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

async fn ready(state: &State) -> Result<bool> {
    let client = http::client(Duration::from_secs(5))?;
    Ok(http::is_ready(&client, &format!("{}/health/ready", state.api_url)).await)
}

/// Takes a lock, because two concurrent `up` would start everything twice.
fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("opening {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(anyhow!("another `devkit up` is at work")),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("locking {}", path.display())),
    }
}

fn refuse_taken_ports(args: &StackArgs) -> Result<()> {
    for (port, whose, variable) in args.ports() {
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err() {
            return Err(anyhow!("port {port}, for {whose}, is taken; set {variable} to another one"));
        }
    }
    Ok(())
}

fn announce(state: &State) {
    let State { api_url, worker_url, upstream_url, database_url, .. } = state;
    let (key, secret) = (api_key(), webhook_secret());
    say!(
        "
  API             {api_url}
  documentation   {api_url}/docs
  worker          {worker_url}/metrics
  upstream        {upstream_url}/_audit
  Postgres        {database_url}
  API key         {key}
  webhook secret  {secret}
  logs            .countersign/logs/

  curl -i {api_url}/crypto/sign -H 'X-API-Key: {key}' -H 'Content-Type: application/json' -d '{{\"message\":\"hello\"}}'
"
    );
}
