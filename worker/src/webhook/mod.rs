//! Webhook jobs.
//!
//! - [`guard`] is the resolver of the client that sends: it lets no address through that may not be connected to;
//! - [`sender`] makes the call and says what came back;
//! - [`outcome`] says what that means;
//! - [`seats`] shares the calls of this process out among receivers;
//! - [`queue`] puts it between a claim and a finish.

pub mod guard;
pub mod outcome;
pub mod queue;
pub mod seats;
pub mod sender;
