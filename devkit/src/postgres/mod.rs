//! Postgres without an installation step: a private server per test process, per benchmark, per local stack.
//!
//! - `binaries` finds the programs, `account` the user to run them as, `data` makes the files, `options` the settings;
//! - `cluster` is a running server that a process owns: [`Cluster`]; `guardian` makes sure that it ends with its owner;
//! - `bouncer` is a proxy in front of it, as many have in production: [`Bouncer`];
//! - `admin` creates and drops databases; `detached` is a server that outlives the command that started it: [`Detached`].
//!
//! Every server listens on 127.0.0.1 only and trusts whoever connects: fit for development, and for nothing else.
//! Tests call [`shared_cluster`] and make a database each.

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

pub use binaries::Binaries;
pub use bouncer::Bouncer;
pub use cluster::{Cluster, StopMode};
pub use detached::Detached;
pub use options::{ClusterOptions, Durability};

use crate::error::Result;

/// The one cluster of this process, started by the first caller, with [`ClusterOptions::default`].
///
/// It ends with the process: the guardian sees to that, because nothing drops a static.
///
/// # Errors
/// When no server can be started; the next caller tries again.
pub async fn shared_cluster() -> Result<&'static Cluster> {
    static SHARED: tokio::sync::OnceCell<Cluster> = tokio::sync::OnceCell::const_new();
    SHARED.get_or_try_init(|| Cluster::start(ClusterOptions::default())).await
}
