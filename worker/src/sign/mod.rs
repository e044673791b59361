//! Sign jobs.
//!
//! - [`upstream`] makes the call and says what came back, without judging;
//! - [`outcome`] is the table that says what a reply means, and the decision what is next: pure, both;
//! - [`queue`] puts them between a claim and a finish.

pub mod outcome;
pub mod queue;
pub mod upstream;
