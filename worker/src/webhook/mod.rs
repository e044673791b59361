//! Webhook jobs.
//!
//! - [`guard`] says which addresses may be connected to, and is the resolver of the client that sends;
//! - [`delivery`] makes the call and says what came back, and what that means;
//! - [`queue`] puts it between a claim and a finish.

pub mod delivery;
pub mod guard;
pub mod queue;
