//! The process: how it runs, how many files it may open, and how it is told to stop.

use std::process::ExitCode;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Runs `program` to its end. What still runs then is left behind: nobody can cut short the look-up of a name, which may take a minute.
///
/// # Panics
/// If the operating system gives no threads.
pub fn run(program: impl Future<Output = ExitCode>) -> ExitCode {
    let runtime = Runtime::new().expect("the operating system gives threads");
    let code = runtime.block_on(program);
    runtime.shutdown_background();
    code
}

/// Raises the number of files that this process may have open as far as it is allowed to, and says what it is then. Each connection is one, and
/// by default many systems allow 1,024.
#[must_use]
pub fn raise_open_files() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return u64::MAX };
    if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft }
}

/// Exit code of a process that was told twice to stop.
const IMPATIENT: i32 = 130;

/// A token that is cancelled by the first SIGTERM or SIGINT; the second ends the process at once. The task that listens lives as long as the process.
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
