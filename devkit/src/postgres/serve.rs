//! `devkit postgres`: a temporary server for as long as the command runs. The tests of the guardian kill this process.

use std::process::ExitCode;

use anyhow::{Context, Result};
use tokio::io::AsyncReadExt;

use super::{Cluster, ClusterOptions};
use crate::signals;

/// Starts a server, prints its location as one line of JSON, and stops it when standard input ends or a signal arrives.
pub(crate) async fn run() -> Result<ExitCode> {
    let cluster = Cluster::start(ClusterOptions::default()).await?;
    say!("{}", serde_json::json!({ "url": cluster.url("postgres"), "pid": cluster.pid(), "folder": cluster.folder() }));
    let (mut input, mut rest) = (tokio::io::stdin(), Vec::new());
    tokio::select! {
        read = input.read_to_end(&mut rest) => { read.context("reading standard input")?; }
        signal = signals::terminate() => signal?,
    }
    Ok(ExitCode::SUCCESS)
}
