//! The whole service over real HTTP: the real `api` and `worker`, a real Postgres, the simulated upstream, a receiver that verifies.

#![expect(clippy::unwrap_used, reason = "a test that panics says where")]

mod burst;
mod callers;
mod contract;
mod keys;
mod outages;
mod postgres;
mod readme;
mod settings;
#[cfg(target_os = "linux")]
mod tls;
mod trace;
mod world;
