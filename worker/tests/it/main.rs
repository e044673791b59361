//! The real worker, as many of them as it takes, against a real Postgres and the simulated upstream. Requests are stored directly, as
//! `api` would.

#![expect(clippy::unwrap_used, reason = "a test that panics says where")]

mod budget;
mod claims;
mod connections;
mod examples;
mod faults;
mod finisher;
mod hostile;
mod webhooks;
mod world;
