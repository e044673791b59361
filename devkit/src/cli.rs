//! The command line: the commands, their arguments, and how failures are reported (one line on standard error, exit code 1).

use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use clap::{Parser, Subcommand};

use crate::bench::BenchArgs;
use crate::chaos::ChaosArgs;
use crate::demo::DemoArgs;
use crate::error::line;
use crate::prepare::PrepareArgs;
use crate::receiver::ReceiverArgs;
use crate::simulate::SimulateArgs;
use crate::stack::{DownArgs, StackArgs};
use crate::upstream::UpstreamArgs;
use crate::{bench, chaos, demo, postgres, prepare, receiver, signals, simulate, stack, upstream};

/// Tools for working on Countersign: a local stack without Docker, a demonstration, and the simulated outside world.
#[derive(Debug, Parser)]
#[command(name = "devkit", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start the whole stack in the background: Postgres, the simulated upstream, api, worker.
    ///
    /// Returns when it is ready, and prints the addresses, the key and a curl line. Data, logs and state are in .countersign/.
    Up(StackArgs),
    /// Stop the stack; its data stays.
    Down(DownArgs),
    /// Post the challenge's burst of 60 to the running stack and show what becomes of it; exit code 1 if anything is lost.
    Demo(DemoArgs),
    /// Run the simulated signing API: outages, a strict budget, faults on request, and an audit of every call.
    Upstream(UpstreamArgs),
    /// Run a webhook receiver that verifies and prints every delivery, and misbehaves on request.
    Receiver(ReceiverArgs),
    /// Measure what this machine does with Countersign, beside what it does with others; see docs/performance.md.
    ///
    /// Starts its own Postgres, with every safety on. Prints a table, and writes the results as JSON.
    Bench(BenchArgs),
    /// Make the offline data of the queries in .sqlx, with a temporary Postgres and the migrations.
    Prepare(PrepareArgs),
    /// Compare the scheduling policy with others and with a clairvoyant, by simulation; exit code 1 if a target is missed.
    Simulate(SimulateArgs),
    /// Run several api and worker under load while they are killed and stopped, Postgres crashes and the upstream fails; exit code 1 if a
    /// guarantee is broken.
    Chaos(ChaosArgs),
    /// Run a temporary Postgres until standard input ends or a signal comes; prints its address as JSON.
    #[command(hide = true)]
    Postgres,
}

/// Runs the command given in the process's arguments.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => return fail(&first_line(&error)),
        Err(help) => help.exit(),
    };
    run(cli.command).unwrap_or_else(|error| fail(&line(&error)))
}

fn fail(line: &str) -> ExitCode {
    eprintln!("{line}");
    ExitCode::FAILURE
}

/// The error line of a clap error, without the usage text below it.
fn first_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let line = text.lines().find(|line| line.starts_with("error: ")).unwrap_or("error: a command is needed");
    format!("{}; see `devkit --help`", line.trim_start_matches("error: "))
}

/// Runs a command until a signal comes; then whatever it has started is stopped as it is dropped.
async fn unless_stopped(command: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    tokio::select! {
        ended = command => ended,
        signal = signals::terminate() => signal.and_then(|()| Err(anyhow!("interrupted"))),
    }
}

fn run(command: Command) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    let code = runtime.block_on(async {
        match command {
            Command::Up(args) => stack::up(args).await.map(|()| ExitCode::SUCCESS),
            Command::Down(args) => tokio::task::block_in_place(|| stack::down(args)).map(|()| ExitCode::SUCCESS),
            Command::Demo(args) => demo::run(args).await,
            Command::Upstream(args) => upstream::run(args).await.map(|()| ExitCode::SUCCESS),
            Command::Receiver(args) => receiver::run(args).await.map(|()| ExitCode::SUCCESS),
            Command::Bench(args) => unless_stopped(bench::run(args)).await,
            Command::Prepare(args) => prepare::run(args).await.map(|()| ExitCode::SUCCESS),
            Command::Simulate(args) => tokio::task::block_in_place(|| simulate::run(&args)),
            Command::Chaos(args) => unless_stopped(chaos::main(args)).await,
            Command::Postgres => postgres::serve::run().await,
        }
    });
    runtime.shutdown_background();
    code
}
