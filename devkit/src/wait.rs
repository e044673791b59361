//! What tests of all crates need: waiting for conditions, and saying what can't be run.

use std::io::Write;
use std::time::Duration;

/// How long a test waits for a condition before it fails. The full time passes only if something is broken.
pub const PATIENCE: Duration = Duration::from_mins(1);

const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Waits until `condition` holds.
///
/// # Panics
/// If the condition does not hold within [`PATIENCE`]; `what` describes the condition in the message.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let holds = async {
        while !condition().await {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, holds).await.is_ok(), "waited in vain until {what}");
}

/// Says that this test was not run, and why. Not with `eprintln!`, which shows nothing of tests that pass.
pub fn not_run(why: &str) {
    let _ = writeln!(std::io::stderr(), "NOT RUN: {why}");
}
