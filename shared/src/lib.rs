//! Code that `api` and `worker` share.
//!
//! - formats: [`contract`] (bodies of answers and webhooks), [`message`], [`standard_webhooks`], [`call_error`] (why a call failed);
//! - storage: [`store`] (all SQL statements, and the only module that uses sqlx), [`encryption`] (of the secrets in it);
//! - decisions: [`backoff`] (when a message is tried again), [`policy`] (which message is tried next), [`forecast`] (when a message will be
//!   signed), [`address_guard`] (where webhooks may go);
//! - running a process: [`settings`], [`units`], [`secret`], [`telemetry`], [`operations`] (health and metrics), [`tls`], [`process`],
//!   [`batch`] (group commit).

pub mod address_guard;
pub mod backoff;
pub mod batch;
pub mod call_error;
pub mod contract;
pub mod encryption;
pub mod forecast;
pub mod message;
pub mod operations;
pub mod policy;
pub mod process;
pub mod secret;
pub mod settings;
pub mod standard_webhooks;
pub mod store;
pub mod telemetry;
pub mod tls;
pub mod units;
