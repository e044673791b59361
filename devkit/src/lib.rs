//! What developers need and users never run in production. Everything here is the real thing, only close at hand.
//!
//! - [`postgres`]: a private Postgres server, for tests and for the local stack;
//! - [`upstream`]: the unreliable signing API, simulated over real HTTP, with an audit of every call;
//! - [`receiver`]: a receiver of webhooks that verifies with an independent library;
//! - [`ports`]: ports for servers to come; [`relay`]: a connection that falls silent;
//! - [`processes`]: the real `api` and `worker` as child processes of a test;
//! - [`chaos`]: several of them under load, while whatever can break does;
//! - `stack`, `demo`, `bench`, `prepare`, `simulate`: behind the commands of the same names, see [`cli`].
//!
//! Devkit depends on no other crate of the workspace: `devkit prepare` makes the data without which `shared` does not compile.

/// Prints a line. Whoever reads it may be gone (`devkit up | head`), which is no reason to fail.
macro_rules! say {
    ($($line:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($line)*);
    }};
}

/// Delays between tries, by the same source as in `shared`, so that the simulation runs what production runs.
#[path = "../../shared/src/backoff.rs"]
pub mod backoff;
mod bench;
pub mod chaos;
pub mod cli;
mod demo;
mod error;
mod hex;
mod http;
/// What to try next, by the same source as in `shared`, so that the simulation runs what production runs.
#[path = "../../shared/src/policy.rs"]
pub mod policy;
pub mod ports;
pub mod postgres;
mod prepare;
pub mod processes;
pub mod receiver;
pub mod relay;
mod signals;
mod simulate;
mod stack;
/// Durations and rates, by the same source as in `shared`, so that one variable means one thing everywhere.
#[path = "../../shared/src/units.rs"]
pub mod units;
pub mod upstream;
pub mod wait;
mod wire;
mod workspace;

pub use error::{Error, Result};
