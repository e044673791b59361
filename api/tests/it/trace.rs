//! One trace from the caller's POST to the webhook, as an OTLP collector sees it, over either protocol.

use std::collections::HashMap;
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use devkit::receiver::Behaviour;
use devkit::upstream::{FaultKind, When};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use poem::listener::{Acceptor, Listener, TcpListener};
use poem::{EndpointExt, Route, handler, post, web::Data};
use prost::Message;
use serde_json::json;

use crate::world::{Env, KEY, Options, SECRET, World, answer, env, until};

/// What a collector has received: the spans, and all of it as text.
#[derive(Clone, Default)]
struct Spans {
    spans: Arc<Mutex<Vec<Span>>>,
    text: Arc<Mutex<String>>,
}

#[derive(Clone, Debug)]
struct Span {
    name: String,
    trace: String,
    id: String,
    parent: String,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

impl Spans {
    fn collect(&self, request: ExportTraceServiceRequest) {
        write!(self.text.lock().unwrap(), "{request:?}").unwrap();
        let sent = request.resource_spans.into_iter().flat_map(|r| r.scope_spans).flat_map(|s| s.spans);
        self.spans.lock().unwrap().extend(sent.map(|span| Span {
            name: span.name,
            trace: hex(&span.trace_id),
            id: hex(&span.span_id),
            parent: hex(&span.parent_span_id),
        }));
    }

    fn of(&self, trace: &str) -> Vec<Span> {
        self.spans.lock().unwrap().iter().filter(|span| span.trace == trace).cloned().collect()
    }
}

#[handler]
async fn over_http(Data(spans): Data<&Spans>, body: poem::Body) -> Vec<u8> {
    spans.collect(ExportTraceServiceRequest::decode(body.into_bytes().await.unwrap()).unwrap());
    ExportTraceServiceResponse::default().encode_to_vec()
}

#[tonic::async_trait]
impl TraceService for Spans {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.collect(request.into_inner());
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn collector_over_http(spans: Spans) -> SocketAddr {
    let acceptor = TcpListener::bind("127.0.0.1:0").into_acceptor().await.unwrap();
    let address = *acceptor.local_addr()[0].as_socket_addr().unwrap();
    tokio::spawn(poem::Server::new_with_acceptor(acceptor).run(Route::new().at("/v1/traces", post(over_http)).data(spans)));
    address
}

async fn collector_over_grpc(spans: Spans) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    tokio::spawn(tonic::transport::Server::builder().add_service(TraceServiceServer::new(spans)).serve_with_incoming(incoming));
    address
}

#[tokio::test]
async fn the_callers_trace_is_continued_through_insert_attempts_upstream_call_and_webhook() {
    let spans = Spans::default();
    let collector = collector_over_http(spans.clone()).await;
    one_trace(spans, collector, "http/protobuf").await;
}

#[tokio::test]
async fn the_callers_trace_arrives_over_grpc_too() {
    let spans = Spans::default();
    let collector = collector_over_grpc(spans.clone()).await;
    one_trace(spans, collector, "grpc").await;
}

/// The settings of a program that exports to `collector`.
fn exporting_to(collector: SocketAddr, protocol: &str) -> Env {
    env(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &format!("http://{collector}")),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
        ("OTEL_BSP_SCHEDULE_DELAY", "100"),
    ])
}

async fn one_trace(spans: Spans, collector: SocketAddr, protocol: &str) {
    let otlp = exporting_to(collector, protocol);
    let world = World::with(Options { api: otlp.clone(), worker: otlp, ..Options::default() }).await;
    world.fault(FaultKind::Outage, When::Next(1)).await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let post = world.post(&json!({ "message": "traced", "webhookUrl": world.hook("/") }));
    answer(post.header("traceparent", format!("00-{trace}-00f067aa0ba902b7-01")).send().await.unwrap()).await;
    let delivered = world.deliveries(1).await.remove(0).headers["traceparent"].to_str().unwrap().to_owned();
    assert!(delivered.starts_with(&format!("00-{trace}-")), "{delivered}");

    until("every span has come", async || {
        let names: Vec<String> = spans.of(trace).into_iter().map(|span| span.name).collect();
        let count = |name: &str| names.iter().filter(|other| other.as_str() == name).count();
        count("POST /crypto/sign") == 1 && count("sign.attempt") == 2 && count("upstream.sign") == 2 && count("webhook.attempt") == 1
    })
    .await;
    let all = spans.of(trace);
    let by_id: HashMap<&str, &Span> = all.iter().map(|span| (span.id.as_str(), span)).collect();
    for span in &all {
        let parent = by_id.get(span.parent.as_str()).map_or(span.parent.as_str(), |parent| parent.name.as_str());
        let expected = match span.name.as_str() {
            "POST /crypto/sign" => "00f067aa0ba902b7",
            "sign.attempt" | "webhook.attempt" => "POST /crypto/sign",
            "upstream.sign" => "sign.attempt",
            other => panic!("a span {other}"),
        };
        assert_eq!(parent, expected, "the parent of {}", span.name);
    }
}

#[tokio::test]
async fn messages_signatures_and_keys_are_in_no_log_span_metric_or_problem() {
    let spans = Spans::default();
    let settings = [exporting_to(collector_over_http(spans.clone()).await, "http/protobuf"), env(&[("RUST_LOG", "debug")])].concat();
    let world = World::with(Options { api: settings.clone(), worker: settings, ..Options::default() }).await;
    // What fails is logged and traced as well.
    world.fault(FaultKind::Outage, When::Next(1)).await;
    world.receiver.set_behaviour(Behaviour::fail_first(1, 500));
    let headers = json!({ "authorization": "private-header" });
    let body = |message: &str| json!({ "message": message, "webhookUrl": world.hook("/private-path"), "webhookHeaders": headers, "clientRequestId": "private-key" });
    let signed = answer(world.post(&body("private-message")).header("Prefer", "wait=30").send().await.unwrap()).await;
    assert_eq!(signed.status, 200);
    world.deliveries(2).await;
    until("every span has come", async || {
        let text = spans.text.lock().unwrap();
        text.matches("webhook.attempt").count() == 2 && text.matches("upstream.sign").count() == 2
    })
    .await;

    let mut texts = vec![world.api.log(), world.worker.log(), spans.text.lock().unwrap().clone()];
    for url in [&world.url, &world.worker_url] {
        texts.push(world.client.get(format!("{url}/metrics")).send().await.unwrap().text().await.unwrap());
    }
    let mut invalid = body("private-message");
    invalid["webhookUrl"] = json!("http://user:private-password@10.0.0.1/");
    invalid["webhookHeaders"] = json!({ "a b": "private-header" });
    for (body, status) in [(body("another private-message"), 422), (invalid, 400)] {
        let problem = world.post(&body).send().await.unwrap();
        assert_eq!(problem.status(), status);
        texts.push(problem.text().await.unwrap());
    }
    let unknown = world.client.get(format!("{}/crypto/sign/{}", world.url, signed.id())).header("X-API-Key", "private-unknown-key");
    let unknown = unknown.send().await.unwrap();
    assert_eq!(unknown.status(), 401);
    texts.extend([unknown.text().await.unwrap(), world.api.log()]);
    let signature = signed.body["signature"].as_str().unwrap();
    for text in texts {
        assert!(!text.is_empty());
        for secret in ["private-", signature, KEY, "upstream-key", SECRET] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
    }
}
