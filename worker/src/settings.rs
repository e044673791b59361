//! The settings: each one is an environment variable and a flag.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser};
use shared::address_guard::AddressSettings;
use shared::backoff::{Backoff, Jitter, Strategy};
use shared::secret::Secret;
use shared::settings::{DatabaseSettings, TelemetrySettings, http_url, list, listen_address, positive_duration, whole_number};
use shared::store::JobKind;
use shared::units::{Rate, duration};

/// Calls the signing API for pending requests, within its budget, and delivers webhooks.
#[derive(Parser, Clone, Debug)]
#[command(name = "worker", version)]
pub struct Settings {
    /// Where health and metrics are served.
    #[arg(long, env, default_value = "0.0.0.0:8001", value_parser = listen_address)]
    pub worker_listen: SocketAddr,
    /// Which queues this process works on: `sign`, `webhook`, or both.
    #[arg(long, env, default_value = "sign,webhook")]
    pub worker_queues: Queues,
    /// How often the queue is looked at when no notification comes, give or take a fifth.
    #[arg(long, env, default_value = "1s", value_parser = positive_duration)]
    pub poll_interval: Duration,
    /// On SIGTERM, how long calls in flight may take before their jobs are given back.
    #[arg(long, env, default_value = "20s", value_parser = duration)]
    pub shutdown_grace: Duration,
    /// How long finished requests are kept.
    #[arg(long, env, default_value = "30d", value_parser = positive_duration)]
    pub retention: Duration,
    /// The upstream.
    #[command(flatten)]
    pub upstream: UpstreamSettings,
    /// Retries of signing.
    #[command(flatten)]
    pub sign: SignSettings,
    /// Webhooks.
    #[command(flatten)]
    pub webhook: WebhookSettings,
    /// Postgres.
    #[command(flatten)]
    pub database: DatabaseSettings,
    /// Log and traces.
    #[command(flatten)]
    pub telemetry: TelemetrySettings,
}

/// The signing API that is called.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Upstream")]
pub struct UpstreamSettings {
    /// Base address of the signing API; `/crypto/sign` is appended. Needed by the queue `sign`.
    #[arg(long, env, value_parser = http_url)]
    pub upstream_url: Option<url::Url>,
    /// Sent as the `Authorization` header. Needed by the queue `sign`.
    #[arg(long, env, hide_env_values = true, value_parser = header_value)]
    pub upstream_api_key: Option<Secret<http::HeaderValue>>,
    /// The longest a call may take.
    #[arg(long, env, default_value = "30s", value_parser = positive_duration)]
    pub upstream_timeout: Duration,
    /// Calls allowed in any window, shared by all workers.
    #[arg(long, env, default_value = "10/60s")]
    pub upstream_rate: Rate,
    /// Statuses after which a message is tried again; other failures are final.
    #[arg(long, env, default_value = "408,425,429,500,502,503,504")]
    pub upstream_retryable_statuses: Statuses,
}

/// When a message is tried again.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Retries of signing")]
pub struct SignSettings {
    /// How the delay between tries grows.
    #[arg(long, env, value_enum, default_value = "adaptive")]
    pub sign_retry_strategy: Strategy,
    /// The smallest delay.
    #[arg(long, env, default_value = "1s", value_parser = positive_duration)]
    pub sign_retry_base: Duration,
    /// The largest delay.
    #[arg(long, env, default_value = "10m", value_parser = positive_duration)]
    pub sign_retry_max: Duration,
    /// By which fraction a delay may differ, either way: 0 to 1.
    #[arg(long, env, default_value = "0.1")]
    pub sign_retry_jitter: Jitter,
    /// If above 0: the delay before the second try is drawn evenly from 0 to this.
    #[arg(long, env, default_value = "0s", value_parser = duration)]
    pub sign_initial_delay: Duration,
    /// Most tries that count.
    #[arg(long, env, default_value_t = 1000, value_parser = whole_number(1..=u32::MAX))]
    pub sign_max_attempts: u32,
    /// How long after the first request for it a message fails.
    #[arg(long, env, default_value = "24h", value_parser = positive_duration)]
    pub sign_deadline: Duration,
}

impl SignSettings {
    /// Creates the backoff from the settings.
    ///
    /// # Errors
    /// One line that names the variables, if the smallest delay is above the largest.
    pub fn backoff(&self) -> Result<Backoff, String> {
        Backoff::new(self.sign_retry_strategy, self.sign_retry_base, self.sign_retry_max, self.sign_retry_jitter)
            .map_err(|accepted| format!("SIGN_RETRY_BASE={:?}, SIGN_RETRY_MAX={:?}: {accepted}", self.sign_retry_base, self.sign_retry_max))
    }
}

/// How webhooks are delivered.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Webhooks")]
pub struct WebhookSettings {
    /// Delays between tries, give or take a fifth; after the last one the delivery is exhausted.
    #[arg(long, env, default_value = "5s,5m,30m,2h,5h,10h,14h,20h,24h")]
    pub webhook_retry_schedule: Schedule,
    /// The longest a delivery may take, from the name look-up to the end of the answer.
    #[arg(long, env, default_value = "15s", value_parser = positive_duration)]
    pub webhook_timeout: Duration,
    /// The longest that connecting may take, TLS included.
    #[arg(long, env, default_value = "5s", value_parser = positive_duration)]
    pub webhook_connect_timeout: Duration,
    /// The longest until the head of the answer is there, connecting included; `WEBHOOK_TIMEOUT` if not set.
    #[arg(long, env, value_parser = positive_duration)]
    pub webhook_headers_timeout: Option<Duration>,
    /// Deliveries at the same time.
    #[arg(long, env, default_value_t = 64, value_parser = whole_number(1..=4096_u16))]
    pub webhook_concurrency: u16,
    /// Deliveries at the same time to one receiver: an address without its identifiers, for one API key.
    #[arg(long, env, default_value_t = 16, value_parser = whole_number(1..=4096_u16))]
    pub webhook_receiver_concurrency: u16,
    /// Where webhooks may go.
    #[command(flatten)]
    pub addresses: AddressSettings,
}

fn header_value(text: &str) -> Result<Secret<http::HeaderValue>, String> {
    const ACCEPTED: &str = "accepted: visible ASCII characters";
    let text = text.trim();
    let visible = text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
    let mut value = http::HeaderValue::from_str(text).ok().filter(|_| visible).ok_or(ACCEPTED)?;
    value.set_sensitive(true);
    Ok(Secret::new(value))
}

/// Which queues a process works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queues {
    /// Sign jobs.
    pub sign: bool,
    /// Webhook jobs.
    pub webhook: bool,
}

impl FromStr for Queues {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const ACCEPTED: &str = "sign, webhook, or sign,webhook";
        let kinds = list(text, |name| [JobKind::Sign, JobKind::Webhook].into_iter().find(|kind| kind.name() == name), ACCEPTED)?;
        let queues = Self { sign: kinds.contains(&JobKind::Sign), webhook: kinds.contains(&JobKind::Webhook) };
        if kinds.is_empty() { Err(format!("accepted: {ACCEPTED}")) } else { Ok(queues) }
    }
}

/// A set of HTTP statuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statuses(BTreeSet<u16>);

impl Statuses {
    /// Whether `status` is in the set.
    #[must_use]
    pub fn contains(&self, status: u16) -> bool {
        self.0.contains(&status)
    }
}

impl FromStr for Statuses {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let read = |item: &str| item.parse().ok().filter(|status| (400..=599).contains(status));
        list(text, read, "HTTP statuses from 400 to 599 with commas between, such as 429,500,502")
            .map(|all| Self(all.into_iter().collect()))
    }
}

/// The delays between the attempts of a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule(Vec<Duration>);

impl Schedule {
    /// The delay after this attempt, counted from 1. `None` after the last one.
    #[must_use]
    pub fn after(&self, attempt: u32) -> Option<Duration> {
        self.0.get(usize::try_from(attempt.checked_sub(1)?).ok()?).copied()
    }

    /// The longest delay. `None` if nothing is tried again.
    #[must_use]
    pub fn longest(&self) -> Option<Duration> {
        self.0.iter().max().copied()
    }

    /// The sum of all delays: how long a delivery is tried for.
    #[must_use]
    pub fn whole(&self) -> Duration {
        self.0.iter().sum()
    }
}

impl FromStr for Schedule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        list(text, |item| duration(item).ok(), "durations with commas between, such as 5s,5m,30m").map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_what_is_no_list_is_refused() {
        assert_eq!("webhook".parse(), Ok(Queues { sign: false, webhook: true }));
        assert!("sign,mail".parse::<Queues>().is_err() && "".parse::<Queues>().is_err());
        assert!("502, 503".parse::<Statuses>().unwrap().contains(503));
        assert!("200".parse::<Statuses>().is_err() && "50x".parse::<Statuses>().is_err());
    }

    #[test]
    fn a_key_for_a_header_is_of_visible_characters() {
        assert!(["k", " Bearer k\n", ""].iter().all(|key| header_value(key).is_ok()));
        assert!(["\u{e9}", "a\nb", "a\tb"].iter().all(|key| header_value(key).is_err()));
    }

    #[test]
    fn a_schedule_ends_after_its_last_delay() {
        let schedule: Schedule = "5s,5m".parse().unwrap();
        let delays: Vec<_> = (0..4).map(|n| schedule.after(n)).collect();
        assert_eq!(delays, [None, Some(Duration::from_secs(5)), Some(Duration::from_mins(5)), None]);
    }
}
