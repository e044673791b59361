//! The worker: claims jobs from Postgres, calls the upstream and the receivers, and writes the outcomes.
//!
//! | module | what |
//! |---|---|
//! | `settings` | the settings |
//! | `run` | builds everything and runs it until it is told to stop |
//! | `driver` | the loop for any kind of job: claim, work, finish |
//! | `finisher` | writes outcomes in batches, and keeps trying while Postgres is unavailable |
//! | `listener` | the listener for operators |
//! | `maintenance` | ends what has waited for too long, deletes what is old |
//! | `no_answer` | why a call of either side brought no answer |
//! | `retry_after` | a header that both sides send |
//! | `sign` | sign jobs: the upstream's client, the table of outcomes, the decision about what happens next |
//! | `webhook` | webhook jobs: the address guard, the delivery, the schedule |
//!
//! What is public is used by the program, its tests and its benchmark.

pub mod driver;
pub mod finisher;
mod listener;
mod maintenance;
mod no_answer;
mod retry_after;
pub mod run;
pub mod settings;
pub mod sign;
mod webhook;
