//! The cryptography provider for TLS, and its errors.

/// Why there is no secure connection: a certificate that is not trusted, is not valid any more or has another name, or two sides that
/// do not agree on one.
pub use rustls::Error as TlsError;

/// Makes ring the rustls provider of this process. Call it before the first HTTP client is built; a second call changes nothing.
pub fn use_ring() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}
