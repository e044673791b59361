//! A POST, checked and ready to be stored.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::encryption::Keyring;
use crate::message::{Message, digest_of_parts};
use crate::secret::Secret;
use crate::store::keys::KeyId;

/// A posted request, checked and ready to be stored.
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// Its id, if it is new.
    pub id: Uuid,
    /// The API key that posts it.
    pub key: KeyId,
    /// The message to sign.
    pub message: Message,
    /// Where to send the outcome.
    pub webhook: Option<WebhookTarget>,
    /// The caller's idempotency key.
    pub client_request_id: Option<String>,
    /// The caller's trace context.
    pub traceparent: Option<String>,
}

/// Where to send a webhook.
#[derive(Clone, Debug)]
pub struct WebhookTarget {
    pub(super) url: String,
    posted: String,
    pub(super) headers: Secret<BTreeMap<String, String>>,
}

impl WebhookTarget {
    /// Creates a target from the address `url`, the text that was `posted`, and the headers that the caller wants to be sent. The headers
    /// may hold the receiver's credentials.
    ///
    /// The parsed address is stored: one address has many spellings, and each would be a different receiver. The posted text still tells a
    /// repeated request from a different one, so a request from before a change of the parser stays the same.
    #[must_use]
    pub fn new(posted: String, url: &url::Url, headers: Secret<BTreeMap<String, String>>) -> Self {
        Self { url: url.as_str().to_owned(), posted, headers }
    }
}

impl NewRequest {
    /// Digests of what was asked for, independent of the order of its headers. The first is the one to store; the others may be stored
    /// already, from before a key was added. Headers may hold credentials that are short enough to be guessed, so with headers the digest
    /// is keyed. The message and the address are stored next to it anyway.
    pub(super) fn payload_digests(&self, keyring: &Keyring) -> Vec<[u8; 32]> {
        let digest = self.message.digest();
        let mut parts: Vec<&[u8]> = vec![digest.as_bytes()];
        if let Some(webhook) = &self.webhook {
            parts.push(webhook.posted.as_bytes());
            for (name, value) in webhook.headers.expose() {
                parts.extend([name.as_bytes(), value.as_bytes()]);
            }
        }
        let plain = digest_of_parts(&parts);
        let has_headers = self.webhook.as_ref().is_some_and(|webhook| !webhook.headers.expose().is_empty());
        if has_headers { keyring.digests(&plain) } else { vec![plain] }
    }
}
