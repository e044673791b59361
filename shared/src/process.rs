//! The process: its runtime, its tasks, its limit of open files, its stop signals, and how it ends.

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::settings::in_one_line;
use crate::store::StoreError;
use crate::telemetry::{TelemetryError, display_chain};

/// Why a process ends with an error. Each is one line.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The settings do not fit together, or not with those of other processes.
    #[error("{0}")]
    Settings(String),
    /// The log or the exporter can't be started.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// Postgres failed, its address is wrong, or its contents do not fit.
    #[error("{}{}", .0.variable().map_or_else(String::new, |variable| format!("{variable}: ")), display_chain(.0))]
    Store(#[from] StoreError),
    /// The address in this setting can't be bound.
    #[error("{0}={1}: {2}")]
    Listen(&'static str, SocketAddr, #[source] std::io::Error),
    /// The signal handlers can't be installed.
    #[error("can't listen to signals: {0}")]
    Signals(#[source] std::io::Error),
    /// A task panicked, or ended before it was told to.
    #[error("a task ended unexpectedly; the log says why")]
    EndedEarly,
    /// An HTTP client can't be set up.
    #[error("can't set up TLS: {}; accepted: certificates of the system (package ca-certificates), or of SSL_CERT_FILE", display_chain(&**.0))]
    Client(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A command can't do what it was asked to.
    #[error("{0}")]
    Command(String),
}

impl ProcessError {
    /// The exit code: 2 for a wrong setting, otherwise 1.
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Settings(_) | Self::Telemetry(_) => ExitCode::from(2),
            Self::Store(error) if error.is_a_wrong_setting() => ExitCode::from(2),
            _ => ExitCode::FAILURE,
        }
    }
}

/// Runs `program` to its end, and prints why it failed. Blocking work that is still running then is abandoned: a DNS look-up can't be
/// cancelled, and may take a minute.
///
/// # Panics
/// If the operating system can't create threads.
pub fn run(program: impl Future<Output = Result<(), ProcessError>>) -> ExitCode {
    let runtime = Runtime::new().expect("the operating system gives threads");
    let ended = runtime.block_on(program);
    runtime.shutdown_background();
    ended.map_or_else(
        |error| {
            eprintln!("{}", in_one_line(&error.to_string()));
            error.exit_code()
        },
        |()| ExitCode::SUCCESS,
    )
}

/// Raises the limit of open files as far as this process is allowed to, and returns the limit. Each connection needs one file, and many
/// systems allow 1,024 by default.
#[must_use]
pub fn raise_open_files() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return u64::MAX };
    if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft }
}

/// The tasks of a process. Each runs until the process is told to stop. Without one of them, the process would break its promises but look
/// healthy; so if one fails or ends early, all are told to stop, and whoever started the process can start it anew.
#[derive(Clone, Debug)]
pub struct Tasks {
    running: TaskTracker,
    stop: CancellationToken,
    failure: Arc<Mutex<Option<ProcessError>>>,
}

impl Tasks {
    /// No tasks yet. `stop` tells all of them to end.
    #[must_use]
    pub fn new(stop: CancellationToken) -> Self {
        Self { running: TaskTracker::new(), stop, failure: Arc::default() }
    }

    /// Starts a task that does not fail.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.try_spawn(task.map(Ok));
    }

    /// Starts a task that may fail.
    pub fn try_spawn(&self, task: impl Future<Output = Result<(), ProcessError>> + Send + 'static) {
        let all = self.clone();
        self.running.spawn(async move {
            match AssertUnwindSafe(task).catch_unwind().await {
                Ok(Ok(())) if all.stop.is_cancelled() => {}
                Ok(Err(error)) => all.fail(error),
                Ok(Ok(())) | Err(_) => {
                    tracing::error!("a task ended unexpectedly: stopping");
                    all.fail(ProcessError::EndedEarly);
                }
            }
        });
    }

    /// Tells all tasks to stop, because of `error`. The first error is the one that counts.
    pub fn fail(&self, error: ProcessError) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.stop.cancel();
    }

    /// Waits for all tasks to end.
    ///
    /// # Errors
    /// The first failure, if there was one.
    pub async fn ended(&self) -> Result<(), ProcessError> {
        self.running.close();
        self.running.wait().await;
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }
}

/// Exit code of a process that was told twice to stop.
const IMPATIENT: i32 = 130;

/// Two signals within this time count as one: some programs signal a process and then its whole group.
const AT_ONCE: Duration = Duration::from_millis(10);

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
        // Not whether the token is cancelled: the process may have stopped by itself.
        let mut told: Option<Instant> = None;
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            match told {
                None => {
                    told = Some(Instant::now());
                    tracing::info!("stopping: finishing what is in flight");
                    asked.cancel();
                }
                Some(first) if first.elapsed() < AT_ONCE => {}
                Some(_) => {
                    tracing::warn!("told to stop a second time: ending at once");
                    std::process::exit(IMPATIENT);
                }
            }
        }
    });
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_process_waits_for_nothing_that_cannot_be_cut_short() {
        let (began, long) = (Instant::now(), Duration::from_secs(20));
        run(async {
            tokio::task::spawn_blocking(move || std::thread::sleep(long));
            Ok(())
        });
        assert!(began.elapsed() < long / 2);
    }

    #[tokio::test]
    async fn a_task_that_panics_stops_the_others_and_is_an_error() {
        let stop = CancellationToken::new();
        let tasks = Tasks::new(stop.clone());
        tasks.spawn(stop.clone().cancelled_owned());
        tasks.spawn(async { panic!("as a bug would") });
        assert!(matches!(tasks.ended().await, Err(ProcessError::EndedEarly)));
        assert!(stop.is_cancelled());
    }

    #[tokio::test]
    async fn the_first_task_that_fails_stops_the_others_and_its_error_is_the_one_of_the_process() {
        let stop = CancellationToken::new();
        let tasks = Tasks::new(stop.clone());
        let told = stop.clone();
        tasks.try_spawn(async move {
            told.cancelled().await;
            Err(ProcessError::Settings("second".to_owned()))
        });
        tasks.try_spawn(async { Err(ProcessError::Settings("first".to_owned())) });
        assert_eq!(tasks.ended().await.unwrap_err().to_string(), "first");
    }

    #[tokio::test]
    async fn tasks_that_end_when_they_are_told_to_are_no_error() {
        let stop = CancellationToken::new();
        let tasks = Tasks::new(stop.clone());
        tasks.spawn(stop.clone().cancelled_owned());
        stop.cancel();
        assert!(tasks.ended().await.is_ok());
    }

    #[test]
    fn as_many_files_may_be_open_as_the_system_allows() {
        let allowed = raise_open_files();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (allowed, allowed));
    }
}
