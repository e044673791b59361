//! Real signatures: RSA-2048, PKCS#1 v1.5 with SHA-256, in base64url without padding.

use std::sync::{Arc, OnceLock};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rsa::PrivateKey;
use rsa::sha2::Sha256;

/// Signs and verifies with one key.
#[derive(Clone, Debug)]
pub(super) struct Signer {
    key: Arc<PrivateKey>,
}

impl Signer {
    /// A signer with the key of this process. The key takes a while to generate, so all simulators in a test binary share one.
    pub(super) fn of_this_process() -> Self {
        static KEY: OnceLock<Arc<PrivateKey>> = OnceLock::new();
        let key = KEY.get_or_init(|| Arc::new(PrivateKey::new(&mut rand::rng(), 2048).expect("2048 bits are a valid size")));
        Self { key: Arc::clone(key) }
    }

    /// The signature of a message; always the same one.
    pub(super) fn sign(&self, message: &[u8]) -> String {
        let signature = self.key.pkcs1v15_sign::<Sha256>(message).expect("a valid key signs any message");
        URL_SAFE_NO_PAD.encode(signature)
    }

    /// Returns whether this is the signature of the message.
    pub(super) fn verify(&self, message: &[u8], signature: &[u8]) -> bool {
        URL_SAFE_NO_PAD
            .decode(signature)
            .is_ok_and(|signature| self.key.as_public_key().pkcs1v15_verify::<Sha256>(message, &signature).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_verifies_for_its_message_only() {
        let signer = Signer::of_this_process();
        let signature = signer.sign(b"hello");
        assert_eq!(signature, signer.sign(b"hello"));
        assert!(signer.verify(b"hello", signature.as_bytes()));
        assert!(!signer.verify(b"hello ", signature.as_bytes()));
        assert!(!signer.verify(b"hello", b"not base64!"));
    }
}
