//! Why a call over HTTP brought no answer, by the causes of its error.

use std::error::Error;
use std::io;

use shared::call_error::CallError;
use shared::telemetry::display_chain;
use shared::tls::TlsError;

/// Why there was no connection.
pub fn not_connected(error: &reqwest::Error) -> CallError {
    if is_caused_by::<TlsError>(error) { CallError::Tls } else { CallError::Connection }
}

/// Whether a `T` is among the causes of `error`.
pub fn is_caused_by<T: Error + 'static>(error: &reqwest::Error) -> bool {
    let mut cause = error.source();
    while let Some(error) = cause {
        if error.is::<T>() {
            return true;
        }
        // What an I/O error contains is not its source.
        let contained = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        cause = contained.map_or_else(|| error.source(), |error| Some(error));
    }
    false
}

/// `error` and its causes in one line for the log. It may name the host, but not the path and the query, which may be confidential.
pub fn in_one_line(error: reqwest::Error) -> String {
    display_chain(&error.without_url())
}
