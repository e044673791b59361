//! The store against a real Postgres: what must hold for concurrent calls, expired leases, and processes that do not come back.
//!
//! Each test has its own database. No test relies on sleeping: where time must pass, the test moves the stored times instead.

#![expect(clippy::unwrap_used, reason = "a test that panics says where")]

mod accept;
mod breaker;
mod connections;
mod databases;
mod encryption;
mod fixture;
mod listen;
mod pending;
mod plans;
mod policy;
mod retention;
mod sign;
mod slots;
mod upgrade;
mod upstream;
mod webhook;
