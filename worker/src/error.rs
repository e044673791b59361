//! Why the worker could not start or continue, in one line each.

use std::net::SocketAddr;
use std::process::ExitCode;

use shared::process::EndedEarly;
use shared::store::StoreError;
use shared::telemetry::{self, display_chain};

/// Why the worker could not start or continue.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The settings do not fit together, or not with those of other workers.
    #[error("{0}")]
    Settings(String),
    /// The log or the exporter could not start.
    #[error(transparent)]
    Telemetry(#[from] telemetry::TelemetryError),
    /// An invalid database address, a schema that does not fit, or a missing encryption key.
    #[error("{}: {}", .0.variable(), display_chain(.0))]
    Store(#[from] StoreError),
    /// The HTTP client could not be created.
    #[error("can't set up an HTTP client: {0}")]
    Client(#[from] reqwest::Error),
    /// The listen address can't be bound.
    #[error("WORKER_LISTEN={0}: {1}")]
    Listen(SocketAddr, #[source] std::io::Error),
    /// The signal handlers can't be installed.
    #[error("can't listen to signals: {0}")]
    Signals(#[source] std::io::Error),
    /// A task panicked.
    #[error(transparent)]
    EndedEarly(#[from] EndedEarly),
}

impl StartError {
    /// The exit code of the process: 2 for a wrong setting, 1 otherwise.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Settings(_) | Self::Telemetry(_) => ExitCode::from(2),
            Self::Store(error) if error.is_a_wrong_setting() => ExitCode::from(2),
            _ => ExitCode::FAILURE,
        }
    }
}
