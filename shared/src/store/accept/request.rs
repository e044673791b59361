//! A POST, checked and ready to be stored.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::encryption::Keyring;
use crate::message::{Message, digest_of_parts};
use crate::secret::Secret;
use crate::store::keys::KeyId;

/// A request as posted, checked and ready to be stored.
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// Its identity, should it be new.
    pub id: Uuid,
    /// Who posts it.
    pub key: KeyId,
    /// What is to be signed.
    pub message: Message,
    /// Where the outcome is sent.
    pub webhook: Option<WebhookTarget>,
    /// The caller's idempotency key.
    pub client_request_id: Option<String>,
    /// The caller's trace.
    pub traceparent: Option<String>,
}

/// Where a webhook goes.
#[derive(Clone, Debug)]
pub struct WebhookTarget {
    pub(super) url: String,
    posted: String,
    pub(super) headers: Secret<BTreeMap<String, String>>,
}

impl WebhookTarget {
    /// A target at the address `url`, that was `posted` as this text, with headers that the caller wants sent along; they may hold the
    /// receiver's credentials.
    ///
    /// What is stored is the parsed address: a text has many spellings, and a receiver would be another one in each of them. The posted
    /// text still tells a repeated request from another one, so that one from before a change of the parser stays the same.
    #[must_use]
    pub fn new(posted: String, url: &url::Url, headers: Secret<BTreeMap<String, String>>) -> Self {
        Self { url: url.as_str().to_owned(), posted, headers }
    }
}

impl NewRequest {
    /// Digests over what was asked for: the same for the same request, whatever the order of its headers. The first is the one to store; the
    /// others may be stored already, from before a key was added. Headers may hold credentials that are short enough to be tried out, so
    /// with them the digest is keyed; the message and the address lie beside it anyway.
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
