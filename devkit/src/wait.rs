//! Waiting for what must happen, for tests.

use std::time::{Duration, Instant};

/// The longest that anything may take before a test gives up on it; never waited for in full unless something is broken.
pub const PATIENCE: Duration = Duration::from_mins(1);

const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Waits until `condition` holds.
///
/// # Panics
/// If it does not in [`PATIENCE`]; `what` says for what it was waited.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !condition().await {
        assert!(started.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
