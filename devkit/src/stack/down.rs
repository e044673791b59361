//! `devkit down`: stops the stack in the order that loses nothing, and reports it.

use anyhow::Result;
use clap::Args;

use super::{State, daemon, postgres_folder};
use crate::postgres::Detached;

/// The settings of `devkit down`.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct DownArgs {
    /// Remove the data, too.
    #[arg(long)]
    data: bool,
}

/// Stops everything that is running.
pub(crate) fn down(args: DownArgs) -> Result<()> {
    let stopped = stop_all()?;
    if args.data
        && let Some(postgres) = Detached::at(&postgres_folder()?)?
    {
        say!("removed {}", postgres.remove()?.display());
    } else if stopped {
        say!("the stack is down; its data stays in .countersign/");
    } else {
        say!("nothing runs");
    }
    Ok(())
}

/// Stops the services before their dependencies, in reverse start order. Returns whether anything was running.
pub(super) fn stop_all() -> Result<bool> {
    let mut any = false;
    for process in State::load()?.unwrap_or_default().processes.iter().rev() {
        if daemon::stop(process)? {
            say!("stopped {}", process.name);
            any = true;
        }
    }
    if let Some(postgres) = Detached::at(&postgres_folder()?)?
        && postgres.running().is_some()
    {
        postgres.stop()?;
        say!("stopped postgres");
        any = true;
    }
    State::remove()?;
    Ok(any)
}
