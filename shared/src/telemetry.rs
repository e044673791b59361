//! The log on standard error, and spans over OTLP if an endpoint is set.
//!
//! A log line contains everything it has to say; spans serve traces only. So if traces are not exported, no spans are created: those of a
//! POST were a tenth of its cost in the `api`.
//!
//! Without an endpoint there is no exporter, no background task and no warning. The trace context of a request is stored with its job
//! as a W3C `traceparent`, so that an attempt made hours later, by another process, continues the caller's trace.

use std::collections::HashMap;
use std::io::IsTerminal;

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry_otlp::tonic_types::transport::ClientTlsConfig;
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tracing::{Dispatch, Level, Metadata, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets, dynamic_filter_fn, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::settings::{LogFormat, OtlpProtocol, TelemetrySettings, TracesSampler};

/// The crates of this workspace, as they are named in `RUST_LOG`.
const OWN: [&str; 3] = ["api", "worker", "shared"];

/// Why telemetry could not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// `RUST_LOG` is not a valid filter.
    #[error("RUST_LOG={0}: accepted: a level (error, warn, info, debug, trace) or levels per module, such as info,worker=debug")]
    Filter(String),
    /// The exporter could not be built.
    #[error("OTEL_EXPORTER_OTLP_ENDPOINT={0}: {1}")]
    Exporter(String, #[source] opentelemetry_otlp::ExporterBuildError),
}

/// Flushes the buffered spans when [`Telemetry::finish`] is called.
#[must_use = "spans that are still buffered are lost without `finish`"]
pub struct Telemetry(Option<SdkTracerProvider>);

impl Telemetry {
    /// Sends the buffered spans. Takes at most a few seconds.
    pub async fn finish(self) {
        if let Some(provider) = self.0 {
            let flushed = tokio::task::spawn_blocking(move || provider.shutdown()).await;
            if !matches!(flushed, Ok(Ok(()))) {
                tracing::debug!("not every span could be sent before the end");
            }
        }
    }
}

/// Starts the log and, if an endpoint is set, the exporter. `service` names the process in traces unless the settings do.
///
/// # Errors
/// If the filter can't be parsed, or the endpoint is not valid.
pub fn start(settings: &TelemetrySettings, service: &str) -> Result<Telemetry, TelemetryError> {
    let levels = levels(&settings.rust_log).ok_or_else(|| TelemetryError::Filter(settings.rust_log.clone()))?;
    let provider = match settings.otel_exporter_otlp_endpoint.trim() {
        "" => None,
        endpoint => Some(exporting_to(endpoint, settings, service)?),
    };
    // A second start in one process (tests) keeps the first subscriber.
    let _ = subscriber(levels, settings.log_format, std::io::stderr, provider.as_ref()).try_init();
    log_panics();
    Ok(Telemetry(provider))
}

/// What `text` says is to be logged. `None` if it can't be parsed, or has a word that is neither a level nor a part of this workspace, such
/// as `inof`: `Targets` would take it for the name of a module, and log nothing else.
fn levels(text: &str) -> Option<Targets> {
    let is_own = |word: &str| OWN.iter().any(|name| word.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with("::")));
    let known = |part: &str| part.contains('=') || part.parse::<LevelFilter>().is_ok() || is_own(part);
    text.split(',').all(|part| known(part.trim())).then(|| text.parse().ok())?
}

/// Has panics logged like everything else, besides what Rust prints.
fn log_panics() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tracing::error!(%panic, "a bug");
        print(panic);
    }));
}

fn subscriber<W>(levels: Targets, format: LogFormat, writer: W, provider: Option<&SdkTracerProvider>) -> Dispatch
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let registry = tracing_subscriber::registry();
    // Not an `Option` of a span layer: a `None` layer is interested in everything.
    let Some(provider) = provider else {
        return registry.with(levels).with(filter_fn(is_line)).with(log(format, writer)).into();
    };
    // A dynamic filter, which is asked for every line. The filter of a layer remembers its last answer. sqlx asks whether a statement would
    // be logged, and then does not log it. If the answer for the next line is cached, the filter is not asked again, and drops that line
    // instead.
    let lines = dynamic_filter_fn(move |metadata, _| is_line(metadata) && levels.would_enable(metadata.target(), metadata.level()));
    let spans = tracing_opentelemetry::layer().with_tracer(provider.tracer("countersign"));
    registry.with(log(format, writer).with_filter(lines)).with(spans.with_filter(own())).into()
}

fn log<S, W>(format: LogFormat, writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'s> LookupSpan<'s>,
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let log = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Pretty => log.boxed(),
        LogFormat::Json => log.json().boxed(),
    }
}

/// Whether this is a log line, and not a span.
fn is_line(metadata: &Metadata<'_>) -> bool {
    metadata.is_event()
}

/// The spans of this workspace, but never those of the exporter's own HTTP client, which would export themselves.
fn own() -> Targets {
    Targets::new().with_targets(OWN.map(|name| (name, Level::INFO)))
}

fn exporting_to(endpoint: &str, settings: &TelemetrySettings, service: &str) -> Result<SdkTracerProvider, TelemetryError> {
    let exporter = match settings.otel_exporter_otlp_protocol {
        OtlpProtocol::Grpc => {
            let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint);
            if endpoint.starts_with("http://") {
                exporter.build()
            } else {
                // Without this, it would trust no certificate.
                exporter.with_tls_config(ClientTlsConfig::new().with_enabled_roots()).build()
            }
        }
        OtlpProtocol::HttpProtobuf => {
            // The specification appends the signal's path to the base address.
            let traces = format!("{}/v1/traces", endpoint.trim_end_matches('/'));
            SpanExporter::builder().with_http().with_protocol(Protocol::HttpBinary).with_endpoint(traces).build()
        }
    };
    let exporter = exporter.map_err(|error| TelemetryError::Exporter(endpoint.to_owned(), error))?;
    let name = match settings.otel_service_name.trim() {
        "" => service.to_owned(),
        name => name.to_owned(),
    };
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_sampler(sampler(settings.otel_traces_sampler, settings.otel_traces_sampler_arg))
        .with_resource(Resource::builder().with_service_name(name).build())
        .build())
}

fn sampler(sampler: TracesSampler, ratio: f64) -> Sampler {
    let like_parent = |root| Sampler::ParentBased(Box::new(root));
    match sampler {
        TracesSampler::AlwaysOn => Sampler::AlwaysOn,
        TracesSampler::AlwaysOff => Sampler::AlwaysOff,
        TracesSampler::TraceIdRatio => Sampler::TraceIdRatioBased(ratio),
        TracesSampler::ParentBasedAlwaysOn => like_parent(Sampler::AlwaysOn),
        TracesSampler::ParentBasedAlwaysOff => like_parent(Sampler::AlwaysOff),
        TracesSampler::ParentBasedTraceIdRatio => like_parent(Sampler::TraceIdRatioBased(ratio)),
    }
}

/// The current span's context as a `traceparent`. `None` if spans are not recorded.
#[must_use]
pub fn traceparent() -> Option<String> {
    let context = tracing::Span::current().context();
    if !context.span().span_context().is_valid() {
        return None;
    }
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&context, &mut carrier);
    carrier.remove("traceparent")
}

/// Makes `span` a child of the context in `traceparent`, if there is a valid one.
pub fn continue_trace(span: &tracing::Span, traceparent: Option<&str>) {
    let Some(traceparent) = traceparent else { return };
    let carrier = HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
    // This fails only if no exporter runs; then there is no trace to continue.
    let _ = span.set_parent(TraceContextPropagator::new().extract(&carrier));
}

/// Whether `text` is a `traceparent` that can be stored and passed on (<https://www.w3.org/TR/trace-context/#traceparent-header>).
#[must_use]
pub fn is_traceparent(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let hex = |part: &str, length| part.len() == length && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let nonzero = |part: &str| part.bytes().any(|b| b != b'0');
    matches!(parts.as_slice(), [version, trace, span, flags]
        if hex(version, 2) && *version != "ff" && hex(trace, 32) && nonzero(trace) && hex(span, 16) && nonzero(span) && hex(flags, 2))
}

/// Formats an error with its causes in one line.
#[must_use]
pub fn display_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let next_text = next.to_string();
        // Some errors quote their cause.
        if !text.ends_with(&next_text) {
            text.push_str(": ");
            text.push_str(&next_text);
        }
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_traceparent_is_told_from_what_only_looks_like_one() {
        assert!(is_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"));
        for text in [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        ] {
            assert!(!is_traceparent(text), "{text}");
        }
    }

    #[test]
    fn a_word_that_is_no_level_is_refused() {
        for text in ["", "off", "info", "info,worker=debug", "WARN, sqlx=debug", "worker", "worker::sign", "sqlx=debug", "3"] {
            assert!(levels(text).is_some(), "{text}");
        }
        for text in ["inof", "inof,worker=debug", "workers", "a=b=c"] {
            assert!(levels(text).is_none(), "{text}");
        }
    }

    #[test]
    fn a_span_is_made_where_it_is_traced_and_nowhere_else() {
        let makes_a_span = |provider: Option<&SdkTracerProvider>| {
            tracing::dispatcher::with_default(&subscriber("info".parse().unwrap(), LogFormat::Pretty, std::io::sink, provider), || {
                assert!(tracing::event_enabled!(Level::INFO), "the log has its lines either way");
                !tracing::info_span!("any").is_disabled()
            })
        };
        assert!(!makes_a_span(None));
        assert!(makes_a_span(Some(&SdkTracerProvider::builder().build())));
        assert!(!makes_a_span(None), "the answer is not kept from one subscriber to the next");
    }

    #[test]
    fn no_line_is_lost_to_a_question_whether_another_one_would_be_logged() {
        // As the crate `log` does for sqlx.
        let ask = || {
            let statement = tracing::debug_span!(target: "sqlx::query", "statement");
            tracing::dispatcher::get_default(|dispatch| dispatch.enabled(statement.metadata().unwrap()));
        };
        let provider = SdkTracerProvider::builder().build();
        for provider in [None, Some(&provider)] {
            let (mut reader, writer) = std::io::pipe().unwrap();
            let levels = "info,sqlx=warn".parse().unwrap();
            tracing::dispatcher::with_default(&subscriber(levels, LogFormat::Pretty, Arc::new(writer), provider), || {
                for n in 0..3 {
                    ask();
                    tracing::info!("line {n}");
                    tracing::info_span!("any").in_scope(ask);
                    tracing::warn!("line {n}");
                    tracing::debug!("no line");
                }
            });
            let mut log = String::new();
            reader.read_to_string(&mut log).unwrap();
            assert_eq!((log.matches("line").count(), log.matches("no line").count()), (6, 0), "{log}");
        }
    }

    #[test]
    fn samplers_follow_the_names_of_the_specification() {
        let named = |name| format!("{:?}", sampler(<TracesSampler as clap::ValueEnum>::from_str(name, false).unwrap(), 0.25));
        let root = |sampler| format!("{:?}", Sampler::ParentBased(Box::new(sampler)));
        for (name, expected) in [
            ("always_on", format!("{:?}", Sampler::AlwaysOn)),
            ("always_off", format!("{:?}", Sampler::AlwaysOff)),
            ("traceidratio", format!("{:?}", Sampler::TraceIdRatioBased(0.25))),
            ("parentbased_always_on", root(Sampler::AlwaysOn)),
            ("parentbased_always_off", root(Sampler::AlwaysOff)),
            ("parentbased_traceidratio", root(Sampler::TraceIdRatioBased(0.25))),
        ] {
            assert_eq!(named(name), expected, "{name}");
        }
    }
}
