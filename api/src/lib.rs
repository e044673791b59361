//! The HTTP service: takes a message, stores it, waits for its signature for as long as the caller was promised, and answers.
//!
//! | module | what |
//! |---|---|
//! | [`settings`] | what can be set, and the commands |
//! | [`run`] | builds the service and runs it until it is told to stop |
//! | [`keys`] | `api keys …`: what operators do with API keys |
//! | [`http`] | routes, bodies, headers, problems |
//! | `server` | accepts connections, and keeps next to nothing of those whose caller waits |
//! | `accept` | stores a group of requests |
//! | `answers` | has a request stored and waits for its outcome |
//! | `waiters` | who waits for which message |
//! | `queue` | the last look at the queue, for places and estimates |

mod accept;
mod answers;
pub mod http;
pub mod keys;
mod queue;
pub mod run;
mod server;
pub mod settings;
mod waiters;
