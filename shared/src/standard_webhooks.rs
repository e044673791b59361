//! Signs outgoing webhooks according to the Standard Webhooks specification 1.0.0
//! (<https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>).

use std::str::FromStr;

use base64::{Engine, engine::general_purpose::STANDARD};
use ring::hmac;

use crate::secret::{Secret, random_bytes};

const PREFIX: &str = "whsec_";

/// A receiver's secret: 24 to 64 bytes, written as `whsec_` followed by their base64.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebhookSecret(Secret<Vec<u8>>);

impl WebhookSecret {
    /// What [`FromStr`] and [`WebhookSecret::from_bytes`] accept.
    pub const ACCEPTED: &'static str = "accepted: whsec_ followed by the base64 of 24 to 64 bytes";

    /// Takes the decoded bytes of a secret.
    ///
    /// # Errors
    /// A sentence that says what is accepted.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, String> {
        if (24..=64).contains(&bytes.len()) { Ok(Self(Secret::new(bytes))) } else { Err(Self::ACCEPTED.to_owned()) }
    }

    /// A new secret of 32 random bytes.
    ///
    /// # Panics
    /// If the operating system can't provide random bytes.
    #[must_use]
    pub fn generate() -> Self {
        Self(Secret::new(random_bytes::<32>().to_vec()))
    }

    /// The decoded bytes, for the store.
    #[must_use]
    pub fn expose_bytes(&self) -> &[u8] {
        self.0.expose()
    }

    /// The `whsec_…` form, to show to the owner once.
    #[must_use]
    pub fn expose_text(&self) -> String {
        format!("{PREFIX}{}", STANDARD.encode(self.0.expose()))
    }

    /// One `v1,…` signature over `id.timestamp.body`; `timestamp` is in seconds since the Unix epoch.
    #[must_use]
    pub fn sign(&self, id: &str, timestamp: i64, body: &[u8]) -> String {
        let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, self.0.expose()));
        context.update(format!("{id}.{timestamp}.").as_bytes());
        context.update(body);
        format!("v1,{}", STANDARD.encode(context.sign()))
    }
}

impl FromStr for WebhookSecret {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let encoded = text.trim().strip_prefix(PREFIX).ok_or(Self::ACCEPTED)?;
        Self::from_bytes(STANDARD.decode(encoded).map_err(|_| Self::ACCEPTED)?)
    }
}

/// The value of the `webhook-signature` header: one signature per secret, space-separated, so that receivers can rotate.
#[must_use]
pub fn signature_header(secrets: &[WebhookSecret], id: &str, timestamp: i64, body: &[u8]) -> String {
    secrets.iter().map(|secret| secret.sign(id, timestamp, body)).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_golden_vector_of_the_specification_holds() {
        let secret: WebhookSecret = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD".parse().unwrap();
        let body = br#"{"email":"test@example.com","username":"test_user"}"#;
        assert_eq!(secret.sign("msg_27UH4WbU6Z5A5EzD8u03UvzRbpk", 1_649_367_553, body), "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw=");
    }

    #[test]
    fn an_independent_verifier_accepts_each_signature_while_a_secret_is_rotated() {
        let (old, new) = (WebhookSecret::generate(), WebhookSecret::generate());
        let now = time::OffsetDateTime::now_utc().unix_timestamp();
        let header = signature_header(&[new.clone(), old.clone()], "msg_1", now, b"{}");
        let mut headers = http::HeaderMap::new();
        headers.insert("webhook-id", "msg_1".parse().unwrap());
        headers.insert("webhook-timestamp", now.into());
        headers.insert("webhook-signature", header.parse().unwrap());
        for secret in [old, new] {
            let verifier = standardwebhooks::Webhook::new(&secret.expose_text()).unwrap();
            verifier.verify(b"{}", &headers).unwrap();
            assert!(verifier.verify(b"{ }", &headers).is_err());
        }
    }

    #[test]
    fn a_secret_that_is_no_secret_is_refused_with_what_is_accepted() {
        for text in ["", "whsec_", "whsec_short", "C2FVsBQIhrscChlQIMV+b5sSYspob7oD", "whsec_!!!!"] {
            assert_eq!(text.parse::<WebhookSecret>().unwrap_err(), WebhookSecret::ACCEPTED, "{text}");
        }
    }

    #[test]
    fn a_secret_survives_the_trip_through_text() {
        let secret = WebhookSecret::generate();
        assert_eq!(secret.expose_text().parse(), Ok(secret));
    }
}
