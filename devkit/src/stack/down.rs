//! `devkit down`: stops the stack in the order that loses nothing, and reports it.

use super::{State, daemon, postgres_folder};
use crate::error::Result;
use crate::postgres::Detached;

/// Stops everything that is running. The data stays.
pub(crate) fn down() -> Result<()> {
    if stop_all()? {
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
