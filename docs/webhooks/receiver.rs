//! A receiver of webhooks for Rust: `cargo add standardwebhooks http serde_json`. With any server that gives headers and the bytes of the
//! body, `receive` says what to answer.

use std::collections::HashSet;

use standardwebhooks::Webhook;

/// What to answer to a request with these headers and this body. `done` holds the webhooks that were handled; in real life it is a table
/// with a unique index, written in the transaction that does the work.
pub fn receive(webhook: &Webhook, headers: &http::HeaderMap, body: &[u8], done: &mut HashSet<String>) -> u16 {
    // The bytes as they came: parsed and printed again, they would be others, and the signature would not fit.
    if webhook.verify(body, headers).is_err() {
        return 401;
    }
    let Ok(event) = serde_json::from_slice::<serde_json::Value>(body) else { return 400 };
    let id = headers.get("webhook-id").and_then(|id| id.to_str().ok()).unwrap_or_default();
    if done.insert(id.to_owned()) {
        println!("{} {}", event["type"], event["data"]["id"]);
    }
    // Answered before slow work, and also when it was there before: else it is sent again.
    204
}
