//! The real worker, in as many processes as needed, against a real Postgres and the simulated upstream. Requests are stored directly, as
//! `api` would do it.

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
