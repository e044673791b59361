//! Webhook jobs.
//!
//! - `guard` is the resolver of the HTTP client: it returns no address that must not be connected to;
//! - `sender` makes the call and returns the answer;
//! - `outcome` decides what the answer means;
//! - `seats` divides the calls of this process among receivers;
//! - `walk` leads each claim from where the last one stopped around all receivers;
//! - `queue` combines them into the attempt between a claim and a finish.

pub(crate) mod guard;
pub(crate) mod outcome;
pub(crate) mod queue;
pub(crate) mod seats;
pub(crate) mod sender;
pub(crate) mod walk;
