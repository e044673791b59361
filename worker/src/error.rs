//! Why the worker could not start, or go on: one line each.

use std::net::SocketAddr;
use std::process::ExitCode;

use shared::store::StoreError;
use shared::telemetry::{self, display_chain};

/// Why the worker could not start, or go on.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Settings that do not fit together, or not to those of the other workers.
    #[error("{0}")]
    Settings(String),
    /// The log or the exporter.
    #[error(transparent)]
    Telemetry(#[from] telemetry::TelemetryError),
    /// An address that is no address, a schema that does not fit, or an encryption key that is missing.
    #[error("{}: {}", .0.variable(), display_chain(.0))]
    Store(#[from] StoreError),
    /// No client for HTTP.
    #[error("can't set up an HTTP client: {0}")]
    Client(#[from] reqwest::Error),
    /// The address is taken.
    #[error("WORKER_LISTEN={0}: {1}")]
    Listen(SocketAddr, #[source] std::io::Error),
    /// No signal handlers.
    #[error("can't listen to signals: {0}")]
    Signals(#[source] std::io::Error),
}

impl StartError {
    /// What the process answers to who started it: 2 for a wrong setting, else 1.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Settings(_) | Self::Telemetry(_) => ExitCode::from(2),
            Self::Store(error) if error.is_a_wrong_setting() => ExitCode::from(2),
            _ => ExitCode::FAILURE,
        }
    }
}
