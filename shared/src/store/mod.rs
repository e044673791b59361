//! Everything that is stored, and every SQL statement. The only module that names sqlx.
//!
//! | file | what |
//! |---|---|
//! | `database`, `session`, `transaction` | the connection to Postgres: hosts and pools; settings and proxies; several statements in one transaction |
//! | `accept` | a batch of POSTs becomes requests, messages and jobs |
//! | `pending` | the number of unfinished requests |
//! | `requests` | the state of requests, as callers see it |
//! | `forecast` | the queue, as far as a forecast needs it |
//! | `keys` | API keys |
//! | `lease` | who holds a job, and until when |
//! | `low_water` | where claims and forecasts start to scan |
//! | `server_time` | the clock of Postgres, as a process knows it |
//! | `sign_claim`, `sign_finish` | sign jobs: claimed with a slot of the budget, finished with an outcome |
//! | `sign_overdue` | sign jobs that are past their deadline |
//! | `webhook_claim`, `webhook_finish` | webhook jobs: claimed receiver by receiver, finished with an outcome |
//! | `receivers`, `lost_receivers` | receivers of webhooks, and the room for the jobs of each; those that are down for too long |
//! | `webhook_addresses` | where workers may send webhooks |
//! | `deliveries` | the delivery log, and replays |
//! | `encryption` | which encryption keys stored values need |
//! | `slots` | the slots of the budget, when the rate or the server changes |
//! | `upstream` | the agreed rate, the circuit breaker |
//! | `upstream_news` | what calls say about the upstream |
//! | `retention` | what is old enough to delete |
//! | `notify`, `listen` | notifications: sending, receiving |
//! | `schema` | migrations |
//!
//! Functions take and return slices: callers batch their work, and a batch is one transaction, or two if a part of it takes the longer
//! path. No transaction stays open while waiting for anything but Postgres. Times come from Postgres; Rust sends durations.

#![allow(clippy::too_many_lines, reason = "the lines of a statement of SQL count")]

pub mod accept;
mod database;
pub mod deliveries;
pub mod encryption;
mod forecast;
pub mod keys;
mod lease;
mod listen;
mod lost_receivers;
pub mod low_water;
mod notify;
mod pending;
pub mod receivers;
pub mod requests;
mod retention;
mod schema;
pub mod server_time;
mod session;
pub mod sign_claim;
pub mod sign_finish;
pub mod sign_overdue;
mod slots;
mod transaction;
pub mod upstream;
mod upstream_news;
mod webhook_addresses;
pub mod webhook_claim;
pub mod webhook_finish;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::database::Database;
use self::notify::Notifier;
use self::pending::Pending;
use crate::encryption::{EncryptionError, Keyring};
use crate::settings::DatabaseSettings;
use crate::telemetry::display_chain;

use lease::JobId;
pub use lease::{Claimed, Finished, JobKind, Lease};
pub use listen::{Audience, Hint};
pub use schema::PREPARE_WITHIN;

/// Why a store operation failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Postgres could not be reached, or not in time.
    #[error("Postgres is not available")]
    Unavailable(#[source] sqlx::Error),
    /// Other sessions held what the statement needed for too long, or the statement had too much to do.
    #[error("Postgres is contended")]
    Contended(#[source] sqlx::Error),
    /// Postgres did not answer in time: the operation may have been done.
    #[error("Postgres did not answer in time")]
    TimedOut,
    /// On every try, other callers stored requests under the same idempotency key.
    #[error("others use the same idempotency key again and again")]
    LostRaces,
    /// Postgres refused a statement: a bug in this program, or a schema that does not fit.
    #[error("Postgres refused a statement")]
    Refused(#[source] sqlx::Error),
    /// A stored value can't be read back: someone changed it by hand.
    #[error("a stored {0} is not what was written")]
    Corrupt(&'static str),
    /// A stored value can't be converted to the type that is read.
    #[error("a stored value is not what was written")]
    Undecodable(#[source] sqlx::Error),
    /// A stored secret can't be read with the configured keys.
    #[error(transparent)]
    Encryption(#[from] EncryptionError),
    /// No address is configured.
    #[error("not set; accepted: postgres://USER:PASSWORD@HOST:PORT/DATABASE")]
    NoAddress,
    /// The address can't be parsed.
    #[error("not understood; accepted: postgres://USER:PASSWORD@HOST:PORT/DATABASE")]
    Address(#[source] sqlx::Error),
    /// Postgres does not let this program in: the database does not exist, or the role may not log in.
    #[error("{0}; accepted: an existing database, and a role that may log in")]
    NotLetIn(String),
    /// The role may not do what this program does.
    #[error("{0}; accepted: a role that may create tables, or read and write them with MIGRATE_ON_START=false once `api migrate` has run")]
    NotAllowed(String),
    /// The database stores text in another encoding, which lacks most characters, or counts bytes.
    #[error("the encoding of the database is {0}; accepted: UTF8 (create database NAME encoding 'UTF8' template template0)")]
    Encoding(String),
    /// Not all migrations of this program have been applied.
    #[error("the schema of the database is out of date; run `api migrate`, or start with MIGRATE_ON_START=true")]
    SchemaBehind,
    /// The schema is not the one this program was built for.
    #[error("the schema of the database does not fit this program")]
    Schema(#[source] sqlx::migrate::MigrateError),
}

impl StoreError {
    /// The setting that may be wrong. `None` if no setting would help.
    #[must_use]
    pub fn variable(&self) -> Option<&'static str> {
        match self {
            Self::Encryption(_) => Some("ENCRYPTION_KEY"),
            Self::Unavailable(_) | Self::TimedOut => Some("DATABASE_URL"),
            _ => self.is_a_wrong_setting().then_some("DATABASE_URL"),
        }
    }

    /// Whether that setting is wrong, regardless of the state of Postgres.
    #[must_use]
    pub fn is_a_wrong_setting(&self) -> bool {
        matches!(
            self,
            Self::NoAddress | Self::Address(_) | Self::NotLetIn(_) | Self::NotAllowed(_) | Self::Encoding(_) | Self::Encryption(_)
        )
    }

    /// Whether one item of a batch may have failed the others: each may succeed on its own.
    #[must_use]
    pub fn may_be_of_one_item(&self) -> bool {
        matches!(self, Self::Refused(_) | Self::NotAllowed(_) | Self::Contended(_) | Self::LostRaces)
    }

    /// Whether a retry a moment later may succeed: the cause is the state of Postgres, or what other sessions do.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Contended(_) | Self::TimedOut | Self::LostRaces)
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(ref refused) => match refused.code().as_deref() {
                // Deadlock, serialization failure, lock timeout, statement timeout: a retry, or a smaller statement, may succeed.
                Some(code) if code.starts_with("40") || matches!(code, "55P03" | "57014") => Self::Contended(error),
                // Operator intervention, connection, resources, idle in a transaction, a standby server: the state of Postgres.
                Some(code) if ["57", "08", "53", "25"].iter().any(|class| code.starts_with(class)) => Self::Unavailable(error),
                // Invalid authorization, invalid catalog name.
                Some(code) if code.starts_with("28") || code == "3D000" => Self::NotLetIn(refused.message().to_owned()),
                // Insufficient privilege.
                Some("42501") => Self::NotAllowed(refused.message().to_owned()),
                _ => Self::Refused(error),
            },
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) => Self::Undecodable(error),
            _ => Self::Unavailable(error),
        }
    }
}

/// The delay between attempts while Postgres is not available.
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(500);

/// How long [`Store::close`] waits for background tasks.
const CLOSE_WITHIN: Duration = Duration::from_secs(3);

/// The result of a store operation.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// A handle to Postgres. Clones share the connections.
#[derive(Clone, Debug)]
pub struct Store {
    database: Database,
    listening: Arc<AtomicBool>,
    keyring: Keyring,
    pending: Pending,
    notifier: Notifier,
    /// Background tasks. They end by themselves.
    tasks: TaskTracker,
}

impl Store {
    /// Creates a store that connects on first use, so that a process starts, and reports that it isn't ready, while Postgres is down.
    ///
    /// # Errors
    /// If the address is missing, or Postgres's client can't parse it.
    pub fn connect_lazily(settings: &DatabaseSettings) -> Result<Self> {
        let url = settings.database_url.as_ref().ok_or(StoreError::NoAddress)?;
        let database = Database::connect_lazily(url.expose(), settings.database_max_connections).map_err(StoreError::Address)?;
        if settings.encryption_key.first().is_none() {
            tracing::warn!("ENCRYPTION_KEY is not set: webhook secrets and headers are stored unencrypted");
        }
        Ok(Self {
            database,
            listening: Arc::default(),
            keyring: settings.encryption_key.clone(),
            pending: Pending::default(),
            notifier: Notifier::default(),
            tasks: TaskTracker::new(),
        })
    }

    /// Closes every connection after pending notifications and running statements. Does not wait for a Postgres that hangs.
    pub async fn close(&self) {
        self.tasks.close();
        let _ = tokio::time::timeout(CLOSE_WITHIN, self.tasks.wait()).await;
        self.database.close().await;
    }

    /// Repeats `attempt` until it succeeds, while Postgres is not available or the schema is out of date. Cancelling `stop` counts as
    /// success. Logs one line when the waiting begins, and one when it ends.
    ///
    /// # Errors
    /// Those that waiting does not fix.
    pub async fn when_available(&self, stop: &CancellationToken, attempt: impl AsyncFn() -> Result<()>) -> Result<()> {
        let attempts = async {
            let mut waiting = false;
            loop {
                match attempt().await {
                    Err(error) if error.is_transient() || matches!(error, StoreError::SchemaBehind) => {
                        if !waiting {
                            tracing::warn!(error = display_chain(&error), "waiting for Postgres");
                        }
                        waiting = true;
                    }
                    Ok(()) => {
                        if waiting {
                            tracing::info!("Postgres is ready");
                        }
                        return Ok(());
                    }
                    Err(error) => return Err(error),
                }
                tokio::time::sleep(TRY_AGAIN_AFTER).await;
            }
        };
        stop.run_until_cancelled(attempts).await.unwrap_or(Ok(()))
    }
}

/// The result of `work`, if it comes within `limit`.
///
/// # Errors
/// Those of `work`, and [`StoreError::TimedOut`]: then it may have been done all the same.
pub async fn within<T>(limit: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(limit, work).await.unwrap_or(Err(StoreError::TimedOut))
}

/// The result of `work`, if it comes before `deadline`.
///
/// # Errors
/// As for [`within`].
pub async fn before<T>(deadline: Instant, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout_at(deadline, work).await.unwrap_or(Err(StoreError::TimedOut))
}

/// Seconds, as Postgres's `make_interval` takes them.
fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

/// Seconds, as Postgres's `extract(epoch …)` gives them, as a duration. The past is zero.
fn duration(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds.max(0.0)).ok()
}

/// The index of an item of a statement that was given `with ordinality`, which counts from 1.
fn place(ord: i64) -> Result<usize> {
    usize::try_from(ord - 1).map_err(|_| StoreError::Corrupt("place"))
}

/// A count that Postgres returned as a signed number.
fn count<N: TryInto<u32> + PartialOrd + Default>(number: N) -> u32 {
    if number < N::default() { 0 } else { number.try_into().unwrap_or(u32::MAX) }
}
