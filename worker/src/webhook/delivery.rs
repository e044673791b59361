//! One delivery: the request by the Standard Webhooks specification, what came back, and what that means.

use std::time::{Duration, Instant, SystemTime};

use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use poem_openapi::types::ToJSON;
use rand::Rng;
use shared::address_guard::{Forbidden, Guard};
use shared::backoff::{Jitter, doubling};
use shared::contract::WebhookEvent;
use shared::standard_webhooks::signature_header;
use shared::store::deliveries::webhook_id;
use shared::store::webhook_claim::{Confidential, WebhookJob};
use shared::store::webhook_jobs::{Delivery, LARGEST_RESPONSE, ReceiverNews};
use time::OffsetDateTime;

use super::guard::{GuardedResolver, System};
use crate::retry_after::retry_after;
use crate::settings::{Schedule, WebhookSettings};

/// Most bytes of an answer that are read: enough for the connection to end in order, and no more.
const LARGEST_ANSWER: usize = 64 * 1024;

/// How long a connection that is not used is kept: not for long, because a thousand receivers with 16 each are more than a process may have.
const IDLE: Duration = Duration::from_secs(5);

/// What came back from a delivery.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status, if the receiver answered.
    pub status: Option<u16>,
    /// Stable class of what went wrong, if something did.
    pub error: Option<&'static str>,
    /// How long the receiver asks to wait.
    pub retry_after: Option<Duration>,
    /// The first bytes of the body.
    pub body: Vec<u8>,
    /// How long it took.
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
    /// A sender by the settings.
    ///
    /// # Errors
    /// If TLS can't be set up.
    pub fn new(settings: &WebhookSettings) -> Result<Self, reqwest::Error> {
        let guard = Guard::new(&settings.addresses);
        let client = reqwest::Client::builder()
            .http1_only()
            // A proxy would be connected to in place of what the guard judged.
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .dns_resolver(GuardedResolver::new(guard.clone(), System))
            .connect_timeout(settings.webhook_connect_timeout.min(settings.webhook_timeout))
            .pool_idle_timeout(IDLE)
            // More than this are never in use at once.
            .pool_max_idle_per_host(settings.webhook_receiver_concurrency.into())
            .build()?;
        let whole = settings.webhook_timeout;
        let patience = Patience { headers: settings.webhook_headers_timeout.unwrap_or(whole), whole };
        Ok(Self { client, guard, patience })
    }

    /// The longest a delivery can take.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.patience.whole
    }

    /// Sends the outcome that `job` tells, once. `traceparent` is passed on.
    pub async fn send(&self, job: &WebhookJob, traceparent: Option<&str>) -> Answer {
        let started = Instant::now();
        let mut answer = Answer::default();
        // Whatever came until the time was up counts.
        let sent = tokio::time::timeout(self.patience.whole, self.send_into(job, traceparent, &mut answer)).await;
        match sent {
            Ok(Ok(())) => {}
            Ok(Err(error)) => answer.error = Some(error),
            Err(_) => answer.error = Some(if answer.status.is_some() { "body" } else { "timeout" }),
        }
        answer.took = started.elapsed();
        answer
    }

    async fn send_into(&self, job: &WebhookJob, traceparent: Option<&str>, answer: &mut Answer) -> Result<(), &'static str> {
        let confidential = job.confidential.as_ref().map_err(|_| "unreadable")?;
        let url = url::Url::parse(&job.url).map_err(|_| "address")?;
        self.guard.check(&url).map_err(|_| "address")?;
        let body = WebhookEvent::of(job.request.clone()).ok_or("pending")?.to_json_string();
        let headers = headers(job, confidential, &body, OffsetDateTime::now_utc(), traceparent);
        let request = self.client.post(url).headers(headers).body(body).send();
        let mut response =
            tokio::time::timeout(self.patience.headers, request).await.map_err(|_| "timeout")?.map_err(|error| class(&error))?;
        answer.retry_after = retry_after(response.headers(), SystemTime::now());
        answer.status = Some(response.status().as_u16());
        let mut read = 0;
        while let Some(chunk) = response.chunk().await.map_err(|_| "body")? {
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

fn class(error: &reqwest::Error) -> &'static str {
    if is_forbidden(error) {
        "address"
    } else if error.is_timeout() {
        "timeout"
    } else if error.is_connect() {
        "connection"
    } else {
        "reset"
    }
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
pub fn decide(answer: &Answer, attempt: u32, schedule: &Schedule, rng: &mut impl Rng) -> Delivery {
    match answer.status {
        Some(200..=299) => return Delivery::Delivered,
        Some(410) => return Delivery::Exhausted("gone"),
        _ => {}
    }
    let Some(delay) = schedule.after(attempt) else { return Delivery::Exhausted("exhausted") };
    let delay = Jitter::FIFTH.apply(delay, rng);
    Delivery::Retry(delay.max(asked(answer).min(LONGEST_WAIT)))
}

/// How long the receiver asks to be left alone, where the specification has it.
fn asked(answer: &Answer) -> Duration {
    answer.retry_after.filter(|_| matches!(answer.status, Some(429 | 503))).unwrap_or_default()
}

/// From this many failures in a row on, the receiver is asked less and less often.
const PATIENT_FAILURES: u32 = 3;

/// The longest pause between two deliveries to a receiver that fails.
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// The longest pause that a receiver can ask for: the next delivery asks whether it still wants it.
const LONGEST_ASKED_PAUSE: Duration = Duration::from_hours(1);

/// A receiver whose answer takes longer has one delivery at a time: it would hold the calls that others wait for.
const SLOW: Duration = Duration::from_secs(1);

/// What `answer` says about the receiver, which had failed `before` times in a row. It is not left alone for longer than the longest delay of
/// `schedule`: nobody who tries each second wants to wait for a minute.
///
/// It works if it answered in time, whatever it said, unless that was that it wants to be left alone: 429, and 503 with `Retry-After`. A quick
/// 500 holds up nobody, and may be about this webhook alone; the schedule is for that. An answer that can't be had to its end in
/// time says that it is slow; and what is not allowed or can't be read says nothing that waiting would mend, but costs nothing either.
#[must_use]
pub fn news(answer: &Answer, before: u32, schedule: &Schedule) -> ReceiverNews {
    match (answer.status, answer.error) {
        (_, Some("unreadable" | "pending")) => ReceiverNews::None { before },
        (Some(status), None) if status != 429 && asked(answer).is_zero() => ReceiverNews::Works { slow: answer.took > SLOW },
        _ => {
            // What it asks for is about the receiver, and not about this webhook only.
            let own = pause(before.saturating_add(1)).min(schedule.longest().unwrap_or(LONGEST_PAUSE));
            let pause = own.max(asked(answer).min(LONGEST_ASKED_PAUSE));
            ReceiverNews::Fails { before, pause }
        }
    }
}

/// The pause after so many failures in a row: none at first, then from a second on twice as long each time, up to a minute.
fn pause(failures: u32) -> Duration {
    match failures.checked_sub(PATIENT_FAILURES) {
        None => Duration::ZERO,
        Some(doublings) => doubling(Duration::from_secs(1), LONGEST_PAUSE, doublings + 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usual() -> Schedule {
        "5s,5m".parse().unwrap()
    }

    fn after(status: u16, attempt: u32, retry_after: Option<u64>) -> Delivery {
        let answer = Answer { status: Some(status), retry_after: retry_after.map(Duration::from_secs), ..Answer::default() };
        decide(&answer, attempt, &"5s,5m".parse().unwrap(), &mut rand::rng())
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
    fn timeouts_and_refused_connections_are_tried_again() {
        for error in ["timeout", "connection", "reset", "address", "unreadable"] {
            let answer = Answer { error: Some(error), ..Answer::default() };
            assert!(matches!(decide(&answer, 1, &"5s".parse().unwrap(), &mut rand::rng()), Delivery::Retry(_)), "{error}");
        }
    }

    #[test]
    fn a_status_of_success_counts_even_if_the_rest_of_the_answer_does_not_come() {
        let answer = Answer { status: Some(200), error: Some("body"), ..Answer::default() };
        assert_eq!(decide(&answer, 1, &"5s".parse().unwrap(), &mut rand::rng()), Delivery::Delivered);
        assert!(matches!(news(&answer, 0, &usual()), ReceiverNews::Fails { .. }), "but the receiver is slow");
    }

    #[test]
    fn a_receiver_works_if_it_answers_and_else_is_asked_less_and_less_often() {
        let answered = |status| Answer { status: Some(status), ..Answer::default() };
        for status in [200, 204, 302, 400, 404, 410, 500, 502, 503] {
            assert_eq!(news(&answered(status), 5, &usual()), ReceiverNews::Works { slow: false }, "{status}");
        }
        let silent = Answer { error: Some("timeout"), ..Answer::default() };
        let cut_off = Answer { error: Some("body"), ..answered(500) };
        for failed in [answered(429), silent, cut_off] {
            assert_eq!(news(&failed, 0, &usual()), ReceiverNews::Fails { before: 0, pause: Duration::ZERO }, "{failed:?}");
        }
        let late = Answer { took: Duration::from_millis(1001), ..answered(200) };
        assert_eq!(news(&late, 0, &usual()), ReceiverNews::Works { slow: true });
        let seconds: Vec<u64> = [1, 2, 3, 4, 5, 8, 9, 10, u32::MAX].map(|failures| pause(failures).as_secs()).into();
        assert_eq!(seconds, [0, 0, 1, 2, 4, 32, 60, 60, 60]);
    }

    #[test]
    fn a_receiver_that_fails_is_not_left_alone_for_longer_than_the_schedule_has_it() {
        let failed = Answer { error: Some("connection"), ..Answer::default() };
        for (schedule, expected) in [("1s,1s,1s", 1), ("1s,5s", 5), ("5s,5m", 60), ("", 60)] {
            let ReceiverNews::Fails { pause, .. } = news(&failed, 20, &schedule.parse().unwrap()) else { panic!("it fails") };
            assert_eq!(pause.as_secs(), expected, "{schedule}");
        }
    }

    #[test]
    fn a_receiver_that_asks_to_wait_is_left_alone_for_as_long_within_an_hour() {
        let asking =
            |status, seconds| Answer { status: Some(status), retry_after: Some(Duration::from_secs(seconds)), ..Answer::default() };
        for (status, seconds, expected) in [(429, 300, 300), (503, 300, 300), (503, 99_999, 3600)] {
            let pause = Duration::from_secs(expected);
            assert_eq!(news(&asking(status, seconds), 0, &usual()), ReceiverNews::Fails { before: 0, pause }, "{status}");
        }
        assert_eq!(news(&asking(500, 300), 0, &usual()), ReceiverNews::Works { slow: false }, "the specification has it for others");
        let ReceiverNews::Fails { pause, .. } = news(&asking(429, 1), 10, &usual()) else { panic!("it fails") };
        assert_eq!(pause, LONGEST_PAUSE, "but never for less than it would be");
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
