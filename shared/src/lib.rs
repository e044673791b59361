//! What `api` and `worker` have in common.
//!
//! - what is said: [`contract`] (bodies of answers and webhooks), [`message`], [`standard_webhooks`];
//! - what is kept: [`store`] (every statement of SQL, and the only place that names sqlx), [`encryption`] (of what is secret in it);
//! - what is decided: [`backoff`] (when a message is tried again), [`policy`] (which message is tried next), [`address_guard`] (where
//!   webhooks may go);
//! - how a process runs: [`settings`], [`units`], [`secret`], [`telemetry`], [`operations`] (health and metrics), [`tls`], [`process`],
//!   [`batch`] (group commit).

pub mod address_guard;
pub mod backoff;
pub mod batch;
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
