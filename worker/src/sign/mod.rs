//! Sign jobs.
//!
//! - [`upstream`] makes the call and says what came back, without judging;
//! - [`outcome`] is the table that says what a reply means, and the decision what is next: pure, both;
//! - [`claims`] takes jobs without looking at what is taken;
//! - [`calls`] says how many jobs are leased for how many calls at a time;
//! - [`queue`] puts them between a claim and a finish;
//! - [`membership`] makes sure that all workers call with one rate.

pub mod calls;
pub mod claims;
pub mod membership;
pub mod outcome;
pub mod queue;
pub mod upstream;
