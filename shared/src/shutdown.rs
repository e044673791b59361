//! Stopping: the first SIGTERM or SIGINT asks for a graceful stop, the second ends the process at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit code of a process that was told twice to stop.
const IMPATIENT: i32 = 130;

/// A token that is cancelled by the first SIGTERM or SIGINT. The task that listens lives as long as the process.
///
/// # Errors
/// If the signal handlers can't be installed.
pub fn on_signal() -> std::io::Result<CancellationToken> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let token = CancellationToken::new();
    let asked = token.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if asked.is_cancelled() {
                tracing::warn!("told to stop a second time: ending at once");
                std::process::exit(IMPATIENT);
            }
            tracing::info!("stopping: finishing what is in flight");
            asked.cancel();
        }
    });
    Ok(token)
}
