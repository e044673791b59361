//! Tools for development and tests, never run in production. They use real servers, sockets and processes.
//!
//! - [`postgres`]: a private Postgres server, for tests and for the local stack;
//! - [`upstream`]: the unreliable signing API, simulated over real HTTP, with an audit of every call;
//! - [`receiver`]: a webhook receiver that verifies signatures with an independent library;
//! - [`ports`]: reserved ports for servers that start later; [`relay`]: a TCP relay that can go silent;
//! - [`processes`]: the real `api` and `worker` as child processes of a test;
//! - [`chaos`]: several of them under load, while faults are injected;
//! - `stack` (`up` and `down`), `demo`, `bench`, `prepare`, `simulate`: the commands of the same names, see [`cli`].
//!
//! Devkit depends on no other crate of the workspace, because `devkit prepare` generates the data that `shared` needs to compile.

/// Prints a line. Write errors are ignored, because the reader may be gone (`devkit up | head`).
macro_rules! say {
    ($($line:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($line)*);
    }};
}

// The retry delays, compiled from the same source as in `shared`, so that the simulation runs the production code.
#[path = "../../shared/src/backoff.rs"]
pub mod backoff;
mod bench;
pub mod chaos;
pub mod cli;
mod demo;
mod error;
mod hex;
mod http;
// The scheduling policy, compiled from the same source as in `shared`, so that the simulation runs the production code.
#[path = "../../shared/src/policy.rs"]
pub mod policy;
pub mod ports;
pub mod postgres;
mod prepare;
pub mod processes;
pub mod receiver;
pub mod relay;
mod report;
mod signals;
mod simulate;
mod stack;
// Durations and rates, compiled from the same source as in `shared`, so that a variable means the same everywhere.
#[path = "../../shared/src/units.rs"]
pub mod units;
pub mod upstream;
pub mod wait;
mod wire;
mod workspace;
