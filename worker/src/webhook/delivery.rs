//! One delivery: the request by the Standard Webhooks specification, what came back, and what that means.

use std::time::{Duration, SystemTime};

use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER, USER_AGENT};
use poem_openapi::types::ToJSON;
use rand::Rng;
use shared::backoff::Jitter;
use shared::contract::WebhookEvent;
use shared::standard_webhooks::signature_header;
use shared::store::webhook_jobs::{Delivery, WebhookJob};
use time::OffsetDateTime;

use super::guard::{Forbidden, Guard};
use crate::retry_after::retry_after;
use crate::settings::{Schedule, WebhookSettings};

/// Most bytes of an answer that are read: enough for the connection to end in order, and no more.
const LARGEST_ANSWER: usize = 64 * 1024;

/// What came back from a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status, if the receiver answered.
    pub status: Option<u16>,
    /// Stable class of what went wrong, if no answer came.
    pub error: Option<&'static str>,
    /// How long the receiver asks to wait.
    pub retry_after: Option<Duration>,
}

/// Sends webhooks.
#[derive(Clone, Debug)]
pub struct Sender {
    client: reqwest::Client,
    guard: Guard,
    timeout: Duration,
}

impl Sender {
    /// A sender by the settings.
    ///
    /// # Errors
    /// If TLS can't be set up.
    pub fn new(settings: &WebhookSettings) -> Result<Self, reqwest::Error> {
        let guard = Guard::new(&settings.webhook_allow_networks);
        let client = reqwest::Client::builder()
            .http1_only()
            // A proxy would be connected to in place of what the guard judged.
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .dns_resolver(guard.clone())
            .connect_timeout(settings.webhook_timeout)
            .pool_idle_timeout(Duration::from_secs(30))
            .build()?;
        Ok(Self { client, guard, timeout: settings.webhook_timeout })
    }

    /// The longest a delivery can take.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Sends the outcome that `job` tells, once. `traceparent` is passed on.
    pub async fn send(&self, job: &WebhookJob, traceparent: Option<&str>) -> Answer {
        let Ok(url) = url::Url::parse(&job.url) else { return failed("url") };
        if self.guard.check_literal(&url).is_err() {
            return failed("address");
        }
        let Some(event) = WebhookEvent::of(job.request.clone()) else { return failed("pending") };
        let body = event.to_json_string();
        let headers = headers(job, &body, OffsetDateTime::now_utc(), traceparent);
        let request = self.client.post(url).timeout(self.timeout).headers(headers).body(body);
        match request.send().await {
            Ok(mut response) => {
                let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| retry_after(value, SystemTime::now()));
                let status = response.status().as_u16();
                // The status is the answer; the rest is read, within its bounds, only so that the connection can be used again.
                let mut read = 0;
                while let Ok(Some(chunk)) = response.chunk().await {
                    read += chunk.len();
                    if read > LARGEST_ANSWER {
                        break;
                    }
                }
                Answer { status: Some(status), error: None, retry_after }
            }
            Err(error) if is_forbidden(&error) => failed("address"),
            Err(error) if error.is_timeout() => failed("timeout"),
            Err(error) if error.is_connect() => failed("connection"),
            Err(_) => failed("reset"),
        }
    }
}

fn failed(error: &'static str) -> Answer {
    Answer { status: None, error: Some(error), retry_after: None }
}

fn is_forbidden(error: &reqwest::Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if error.is::<Forbidden>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// The headers of a delivery. What the caller wants sent along goes in first, so that it can't replace what matters.
fn headers(job: &WebhookJob, body: &str, now: OffsetDateTime, traceparent: Option<&str>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(USER_AGENT, HeaderValue::from_static(concat!("countersign/", env!("CARGO_PKG_VERSION"))));
    for (name, value) in job.headers.expose() {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value))
            && !is_ours(name.as_str())
        {
            headers.insert(name, value);
        }
    }
    let id = format!("msg_{}", job.request.id.simple());
    let timestamp = now.unix_timestamp();
    let signature = signature_header(&job.secrets, &id, timestamp, body.as_bytes());
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

/// Headers that a caller can't set: those that say where the request goes and what it is, and the hop-by-hop ones of RFC 9110, 7.6.1.
fn is_ours(name: &str) -> bool {
    const HOP_BY_HOP: [&str; 8] = ["connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "expect", "http2-settings"];
    const PREFIXES: [&str; 3] = ["content-", "webhook-", "proxy-"];
    matches!(name, "host" | "traceparent" | "tracestate")
        || HOP_BY_HOP.contains(&name)
        || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// A receiver may ask for more patience than the schedule has, but not for more than its longest delay.
const LONGEST_WAIT: Duration = Duration::from_hours(24);

/// What becomes of a delivery after `answer` to the try of this number, counted from 1.
pub fn decide(answer: Answer, attempt: u32, schedule: &Schedule, rng: &mut impl Rng) -> Delivery {
    match answer.status {
        Some(200..=299) => return Delivery::Delivered,
        Some(410) => return Delivery::Exhausted("gone"),
        _ => {}
    }
    let Some(delay) = schedule.after(attempt) else { return Delivery::Exhausted("exhausted") };
    let delay = Jitter::new(0.2).unwrap_or(Jitter::NONE).apply(delay, rng);
    let asked = answer.retry_after.filter(|_| matches!(answer.status, Some(429 | 503))).unwrap_or_default();
    Delivery::Retry(delay.max(asked.min(LONGEST_WAIT)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(status: u16, attempt: u32, retry_after: Option<u64>) -> Delivery {
        let answer = Answer { status: Some(status), error: None, retry_after: retry_after.map(Duration::from_secs) };
        decide(answer, attempt, &"5s,5m".parse().unwrap(), &mut rand::rng())
    }

    #[test]
    fn only_2xx_is_success_and_410_ends_the_delivery() {
        assert_eq!(after(204, 1, None), Delivery::Delivered);
        assert_eq!(after(410, 1, None), Delivery::Exhausted("gone"));
        for status in [199, 301, 302, 400, 404, 500] {
            assert!(matches!(after(status, 1, None), Delivery::Retry(_)), "{status}");
        }
    }

    #[test]
    fn the_schedule_is_kept_within_a_fifth_and_then_the_delivery_is_exhausted() {
        for (attempt, nominal) in [(1, 5.0), (2, 300.0)] {
            let Delivery::Retry(delay) = after(500, attempt, None) else { panic!("not retried") };
            assert!((delay.as_secs_f64() / nominal - 1.0).abs() <= 0.2 + 1e-9, "{delay:?}");
        }
        assert_eq!(after(500, 3, None), Delivery::Exhausted("exhausted"));
    }

    #[test]
    fn retry_after_is_honoured_within_bounds_where_the_specification_has_it() {
        assert_eq!(after(429, 1, Some(60)), Delivery::Retry(Duration::from_mins(1)));
        assert_eq!(after(503, 1, Some(99_999_999)), Delivery::Retry(LONGEST_WAIT));
        assert!(matches!(after(500, 1, Some(60)), Delivery::Retry(delay) if delay < Duration::from_secs(7)));
    }

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
