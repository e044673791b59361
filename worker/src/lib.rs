//! The worker: claims jobs from Postgres, calls the upstream and the receivers, and writes what came of it.
//!
//! | module | what |
//! |---|---|
//! | [`settings`] | what can be set |
//! | [`run`] | builds everything and runs it until it is told to stop |
//! | [`driver`] | claim, work, finish: the loop, for any kind of job |
//! | [`finisher`] | writes outcomes in groups, and keeps trying while Postgres is away |
//! | [`maintenance`] | ends what waited too long, deletes what is old |
//! | [`error`], [`retry_after`] | why it could not start; a header that both sides send |
//! | [`sign`] | sign jobs: the upstream's client, the table of outcomes, the decision what is next |
//! | [`webhook`] | webhook jobs: the address guard, the delivery, the schedule |

pub mod driver;
pub mod error;
pub mod finisher;
pub mod maintenance;
pub mod retry_after;
pub mod run;
pub mod settings;
pub mod sign;
pub mod webhook;
