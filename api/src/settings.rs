//! The settings, each an environment variable and a flag; and the commands.

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Parser, Subcommand};
use shared::address_guard::AddressSettings;
use shared::message;
use shared::secret::Secret;
use shared::settings::{DatabaseSettings, TelemetrySettings, listen_address, non_empty, whole_number};
use shared::standard_webhooks::WebhookSecret;
use shared::store::keys::Scope;
use shared::units::duration;

/// A reliable front for an unreliable, rate-limited signing API. Without a command: serves HTTP.
#[derive(Parser, Clone, Debug)]
#[command(name = "api", version)]
pub struct Cli {
    /// What to do. `None` to serve.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Settings.
    #[command(flatten)]
    pub settings: Settings,
}

/// What can be done besides serving.
#[derive(Subcommand, Clone, Debug)]
pub enum Command {
    /// Bring the database's schema up to date.
    Migrate,
    /// Create, list and revoke API keys, and change their webhook secrets.
    Keys {
        /// What to do.
        #[command(subcommand)]
        command: KeysCommand,
    },
    /// Print the OpenAPI document.
    Openapi,
}

/// What can be done with API keys.
#[derive(Subcommand, Clone, Debug)]
pub enum KeysCommand {
    /// Make a key; prints it and its webhook secret, once.
    Create {
        /// What the key is called: 1 to 64 characters, unique among live keys.
        #[arg(long)]
        name: String,
        /// What it may do: `sign`, `admin`, or both.
        #[arg(long, default_value = "sign", value_delimiter = ',')]
        scopes: Vec<Scope>,
        /// How long it lives, such as `90d`; without: for ever.
        #[arg(long, value_parser = shared::settings::positive_duration)]
        expires_in: Option<Duration>,
    },
    /// List all keys.
    List,
    /// Give a key another webhook secret; prints it, once. Webhooks are signed with the old one too until the grace is over.
    RotateWebhookSecret {
        /// Which key.
        #[command(flatten)]
        key: KeyName,
        /// How long the old secret signs as well; `0`: not at all, and neither do older ones.
        #[arg(long, default_value = "24h", value_parser = duration)]
        grace: Duration,
    },
    /// Encrypt every webhook secret with the first key of `ENCRYPTION_KEY`; says which other keys are still needed.
    Reencrypt,
    /// Revoke a key; requests with it are refused within seconds.
    Revoke(KeyName),
}

/// The name of a key: an argument, or `--name` as for `create`.
#[derive(clap::Args, Clone, Debug)]
#[group(required = true, multiple = false)]
pub struct KeyName {
    /// What the key is called.
    name: Option<String>,
    /// The same.
    #[arg(long = "name", value_name = "NAME")]
    named: Option<String>,
}

impl KeyName {
    /// What the key is called.
    #[must_use]
    pub fn get(&self) -> &str {
        self.name.as_deref().or(self.named.as_deref()).unwrap_or_default()
    }
}

/// What can be set.
#[derive(clap::Args, Clone, Debug)]
pub struct Settings {
    /// Where the service is served.
    #[arg(long, env, default_value = "0.0.0.0:8000", value_parser = listen_address)]
    pub api_listen: SocketAddr,
    /// Where `/metrics` is served, such as `127.0.0.1:9464`; empty: with the service.
    #[arg(long, env, default_value = "", hide_default_value = true, value_parser = optional_address)]
    pub metrics_listen: Optional<SocketAddr>,
    /// How long a POST waits for its signature before it answers 202.
    #[arg(long, env, default_value = "1500ms", value_parser = duration)]
    pub sync_wait: Duration,
    /// The longest wait that `Prefer: wait=N` can ask for.
    #[arg(long, env, default_value = "60s", value_parser = duration)]
    pub max_wait: Duration,
    /// Most callers that wait at a time; more are answered with a receipt at once.
    #[arg(long, env, default_value_t = 10_000, value_parser = whole_number(0..=u32::MAX))]
    pub max_waiters: u32,
    /// Most unfinished requests; more are refused until some are finished.
    #[arg(long, env, default_value_t = 1_000_000, value_parser = whole_number(0..=u64::MAX))]
    pub max_pending: u64,
    /// The longest message, in bytes of UTF-8. It becomes part of an address.
    #[arg(long, env, default_value_t = 4096, value_parser = whole_number(1..=message::LONGEST))]
    pub message_max_bytes: u32,
    /// An API key with the scopes `sign` and `admin` that exists from the start; empty: none.
    #[arg(long, env, default_value = "", hide_default_value = true, hide_env_values = true, value_parser = bootstrap_key)]
    pub bootstrap_api_key: Optional<Secret<String>>,
    /// The webhook secret of that key, `whsec_…`; empty: one is made.
    #[arg(long, env, default_value = "", hide_default_value = true, hide_env_values = true, value_parser = bootstrap_secret)]
    pub bootstrap_webhook_secret: Optional<WebhookSecret>,
    /// Where webhooks may go.
    #[command(flatten)]
    pub addresses: AddressSettings,
    /// Postgres.
    #[command(flatten)]
    pub database: DatabaseSettings,
    /// Log and traces.
    #[command(flatten)]
    pub telemetry: TelemetrySettings,
}

/// A setting that is unset when it is empty.
// Not a plain `Option`: for that, clap expects a parser of the inner type.
#[derive(Clone, Copy, Debug)]
pub struct Optional<T>(pub Option<T>);

fn optional_address(text: &str) -> Result<Optional<SocketAddr>, String> {
    non_empty(text, listen_address).map(Optional)
}

fn bootstrap_key(text: &str) -> Result<Optional<Secret<String>>, String> {
    let read = |text: &str| {
        let visible = text.len() <= 256 && text.bytes().all(|byte| byte.is_ascii_graphic());
        if visible { Ok(Secret::new(text.to_owned())) } else { Err("accepted: up to 256 visible ASCII characters".to_owned()) }
    };
    non_empty(text, read).map(Optional)
}

fn bootstrap_secret(text: &str) -> Result<Optional<WebhookSecret>, String> {
    non_empty(text, str::parse).map(Optional)
}
