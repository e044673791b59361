//! Which cryptography TLS uses.

/// Makes ring the provider of rustls in this process. Called before the first HTTP client is built; a second call changes nothing.
pub fn use_ring() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}
