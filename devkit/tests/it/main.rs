//! Integration tests of devkit: a Postgres that is killed, sockets that are reset, processes that come and go.

#![expect(clippy::unwrap_used, reason = "the helpers of tests may too")]

mod bench;
mod postgres;
mod processes;
mod receiver;
mod upstream;
