//! The error type of devkit: a sentence for the user of a command, and its cause.
//!
//! No code branches on the kind of an error: a developer reads it, or a test fails with it. So there is a single type, which keeps its
//! sources and prints them on one line, instead of an enum per module.

use std::error::Error as StdError;
use std::fmt;

/// What went wrong, with its cause.
pub struct Error {
    what: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// A result with the error type [`Error`], unless another one is given.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Creates an error without a cause.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), source: None }
    }

    /// The sentence and all its causes, on one line.
    #[must_use]
    pub fn line(&self) -> String {
        let mut line = self.what.clone();
        let mut cause = self.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !line.contains(&text) {
                line.push_str(": ");
                line.push_str(&text);
            }
            cause = error.source();
        }
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

/// Prints the whole line, because `unwrap` in a test prints the debug form.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// Adds context to an error: what was being done.
pub(crate) trait Context<T> {
    /// Adds what was being done, in words that make sense before a colon.
    ///
    /// # Errors
    /// The original error, wrapped in one with this sentence.
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: StdError + Send + Sync + 'static> Context<T> for std::result::Result<T, E> {
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|error| Error { what: what().into(), source: Some(Box::new(error)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_that_ends_in_its_cause() {
        let result: std::result::Result<(), _> = Err(std::io::Error::other("disk\nfull"));
        let error = result.context(|| "writing the state").context(|| "starting").unwrap_err();
        assert_eq!(error.line(), "starting: writing the state: disk full");
        assert_eq!(format!("{error:?}"), error.line());
        assert_eq!(error.to_string(), "starting");
    }
}
