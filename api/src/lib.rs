//! The HTTP service: accepts a message, stores it, waits for its signature for up to the promised time, and answers.
//!
//! | module | what |
//! |---|---|
//! | [`settings`] | the settings and the commands |
//! | [`run`] | builds the service and runs it until it is stopped |
//! | [`keys`] | `api keys …`: the commands that manage API keys |
//! | [`http`] | routes, bodies, headers, problems |
//! | `server` | accepts connections, and keeps little memory for those whose caller waits |
//! | `accept` | stores batches of requests: new ones, and those that may be known |
//! | `answers` | stores a request and waits for its outcome |
//! | `waiters` | registers which callers wait for which message |
//! | `forecasts` | a cached snapshot of the queue, for positions and estimates |

mod accept;
mod answers;
mod forecasts;
pub mod http;
pub mod keys;
pub mod run;
mod server;
pub mod settings;
mod waiters;
