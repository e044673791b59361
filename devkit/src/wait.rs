//! Waiting for conditions, for tests.

use std::time::{Duration, Instant};

/// How long a test waits for a condition before it fails. The full time passes only if something is broken.
pub const PATIENCE: Duration = Duration::from_mins(1);

const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Waits until `condition` holds.
///
/// # Panics
/// If the condition does not hold within [`PATIENCE`]; `what` describes the condition in the message.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !condition().await {
        assert!(started.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
