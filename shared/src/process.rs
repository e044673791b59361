//! The process: its runtime, its limit of open files, and its stop signals.

use std::process::ExitCode;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Runs `program` to its end. Blocking work that is still running then is abandoned: a DNS look-up can't be cancelled, and may take a
/// minute.
///
/// # Panics
/// If the operating system can't create threads.
pub fn run(program: impl Future<Output = ExitCode>) -> ExitCode {
    let runtime = Runtime::new().expect("the operating system gives threads");
    let code = runtime.block_on(program);
    runtime.shutdown_background();
    code
}

/// Raises the limit of open files as far as this process is allowed to, and returns the limit. Each connection needs one file, and many
/// systems allow 1,024 by default.
#[must_use]
pub fn raise_open_files() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return u64::MAX };
    if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft }
}

/// Exit code of a process that was told twice to stop.
const IMPATIENT: i32 = 130;

/// Returns a token that the first SIGTERM or SIGINT cancels. The second one ends the process at once. The task that listens lives as long
/// as the process.
///
/// # Errors
/// If the signal handlers can't be installed.
pub fn stop_on_signal() -> std::io::Result<CancellationToken> {
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

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn the_end_of_a_process_waits_for_nothing_that_cannot_be_cut_short() {
        let (began, long) = (Instant::now(), Duration::from_secs(20));
        run(async {
            tokio::task::spawn_blocking(move || std::thread::sleep(long));
            ExitCode::SUCCESS
        });
        assert!(began.elapsed() < long / 2);
    }

    #[test]
    fn as_many_files_may_be_open_as_the_system_allows() {
        let allowed = raise_open_files();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (allowed, allowed));
    }
}
