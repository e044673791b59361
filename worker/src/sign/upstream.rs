//! The client of the signing API: one call, one reply.

use std::time::{Duration, SystemTime};

use http::header::AUTHORIZATION;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use shared::call_error::CallError;
use shared::message::Message;
use shared::process::ProcessError;
use shared::secret::Secret;
use shared::units::Rate;
use url::Url;

use crate::no_answer::{in_one_line, not_connected};
use crate::retry_after::retry_after;
use crate::settings::UpstreamSettings;

/// Maximum number of bytes of a signature. A 4096-bit RSA signature has 684 in base64.
pub const LARGEST_SIGNATURE: usize = 64 * 1024;

/// The longest that connecting may take, TLS included. A host that does not respond at all is unavailable for every message, and a call
/// without a connection has not been made.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// The reply to a call.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// The upstream answered.
    Answered {
        /// HTTP status.
        status: u16,
        /// The whole body, or why there is none.
        body: Result<Vec<u8>, BodyError>,
        /// How long the upstream asks to wait.
        retry_after: Option<Duration>,
    },
    /// No status came within the timeout. The call may have arrived.
    TimedOut,
    /// No connection was established, for this reason. The call did not arrive.
    NotConnected(CallError),
    /// The connection broke before a status came. The call may have arrived.
    Broken,
}

/// Connections are reused if the mean time between calls is shorter than this.
const KEPT_BELOW: Duration = Duration::from_millis(10);

/// How long an idle connection is kept for reuse: for less time than servers usually keep one.
const KEPT_FOR: Duration = Duration::from_secs(1);

/// Whether a connection is used for more than one call. If the upstream is just closing a reused connection, the call fails and still
/// counts. A fresh connection costs nothing at ten calls per minute; at thousands per second it costs more than half of the processor.
fn keeps_connections(rate: Rate) -> bool {
    rate.interval() < KEPT_BELOW
}

/// Why a body could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyError {
    /// It ended before its announced end, or did not end in time.
    Truncated,
    /// It has more than [`LARGEST_SIGNATURE`] bytes.
    TooLarge,
}

/// Encodes everything but the unreserved characters of RFC 3986: the upstream must read exactly the bytes of the message, whether or not it
/// takes a plus for a space.
const QUERY_VALUE: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A client of the signing API.
#[derive(Clone, Debug)]
pub struct Upstream {
    client: reqwest::Client,
    sign: Url,
    key: Secret<http::HeaderValue>,
    timeout: Duration,
}

impl Upstream {
    /// Creates a client from the settings.
    ///
    /// # Errors
    /// If the address or the key is missing, or TLS can't be set up.
    pub fn new(settings: &UpstreamSettings) -> Result<Self, ProcessError> {
        let missing = |variable: &str, example: &str| {
            ProcessError::Settings(format!("{variable}: not set; needed by WORKER_QUEUES=sign; accepted: {example}"))
        };
        let url = settings.upstream_url.as_ref().ok_or_else(|| missing("UPSTREAM_URL", "an http or https address"))?;
        let key = settings
            .upstream_api_key
            .clone()
            .filter(|key| !key.expose().is_empty())
            .ok_or_else(|| missing("UPSTREAM_API_KEY", "visible ASCII characters"))?;
        let client = reqwest::Client::builder()
            .http1_only()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            // No layer below may retry a call: each call is counted.
            .retry(reqwest::retry::never())
            .pool_max_idle_per_host(if keeps_connections(settings.upstream_rate) { usize::MAX } else { 0 })
            .pool_idle_timeout(KEPT_FOR)
            // Shorter than the timeout of the whole call, so that the two can be told apart.
            .connect_timeout(CONNECT_WITHIN.min(settings.upstream_timeout / 2))
            .user_agent(concat!("countersign/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| ProcessError::Client(error.into()))?;
        let mut sign = url.clone();
        sign.set_path(&format!("{}/crypto/sign", url.path().trim_end_matches('/')));
        Ok(Self { client, sign, key, timeout: settings.upstream_timeout })
    }

    /// The longest a call can take.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Requests the signature of `message` once, and passes on `traceparent`.
    pub async fn sign(&self, message: &Message, traceparent: Option<&str>) -> Reply {
        let mut url = self.sign.clone();
        url.set_query(Some(&format!("message={}", utf8_percent_encode(message.text(), QUERY_VALUE))));
        let mut request = self.client.get(url).timeout(self.timeout).header(AUTHORIZATION, self.key.expose().clone());
        if let Some(traceparent) = traceparent {
            request = request.header("traceparent", traceparent);
        }
        let mut response = match request.send().await {
            Ok(response) => response,
            Err(error) => {
                let reply = without_answer(&error);
                let error = in_one_line(error);
                if reply == Reply::NotConnected(CallError::Tls) {
                    tracing::warn!(error, "no secure connection to the upstream");
                } else {
                    tracing::debug!(error, "no answer");
                }
                return reply;
            }
        };
        let retry_after = retry_after(response.headers(), SystemTime::now());
        let status = response.status().as_u16();
        Reply::Answered { status, body: read(&mut response).await, retry_after }
    }
}

fn without_answer(error: &reqwest::Error) -> Reply {
    if error.is_connect() {
        Reply::NotConnected(not_connected(error))
    } else if error.is_timeout() {
        Reply::TimedOut
    } else {
        Reply::Broken
    }
}

async fn read(response: &mut reqwest::Response) -> Result<Vec<u8>, BodyError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|_| BodyError::Truncated)? {
        if body.len() + chunk.len() > LARGEST_SIGNATURE {
            return Err(BodyError::TooLarge);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_encoded_so_that_no_decoder_can_read_it_differently() {
        let encoded = utf8_percent_encode("a b+c&d%e#f\n🦀~", QUERY_VALUE).to_string();
        assert_eq!(encoded, "a%20b%2Bc%26d%25e%23f%0A%F0%9F%A6%80~");
    }
}
