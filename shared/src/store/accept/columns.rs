//! A batch of requests as columns, as `unnest` takes them.

use uuid::Uuid;

use super::NewRequest;
use crate::encryption::{Keyring, SealedFor};

/// One element per request, in order.
#[derive(Default)]
pub(super) struct Columns<'a> {
    pub(super) ids: Vec<Uuid>,
    pub(super) keys: Vec<Uuid>,
    pub(super) digests: Vec<Uuid>,
    pub(super) bodies: Vec<&'a [u8]>,
    pub(super) client_ids: Vec<Option<&'a str>>,
    pub(super) payloads: Vec<[u8; 32]>,
    pub(super) urls: Vec<Option<&'a str>>,
    pub(super) headers: Vec<Option<serde_json::Value>>,
    pub(super) traceparents: Vec<Option<&'a str>>,
    pub(super) sealed: Vec<Option<Vec<u8>>>,
    pub(super) sealed_with: Vec<Option<String>>,
    /// For each payload digest by a key after the first, the number of its request, counted from 1.
    pub(super) older_of: Vec<i64>,
    pub(super) older_payloads: Vec<[u8; 32]>,
}

impl<'a> Columns<'a> {
    pub(super) fn of(requests: impl IntoIterator<Item = &'a NewRequest>, keyring: &Keyring) -> Self {
        let mut columns = Self::default();
        for (request, ord) in requests.into_iter().zip(1..) {
            columns.ids.push(request.id);
            columns.keys.push(request.key.0);
            columns.digests.push(request.message.digest().short());
            columns.bodies.push(request.message.text().as_bytes());
            columns.client_ids.push(request.client_request_id.as_deref());
            let mut payloads = request.payload_digests(keyring).into_iter();
            columns.payloads.extend(payloads.next());
            for older in payloads {
                columns.older_of.push(ord);
                columns.older_payloads.push(older);
            }
            columns.urls.push(request.webhook.as_ref().map(|webhook| webhook.url.as_str()));
            let headers = stored_headers(request, keyring);
            columns.headers.push(headers.plain);
            columns.sealed.push(headers.sealed);
            columns.sealed_with.push(headers.sealed_with);
            columns.traceparents.push(request.traceparent.as_deref());
        }
        columns
    }
}

/// Headers as they are stored: plain, or encrypted with a key.
#[derive(Default)]
struct StoredHeaders {
    plain: Option<serde_json::Value>,
    sealed: Option<Vec<u8>>,
    sealed_with: Option<String>,
}

fn stored_headers(request: &NewRequest, keyring: &Keyring) -> StoredHeaders {
    let Some(headers) = request.webhook.as_ref().map(|webhook| serde_json::json!(webhook.headers.expose())) else {
        return StoredHeaders::default();
    };
    if keyring.first().is_none() || headers.as_object().is_none_or(serde_json::Map::is_empty) {
        return StoredHeaders { plain: Some(headers), ..StoredHeaders::default() };
    }
    let stored = keyring.seal(SealedFor::WebhookHeaders(request.id), headers.to_string().as_bytes());
    StoredHeaders { plain: None, sealed: Some(stored.bytes), sealed_with: stored.key_id }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::message::{Message, digest_of_parts};
    use crate::secret::Secret;
    use crate::store::accept::WebhookTarget;
    use crate::store::keys::KeyId;

    #[test]
    fn the_payload_digest_covers_the_address_as_it_was_posted_and_what_is_stored_is_the_parsed_one() {
        let posted = "HTTP:Example.com:80/%7Ea";
        let webhook = WebhookTarget::new(posted.to_owned(), &posted.parse().unwrap(), Secret::new(BTreeMap::new()));
        let request = NewRequest {
            id: Uuid::nil(),
            key: KeyId(Uuid::nil()),
            message: Message::new("m".to_owned()),
            webhook: Some(webhook),
            client_request_id: None,
            traceparent: None,
        };
        let columns = Columns::of([&request], &Keyring::default());
        let stored_before = digest_of_parts(&[Message::new("m".to_owned()).digest().as_bytes(), posted.as_bytes()]);
        assert_eq!(columns.payloads, [stored_before]);
        assert_eq!(columns.urls, [Some("http://example.com/%7Ea")]);
    }
}
