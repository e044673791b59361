//! Settings: every environment variable is also a flag, and a wrong value stops the program with one line that names the variable,
//! the value and what is accepted.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Parser, ValueEnum};

use crate::units::{duration, fraction};

/// Reads the command line and the environment, or ends the process: with `--help` on request (exit code 0), and with one line on
/// standard error for a wrong value (exit code 2).
#[must_use]
pub fn parse<T: Parser>() -> T {
    let mut command = T::command().mut_args(unset_if_empty);
    let parsed = command.try_get_matches_from_mut(std::env::args_os()).and_then(|matches| T::from_arg_matches(&matches));
    parsed.unwrap_or_else(|error| {
        if error.use_stderr() {
            eprintln!("{}", in_one_line(&problem(&error, &command)));
            std::process::exit(2);
        }
        error.exit()
    })
}

/// An empty variable of OpenTelemetry counts as unset, as its specification demands ("General SDK Configuration").
fn unset_if_empty(setting: clap::Arg) -> clap::Arg {
    let is_otel = setting.get_env().is_some_and(|name| name.to_string_lossy().starts_with("OTEL_"));
    let is_empty = setting.get_env().and_then(std::env::var_os).is_some_and(|value| value.is_empty());
    if is_otel && is_empty { setting.env(Resettable::Reset) } else { setting }
}

/// The text with its control characters escaped: a value may have line breaks.
pub(crate) fn in_one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() }).collect()
}

/// What is wrong with the settings of `command`.
fn problem(error: &clap::Error, command: &clap::Command) -> String {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) => Some(texts.join(", ")),
        _ => None,
    };
    let flag = context(ContextKind::InvalidArg).unwrap_or_default();
    let variable = variable_of(&flag);
    let value = presentable(&variable, context(ContextKind::InvalidValue).unwrap_or_default());
    match error.kind() {
        ErrorKind::ValueValidation => {
            let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
            match flag.split_whitespace().next() {
                Some(name) if name.starts_with("--") && !is_setting(command, &variable) => format!("{name} {value}: {source}"),
                _ => format!("{variable}={value}: {source}"),
            }
        }
        ErrorKind::InvalidValue if value.is_empty() => format!("{variable}: a value is needed"),
        ErrorKind::InvalidValue => {
            format!("{variable}={value}: accepted: {}", context(ContextKind::ValidValue).unwrap_or_default())
        }
        ErrorKind::MissingRequiredArgument if is_setting(command, &variable) => {
            format!("{variable}: not set; set the variable or give {flag}")
        }
        ErrorKind::MissingRequiredArgument => format!("{flag}: missing; see --help"),
        _ => {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            format!("{}; see --help", first.strip_prefix("error: ").unwrap_or(first))
        }
    }
}

/// The value as it may be printed: keys and secrets are hidden, and so are the credentials in an address.
fn presentable(variable: &str, value: String) -> String {
    if value.is_empty() {
        return value;
    }
    if variable.ends_with("KEY") || variable.ends_with("SECRET") {
        return "[secret]".to_owned();
    }
    // In an address, anything except a scheme, a host, a port and a path may be a credential, or be next to one.
    let (scheme, rest) = value.split_once("://").unwrap_or(("", &value));
    let without_port = rest.rsplit_once(':').filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit())).map_or(rest, |(host, _)| host);
    let harmless = without_port.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '/'));
    match (variable.ends_with("_URL") || variable.ends_with("_ENDPOINT"), harmless, scheme) {
        (false, ..) | (_, true, _) => value,
        (.., "") => "[secret]".to_owned(),
        (.., scheme) => format!("{scheme}://[secret]"),
    }
}

/// Whether `command` reads this variable. If not, it is only the name of an argument.
fn is_setting(command: &clap::Command, variable: &str) -> bool {
    command
        .get_arguments()
        .any(|argument| argument.get_env().is_some() && argument.get_long().is_some_and(|long| variable_of(long) == variable))
}

/// The variable behind a flag as clap prints it: `--upstream-rate <UPSTREAM_RATE>` is `UPSTREAM_RATE`.
fn variable_of(flag: &str) -> String {
    let name = flag.split_whitespace().next().unwrap_or_default();
    name.trim_start_matches('-').replace('-', "_").to_uppercase()
}

/// Parses a setting that counts as unset when it is empty, as compose files pass it.
///
/// # Errors
/// Those of `parse`.
pub fn non_empty<T>(text: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Result<Option<T>, String> {
    if text.trim().is_empty() { Ok(None) } else { parse(text.trim()).map(Some) }
}

/// Parses a list with commas between, each item with `read`; empty: no items.
///
/// # Errors
/// What is `accepted`, if `read` takes an item for wrong.
pub fn list<T>(text: &str, read: impl Fn(&str) -> Option<T>, accepted: &str) -> Result<Vec<T>, String> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    text.split(',').map(|item| read(item.trim()).ok_or_else(|| format!("accepted: {accepted}"))).collect()
}

/// A whole number within `range`.
pub fn whole_number<T: FromStr + PartialOrd + Display + Clone>(range: RangeInclusive<T>) -> impl Fn(&str) -> Result<T, String> + Clone {
    move |text| {
        let number = text.trim().parse().ok().filter(|number| range.contains(number));
        number.ok_or_else(|| format!("accepted: a whole number from {} to {}", range.start(), range.end()))
    }
}

/// An HTTP address without credentials, query or fragment.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn http_url(text: &str) -> Result<url::Url, String> {
    const ACCEPTED: &str = "accepted: an http or https address without credentials, such as http://localhost:9000";
    let url = url::Url::parse(text.trim()).map_err(|_| ACCEPTED)?;
    let bare = url.username().is_empty() && url.password().is_none() && url.query().is_none() && url.fragment().is_none();
    if matches!(url.scheme(), "http" | "https") && url.has_host() && bare { Ok(url) } else { Err(ACCEPTED.to_owned()) }
}

fn otlp_endpoint(text: &str) -> Result<String, String> {
    Ok(non_empty(text, http_url)?.map(String::from).unwrap_or_default())
}

/// An address to listen on.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn listen_address(text: &str) -> Result<std::net::SocketAddr, String> {
    text.trim().parse().map_err(|_| "accepted: ADDRESS:PORT, such as 0.0.0.0:8000".to_owned())
}

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Pretty,
    /// One JSON object a line.
    Json,
}

/// How spans are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OtlpProtocol {
    /// gRPC.
    Grpc,
    /// HTTP with protobuf bodies.
    #[value(name = "http/protobuf")]
    HttpProtobuf,
}

/// Which traces are recorded: the samplers of the specification
/// (<https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/>).
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum TracesSampler {
    /// All.
    AlwaysOn,
    /// None.
    AlwaysOff,
    /// A share of them.
    #[value(name = "traceidratio")]
    TraceIdRatio,
    /// As the caller did; all that begin here.
    #[value(name = "parentbased_always_on")]
    ParentBasedAlwaysOn,
    /// As the caller did; none that begin here.
    #[value(name = "parentbased_always_off")]
    ParentBasedAlwaysOff,
    /// As the caller did; a share of those that begin here.
    #[value(name = "parentbased_traceidratio")]
    ParentBasedTraceIdRatio,
}

/// How the log is written, and how much of it.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Logging and tracing")]
pub struct TelemetrySettings {
    /// What is logged: a level, or levels per module as in `info,worker=debug`.
    // rustls_platform_verifier calls each certificate that is not trusted an error; whose it is says the outcome of the call.
    #[arg(long, env, default_value = "info,poem=warn,sqlx=warn,rustls_platform_verifier=off")]
    pub rust_log: String,
    /// How the log is written.
    #[arg(long, env, value_enum, default_value = "pretty")]
    pub log_format: LogFormat,
    /// Where spans go, such as `http://localhost:4317`; empty: nowhere.
    #[arg(long, env, default_value = "", hide_default_value = true, value_parser = otlp_endpoint)]
    pub otel_exporter_otlp_endpoint: String,
    /// How spans are sent.
    #[arg(long, env, value_enum, default_value = "grpc")]
    pub otel_exporter_otlp_protocol: OtlpProtocol,
    /// The service's name in traces; empty: `countersign-api` or `countersign-worker`.
    #[arg(long, env, default_value = "", hide_default_value = true)]
    pub otel_service_name: String,
    /// Which traces are recorded.
    #[arg(long, env, value_enum, default_value = "parentbased_always_on")]
    pub otel_traces_sampler: TracesSampler,
    /// The share of traces for the `traceidratio` samplers, from 0 to 1.
    #[arg(long, env, default_value_t = 1.0, value_parser = fraction)]
    pub otel_traces_sampler_arg: f64,
}

/// How Postgres is reached. Commands take these flags as well, before or after their names.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Postgres")]
pub struct DatabaseSettings {
    /// Address of the database, such as `postgres://user:password@localhost:5432/countersign`. Of several hosts (`@a:5432,b:5432/`) the one
    /// that takes writes is used.
    #[arg(long, env, global = true, hide_env_values = true, value_parser = database_url)]
    pub database_url: Option<crate::secret::Secret<String>>,
    /// Most connections that this process opens.
    #[arg(long, env, global = true, default_value_t = 10, value_parser = whole_number(2..=1000_u32))]
    pub database_max_connections: u32,
    /// Bring the schema up to date before serving.
    #[arg(long, env, global = true, default_value_t = true, action = clap::ArgAction::Set)]
    pub migrate_on_start: bool,
    /// Encrypts webhook secrets and headers at rest: NAME:BASE64 of 32 bytes. Several with commas between: the first one encrypts, all
    /// decrypt. Empty: they are stored as they are.
    #[arg(long, env, global = true, default_value = "", hide_default_value = true, hide_env_values = true)]
    pub encryption_key: crate::encryption::Keyring,
}

fn database_url(text: &str) -> Result<crate::secret::Secret<String>, String> {
    let is_one = |url: &String| url::Url::parse(url).is_ok_and(|url| matches!(url.scheme(), "postgres" | "postgresql"));
    if each_host(text).iter().all(is_one) {
        Ok(crate::secret::Secret::new(text.to_owned()))
    } else {
        Err("accepted: postgres://USER:PASSWORD@HOST:PORT/DATABASE, with HOST:PORT,HOST:PORT for several hosts".to_owned())
    }
}

/// One address for each host that `url` names: `postgres://a,b/db` is `postgres://a/db` and `postgres://b/db`.
pub(crate) fn each_host(url: &str) -> Vec<String> {
    let parts = url.split_once("://").map(|(scheme, rest)| {
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let (credentials, hosts) =
            authority.rsplit_once('@').map_or(("", authority), |(_, hosts)| authority.split_at(authority.len() - hosts.len()));
        (scheme, credentials, hosts, path)
    });
    match parts {
        Some((scheme, credentials, hosts, path)) if hosts.contains(',') => {
            hosts.split(',').map(|host| format!("{scheme}://{credentials}{host}{path}")).collect()
        }
        _ => vec![url.to_owned()],
    }
}

/// A duration that must be above zero.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn positive_duration(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("accepted: a duration above 0, such as 30s".to_owned()),
        positive => Ok(positive),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[derive(Parser, Debug)]
    struct Example {
        #[arg(long, env = "SETTINGS_TEST_UPSTREAM_RATE", default_value = "10/60s")]
        upstream_rate: crate::units::Rate,
        #[arg(long, value_enum, default_value = "pretty")]
        log_format: LogFormat,
        #[arg(long, env = "SETTINGS_TEST_UPSTREAM_URL", value_parser = http_url)]
        upstream_url: url::Url,
    }

    fn line(args: &[&str]) -> String {
        in_one_line(&problem(&Example::try_parse_from([&["x"], args].concat()).unwrap_err(), &Example::command()))
    }

    #[test]
    fn a_wrong_value_is_one_line_with_the_variable_the_value_and_what_is_accepted() {
        let wrong = line(&["--upstream-rate", "lots", "--upstream-url", "http://a"]);
        assert!(wrong.starts_with("UPSTREAM_RATE=lots: accepted: CALLS/WINDOW"), "{wrong}");
        assert_eq!(line(&["--log-format", "xml", "--upstream-url", "http://a"]), "LOG_FORMAT=xml: accepted: pretty, json");
        let wrong = line(&["--upstream-url", "ftp://a"]);
        assert!(wrong.starts_with("UPSTREAM_URL=ftp://a: accepted: an http or https address"), "{wrong}");
        let broken = line(&["--log-format", "a\nb\u{1b}[2J", "--upstream-url", "http://a"]);
        assert_eq!(broken, "LOG_FORMAT=a\\nb\\u{1b}[2J: accepted: pretty, json");
        assert!([wrong.as_str(), &line(&[]), &line(&["--nonsense"])].iter().all(|text| text.lines().count() == 1));
    }

    #[test]
    fn a_wrong_value_that_may_be_secret_is_not_printed() {
        assert_eq!(presentable("DATABASE_URL", "mysql://root:hunter2@db/x".to_owned()), "mysql://[secret]");
        assert_eq!(presentable("UPSTREAM_API_KEY", "hunter2".to_owned()), "[secret]");
        assert_eq!(presentable("DATABASE_URL", "host=db password=hunter2".to_owned()), "[secret]");
        assert_eq!(presentable("DATABASE_URL", "mysql://localhost".to_owned()), "mysql://localhost");
        assert_eq!(presentable("SYNC_WAIT", "soon".to_owned()), "soon");
    }

    #[test]
    fn a_missing_value_names_its_variable() {
        assert!(line(&[]).starts_with("UPSTREAM_URL: not set"), "{}", line(&[]));
    }

    #[test]
    fn each_host_of_an_address_becomes_an_address() {
        assert_eq!(
            each_host("postgres://u:p,w@a:1,b:2/db?sslmode=require"),
            ["postgres://u:p,w@a:1/db?sslmode=require", "postgres://u:p,w@b:2/db?sslmode=require"]
        );
        for alone in ["postgres://u:p,w@a:1/db", "postgres://a", "postgres:///db?host=/run", "nonsense"] {
            assert_eq!(each_host(alone), [alone]);
        }
    }
}
