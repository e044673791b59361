//! The cryptography provider for TLS.

/// Makes ring the rustls provider of this process. Call it before the first HTTP client is built; a second call changes nothing.
pub fn use_ring() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}
