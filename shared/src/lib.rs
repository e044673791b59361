//! What `api` and `worker` have in common.

pub mod units;
