//! The whole stack without Docker: Postgres, the simulated upstream, `api` and `worker` as background processes on this machine.
//!
//! `devkit up` and `devkit down` are two processes that share only a folder, `.countersign/` in the repository: the data, the logs, and
//! `state.json`, which identifies each process by ID *and* start time, so that `down` never ends an unrelated process.
//!
//! - `settings` has the settings; `daemon` starts and ends background processes; `state` records them; `up` and `down` are the commands.

mod daemon;
mod down;
mod settings;
mod state;
mod up;

pub(crate) use down::{DownArgs, down};
pub(crate) use settings::StackArgs;
pub(crate) use state::State;
pub(crate) use up::up;

/// The API key of the local stack. Like the webhook secret, it is public: the stack listens on 127.0.0.1 only.
pub(crate) const API_KEY: &str = "cs_local_development_key";
/// The webhook secret of the local stack.
pub(crate) const WEBHOOK_SECRET: &str = "whsec_Y291bnRlcnNpZ24tbG9jYWwtZGV2LXNlY3JldA==";
/// The error if there is no stack.
pub(crate) const NOT_RUNNING: &str = "the stack does not run; run `make up` first";

use std::path::PathBuf;

use anyhow::Result;

use crate::workspace;

/// The folder of the stack.
fn folder() -> Result<PathBuf> {
    Ok(workspace::root()?.join(".countersign"))
}

/// The folder of Postgres, below that of the stack.
fn postgres_folder() -> Result<PathBuf> {
    Ok(folder()?.join("postgres"))
}
