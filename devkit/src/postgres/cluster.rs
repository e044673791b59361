//! A server that this process owns: it can be stopped and started again, and it ends with its owner.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow};

use super::ClusterOptions;
use super::data::Files;
use super::guardian::{Charge, Guardian};
use crate::ports::free_port;

/// How to stop a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// Rolls back open transactions, ends connections, and writes everything to disk.
    Fast,
    /// Drops everything at once, as in a crash; the next start recovers from the write-ahead log.
    Immediate,
}

impl StopMode {
    fn word(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Immediate => "immediate",
        }
    }
}

/// How long a server may take until it accepts connections, including recovery after a crash.
const START_BOUND: Duration = Duration::from_mins(1);
/// How often the status file of the server is read while it starts.
const POLL: Duration = Duration::from_millis(5);

/// A running Postgres server. Dropping it stops the server, and removes the files if they are temporary.
#[derive(Debug)]
pub struct Cluster {
    port: u16,
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    files: Files,
    options: ClusterOptions,
    /// `None` only after a guardian failed to start.
    guardian: Mutex<Option<Guardian>>,
}

impl Cluster {
    /// Creates the files if needed, starts the server, and waits until it accepts connections.
    ///
    /// # Errors
    /// If there are no server binaries, the files cannot be created, or the server does not start; the error includes its last lines of
    /// log.
    pub async fn start(options: ClusterOptions) -> Result<Self> {
        blocking(move || Self::start_blocking(options)).await
    }

    fn start_blocking(options: ClusterOptions) -> Result<Self> {
        let files = Files::prepare(&options)?;
        let inner = Inner { files, options, guardian: Mutex::new(None) };
        let port = match inner.options.port {
            Some(port) => port,
            None => free_port().inspect_err(|_| inner.files.remove_temporary())?,
        };
        match inner.start(port) {
            Ok(()) => Ok(Self { port, inner: Arc::new(inner) }),
            Err(Failure::PortTaken) => Err(anyhow!("port {port} of 127.0.0.1 is taken")),
            Err(Failure::Other(error)) => Err(error),
        }
    }

    /// The URL of a database, as the superuser.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// The port on 127.0.0.1. It stays the same after a restart.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The process ID of the server; `None` if it is not running.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.inner.lock().as_ref().filter(|guardian| !guardian.exited()).and_then(Guardian::server)
    }

    /// The folder with the data and the log.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.inner.files.folder.clone()
    }

    /// A note for the developer; `None` if the data is in the requested folder.
    #[must_use]
    pub fn note(&self) -> Option<&str> {
        self.inner.files.note.as_deref()
    }

    /// Stops the server and keeps its files. Does nothing if it is already stopped.
    ///
    /// # Errors
    /// Only if the blocking task cannot run.
    pub async fn stop(&self, mode: StopMode) -> Result<()> {
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            if let Some(guardian) = inner.lock().as_mut().filter(|guardian| !guardian.exited()) {
                guardian.stop(mode.word());
            }
            Ok(())
        })
        .await
    }

    /// Starts a stopped server again, on the same port and files. Does nothing if it is running.
    ///
    /// # Errors
    /// If the port was taken in the meantime, or the server does not start.
    pub async fn start_again(&self) -> Result<()> {
        let (inner, port) = (Arc::clone(&self.inner), self.port);
        blocking(move || {
            inner.start(port).map_err(|failure| match failure {
                Failure::PortTaken => anyhow!("port {port} of 127.0.0.1 is taken"),
                Failure::Other(error) => error,
            })
        })
        .await
    }
}

enum Failure {
    PortTaken,
    Other(Error),
}

impl Inner {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Guardian>> {
        self.guardian.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the server unless it is running. The guardian of the previous run stays responsible for the files until the new one takes
    /// over.
    fn start(&self, port: u16) -> Result<(), Failure> {
        let mut current = self.lock();
        if current.as_ref().is_some_and(|guardian| !guardian.exited()) {
            return Ok(());
        }
        let files = &self.files;
        let account = files.account.as_ref();
        self.options.write(&files.data(), port, account).map_err(Failure::Other)?;
        let log_before = files.log().metadata().map_or(0, |meta| meta.len());
        let guardian = Guardian::start(Charge {
            program: &files.binaries.program("postgres"),
            data: &files.data(),
            log: &files.log(),
            remove: files.temporary.then_some(files.folder.as_path()),
            account,
        })
        .map_err(Failure::Other)?;
        if let Some(before) = current.replace(guardian) {
            before.release();
        }
        let guardian = current.as_ref().expect("it was just put there");
        let deadline = Instant::now() + START_BOUND;
        loop {
            if guardian.exited() {
                let log = std::fs::read(files.log()).unwrap_or_default();
                let since = log.get(usize::try_from(log_before).unwrap_or(usize::MAX)..).unwrap_or_default();
                return Err(if String::from_utf8_lossy(since).contains("could not bind") {
                    Failure::PortTaken
                } else {
                    Failure::Other(anyhow!("Postgres did not start: {}", files.log_tail()))
                });
            }
            if files.status().is_some_and(|status| status.ready && Some(status.server) == guardian.server()) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Failure::Other(anyhow!("Postgres did not get ready in time: {}", files.log_tail())));
            }
            std::thread::sleep(POLL);
        }
    }
}

/// Runs blocking work outside of the runtime's worker threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.context("work for Postgres was abandoned")?
}
