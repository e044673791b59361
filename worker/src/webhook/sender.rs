//! One delivery: the request according to the Standard Webhooks specification, and the answer.

use std::time::{Duration, Instant, SystemTime};

use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use poem_openapi::types::ToJSON;
use shared::address_guard::{Forbidden, Guard};
use shared::call_error::CallError;
use shared::contract::WebhookEvent;
use shared::process::ProcessError;
use shared::standard_webhooks::signature_header;
use shared::store::deliveries::webhook_id;
use shared::store::webhook_claim::{Confidential, WebhookJob};
use shared::store::webhook_finish::LARGEST_RESPONSE;
use time::OffsetDateTime;

use super::guard::GuardedResolver;
use crate::no_answer::{in_one_line, is_caused_by, not_connected};
use crate::retry_after::retry_after;
use crate::settings::WebhookSettings;

/// Maximum number of bytes read from an answer: enough for the connection to end in order, and no more.
const LARGEST_ANSWER: usize = 64 * 1024;

/// How long an idle connection is kept. Not long, because a thousand receivers with 16 connections each are more than a process may have
/// open; and for less time than servers usually keep one (Node.js: 5 s), because a delivery over a connection that is just being closed
/// fails.
const IDLE: Duration = Duration::from_secs(2);

/// The answer to a delivery.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status, if the receiver answered.
    pub status: Option<u16>,
    /// What went wrong, if something did.
    pub error: Option<CallError>,
    /// How long the receiver asks to wait.
    pub retry_after: Option<Duration>,
    /// The first bytes of the body.
    pub body: Vec<u8>,
    /// How long the delivery took.
    pub took: Duration,
}

/// The longest that each part of a delivery may take.
#[derive(Clone, Copy, Debug)]
struct Patience {
    headers: Duration,
    whole: Duration,
}

/// Sends webhooks.
#[derive(Clone, Debug)]
pub struct Sender {
    client: reqwest::Client,
    guard: Guard,
    patience: Patience,
}

impl Sender {
    /// Creates a sender from the settings.
    ///
    /// # Errors
    /// If TLS can't be set up.
    pub fn new(settings: &WebhookSettings) -> Result<Self, ProcessError> {
        let guard = Guard::new(&settings.addresses);
        let client = reqwest::Client::builder()
            .http1_only()
            // With a proxy, the client would connect to the proxy, not to the address that the guard checked.
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .dns_resolver(GuardedResolver::new(guard.clone()))
            .connect_timeout(settings.webhook_connect_timeout.min(settings.webhook_timeout))
            .pool_idle_timeout(IDLE)
            // More than this are never in use at once.
            .pool_max_idle_per_host(settings.webhook_receiver_concurrency.into())
            .build()
            .map_err(|error| ProcessError::Client(error.into()))?;
        let whole = settings.webhook_timeout;
        let patience = Patience { headers: settings.webhook_headers_timeout.unwrap_or(whole), whole };
        Ok(Self { client, guard, patience })
    }

    /// The longest a delivery can take.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.patience.whole
    }

    /// Sends the outcome in `job` once, and passes on `traceparent`.
    pub async fn send(&self, job: &WebhookJob, traceparent: Option<&str>) -> Answer {
        let started = Instant::now();
        let mut answer = Answer::default();
        // On a timeout, what has arrived so far still counts.
        let sent = tokio::time::timeout(self.patience.whole, self.send_into(job, traceparent, &mut answer)).await;
        match sent {
            Ok(Ok(())) => {}
            Ok(Err(error)) => answer.error = Some(error),
            Err(_) => answer.error = Some(if answer.status.is_some() { CallError::Body } else { CallError::Timeout }),
        }
        answer.took = started.elapsed();
        answer
    }

    async fn send_into(&self, job: &WebhookJob, traceparent: Option<&str>, answer: &mut Answer) -> Result<(), CallError> {
        let confidential = job.confidential.as_ref().map_err(|_| CallError::Unreadable)?;
        let url = url::Url::parse(&job.url).map_err(|_| CallError::Address)?;
        self.guard.check(&url).map_err(|_| CallError::Address)?;
        let body = WebhookEvent::of(job.request.clone()).ok_or(CallError::Unreadable)?.to_json_string();
        let headers = headers(job, confidential, &body, job.clock.now(), traceparent);
        let request = self.client.post(url).headers(headers).body(body).send();
        let response = tokio::time::timeout(self.patience.headers, request).await.map_err(|_| CallError::Timeout)?;
        let mut response = response.map_err(|error| {
            let class = class(&error);
            tracing::debug!(error = in_one_line(error), "no answer");
            class
        })?;
        answer.retry_after = retry_after(response.headers(), SystemTime::now());
        answer.status = Some(response.status().as_u16());
        let mut read = 0;
        while let Some(chunk) = response.chunk().await.map_err(|_| CallError::Body)? {
            read += chunk.len();
            answer.body.extend_from_slice(&chunk[..chunk.len().min(LARGEST_RESPONSE - answer.body.len())]);
            if read > LARGEST_ANSWER {
                // The rest is not read: the connection is closed, and not used again.
                break;
            }
        }
        Ok(())
    }
}

/// Why no answer came. One that took too long is a timeout, whether it had a connection or not: a delivery may be repeated either way.
fn class(error: &reqwest::Error) -> CallError {
    if is_caused_by::<Forbidden>(error) {
        CallError::Address
    } else if error.is_timeout() {
        CallError::Timeout
    } else if error.is_connect() {
        not_connected(error)
    } else {
        CallError::Reset
    }
}

/// The headers of a delivery. The caller's headers go in first, so that they can't replace those that matter.
fn headers(job: &WebhookJob, confidential: &Confidential, body: &str, now: OffsetDateTime, traceparent: Option<&str>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(USER_AGENT, HeaderValue::from_static(concat!("countersign/", env!("CARGO_PKG_VERSION"))));
    for (name, value) in confidential.headers.expose() {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value))
            && !is_ours(name.as_str())
        {
            headers.insert(name, value);
        }
    }
    let id = webhook_id(job.request.id);
    let timestamp = now.unix_timestamp();
    let signature = signature_header(&confidential.secrets, &id, timestamp, body.as_bytes());
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert("webhook-timestamp", timestamp.into());
    let texts = [("webhook-id", Some(id.as_str())), ("webhook-signature", Some(&signature)), ("traceparent", traceparent)];
    for (name, text) in texts {
        if let Some(value) = text.and_then(|text| HeaderValue::try_from(text).ok()) {
            headers.insert(name, value);
        }
    }
    headers
}

/// Whether callers can't set the header `name`. These are the headers that say where the request goes and what it is, and the hop-by-hop
/// ones of RFC 9110, section 7.6.1.
fn is_ours(name: &str) -> bool {
    const HOP_BY_HOP: [&str; 8] = ["connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "expect", "http2-settings"];
    const PREFIXES: [&str; 3] = ["content-", "webhook-", "proxy-"];
    matches!(name, "host" | "traceparent" | "tracestate")
        || HOP_BY_HOP.contains(&name)
        || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_cannot_replace_what_identifies_or_frames_the_webhook() {
        for name in [
            "host",
            "content-type",
            "content-length",
            "webhook-id",
            "webhook-signature",
            "traceparent",
            "connection",
            "te",
            "proxy-authorization",
        ] {
            assert!(is_ours(name), "{name}");
        }
        assert!(!is_ours("authorization") && !is_ours("x-tenant"));
    }
}
