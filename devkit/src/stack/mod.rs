//! The whole stack without Docker: Postgres, the simulated upstream, `api` and `worker` as background processes of this machine.
//!
//! `devkit up` and `devkit down` are two processes that share nothing but a folder, `.countersign/` in the repository: the data, the
//! logs, and `state.json`, which names each process by number *and* start, so that `down` never ends a stranger.
//!
//! - `settings` is what can be set; `daemon` starts and ends background processes; `state` remembers them; `up` and `down` are the commands.

mod daemon;
mod down;
mod settings;
mod state;
mod up;

pub(crate) use down::down;
pub(crate) use settings::StackArgs;
pub(crate) use state::State;
pub(crate) use up::up;

/// The API key of the local stack. Known to everybody, like the webhook secret: the stack listens on 127.0.0.1 only.
pub(crate) const API_KEY: &str = "cs_local_development_key";
/// The webhook secret of the local stack.
pub(crate) const WEBHOOK_SECRET: &str = "whsec_Y291bnRlcnNpZ24tbG9jYWwtZGV2LXNlY3JldA==";
/// What a developer is told when there is no stack.
pub(crate) const NOT_RUNNING: &str = "the stack does not run; run `make up` first";

use std::path::PathBuf;

use crate::error::Result;
use crate::workspace;

/// The folder of the stack.
fn folder() -> Result<PathBuf> {
    Ok(workspace::root()?.join(".countersign"))
}

/// The folder of Postgres below it.
fn postgres_folder() -> Result<PathBuf> {
    Ok(folder()?.join("postgres"))
}
