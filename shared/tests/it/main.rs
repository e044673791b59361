//! The store against a real Postgres: what must hold when two do it at once, when a lease runs out, when nobody comes back.
//!
//! Each test has its own database. Nothing sleeps to be right: where time must pass, the test moves the stored times instead.

#![expect(clippy::unwrap_used, reason = "a test that panics says where")]

mod accept;
mod connections;
mod encryption;
mod fixture;
mod listen;
mod plans;
mod policy;
mod retention;
mod sign;
mod slots;
mod upgrade;
mod upstream;
mod webhook;
