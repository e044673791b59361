//! Sign jobs.
//!
//! - `upstream` makes the call and returns the reply, without judging it;
//! - `outcome` is the table of what a reply means, and the decision about what happens next; both are pure;
//! - `claims` claims jobs, and skips what is already leased or done;
//! - `calls` limits how many jobs are leased for how many concurrent calls;
//! - `queue` combines them into the attempt between a claim and a finish;
//! - `membership` makes sure that all workers call with one rate.

pub(crate) mod calls;
pub mod claims;
pub(crate) mod membership;
pub(crate) mod outcome;
pub(crate) mod queue;
pub(crate) mod upstream;
