//! Postgres without an installation step: a private server per test process, per benchmark, per local stack.
//!
//! - `binaries` finds the programs, `account` the user to run them as, `data` makes the files, `options` the settings;
//! - `cluster` is a running server that a process owns ([`Cluster`]); `guardian` makes sure that the server ends with its owner;
//! - `bouncer` is a connection pooler in front of a server, as is common in production ([`Bouncer`]);
//! - `admin` creates and drops databases; `detached` is a server that outlives the command that started it ([`Detached`]).
//!
//! Every server listens on 127.0.0.1 only and trusts every client: it is for development only. Tests call [`shared_cluster`] and create a
//! database each.

mod account;
mod admin;
mod binaries;
mod bouncer;
mod cluster;
mod data;
mod detached;
mod guardian;
mod options;
pub(crate) mod serve;

use anyhow::Result;

pub use binaries::Binaries;
pub use bouncer::Bouncer;
pub use cluster::{Cluster, StopMode};
pub use detached::Detached;
pub use options::{ClusterOptions, Durability};

/// The shared cluster of this process, started by the first caller with [`ClusterOptions::default`].
///
/// The guardian stops it when the process ends, because nothing drops a static.
///
/// # Errors
/// If no server can be started; the next caller tries again.
pub async fn shared_cluster() -> Result<&'static Cluster> {
    static SHARED: tokio::sync::OnceCell<Cluster> = tokio::sync::OnceCell::const_new();
    SHARED.get_or_try_init(|| Cluster::start(ClusterOptions::default())).await
}
