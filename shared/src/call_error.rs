//! What can go wrong in a call to the upstream or to a receiver.

/// Why a call did not succeed, or could not be made. Callers see the [codes](Self::code) in `lastError` and in the log of deliveries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallError {
    /// The status of the answer is not one of success.
    Status,
    /// No answer in time.
    Timeout,
    /// No connection.
    Connection,
    /// No secure connection: the certificate is not trusted, or the two sides do not agree on one.
    Tls,
    /// The connection broke, or what came is not HTTP.
    Reset,
    /// The body did not come completely, or is not what it should be.
    Body,
    /// The receiver has a forbidden address.
    Address,
    /// The webhook's secrets or headers can't be decrypted.
    Unreadable,
}

impl CallError {
    /// The stable code.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Timeout => "timeout",
            Self::Connection => "connection",
            Self::Tls => "tls",
            Self::Reset => "reset",
            Self::Body => "body",
            Self::Address => "address",
            Self::Unreadable => "unreadable",
        }
    }
}
