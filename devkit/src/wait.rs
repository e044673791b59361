//! What tests of all crates need: waiting for conditions, and saying what can't be run.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// How long a test waits for a condition before it fails. The full time passes only if something is broken.
pub const PATIENCE: Duration = Duration::from_mins(1);

const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Waits until `condition` holds.
///
/// # Panics
/// If the condition does not hold within [`PATIENCE`]; `what` describes the condition in the message.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let holds = within(PATIENCE, async || Ok(condition().await));
    // The condition itself may never return.
    let waited = tokio::time::timeout(PATIENCE, holds).await;
    assert!(matches!(waited, Ok(Ok(()))), "waited in vain until {what}");
}

/// Waits until `condition` holds.
///
/// # Errors
/// If it does not hold within this time, or fails.
pub(crate) async fn within(bound: Duration, mut condition: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + bound;
    while !condition().await? {
        if Instant::now() > deadline {
            return Err(anyhow!("not within {bound:.0?}"));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(())
}

/// Says that this test was not run, and why. Not with `eprintln!`, which shows nothing of tests that pass.
pub fn not_run(why: &str) {
    let _ = writeln!(std::io::stderr(), "NOT RUN: {why}");
}
