//! The endpoints for operators: liveness, readiness and metrics. They are the same for `api` and `worker`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use poem::http::StatusCode;
use poem::web::{Data, Json};
use poem::{EndpointExt, IntoEndpoint, IntoResponse, Response, Route, get, handler};
use serde_json::json;
use tokio::sync::Mutex;

use crate::store::upstream::UpstreamState;
use crate::store::{Store, StoreError};

/// How long the readiness check waits for Postgres before it fails.
const READY_WITHIN: Duration = Duration::from_secs(1);

/// Postgres is asked at most this often for readiness, and as often for the gauges: callers must not be able to put load on it. A process
/// that is not ready is asked more often, because somebody waits for it.
const ASK_EVERY: Duration = Duration::from_secs(1);
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(50);

const UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// Bounds of the histograms, in seconds: from a fast statement to the default timeout of a call to the upstream.
const SECONDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];

/// Whether a process has completed its start-up: the schema, the bootstrap key, the agreed rate. Clones share the flag.
#[derive(Clone, Debug, Default)]
pub struct Prepared(Arc<AtomicBool>);

impl Prepared {
    /// Marks the start-up as completed.
    pub fn done(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether the start-up is completed.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Installs the metrics recorder, once per process, and returns the handle that renders the metrics.
fn recorder() -> PrometheusHandle {
    static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();
    RECORDER
        .get_or_init(|| {
            let recorder = PrometheusBuilder::new()
                .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), SECONDS)
                .expect("the list of bounds is not empty")
                .install_recorder()
                .expect("no other recorder is installed in this process");
            describe();
            // Samples accumulate until they are sorted into their buckets, and `/metrics` may never be requested.
            let upkeep = recorder.clone();
            tokio::spawn(async move {
                loop {
                    tokio::time::sleep(UPKEEP_EVERY).await;
                    upkeep.run_upkeep();
                }
            });
            recorder
        })
        .clone()
}

/// What each metric says, as `docs/metrics.md` has it: a test compares the names.
fn describe() {
    metrics::describe_counter!("countersign_http_requests_total", "Answers to callers.");
    metrics::describe_histogram!("countersign_http_request_seconds", "How long answers to callers took.");
    metrics::describe_counter!("countersign_jobs_claimed_total", "Jobs that were claimed.");
    metrics::describe_counter!("countersign_claim_errors_total", "Claims that failed.");
    metrics::describe_counter!("countersign_attempts_total", "Attempts that ended, by outcome.");
    metrics::describe_counter!("countersign_leases_lost_total", "Outcomes that were not written, because the lease had run out.");
    metrics::describe_histogram!("countersign_upstream_seconds", "How long calls to the upstream took.");
    metrics::describe_histogram!("countersign_webhook_seconds", "How long deliveries took.");
    metrics::describe_counter!("countersign_requests_deleted_total", "Requests that were deleted after RETENTION.");
    metrics::describe_gauge!("countersign_postgres_up", "1 if Postgres answered.");
    metrics::describe_gauge!("countersign_requests_pending", "Unfinished requests.");
    metrics::describe_gauge!("countersign_upstream_paused_seconds", "How long the upstream asked to wait: the time that is left.");
    metrics::describe_gauge!("countersign_upstream_breaker_open", "1 while the circuit breaker is open.");
    metrics::describe_gauge!("countersign_upstream_breaker_failures", "Failures in a row that keep it open.");
}

/// `GET /health/live`, `GET /health/ready` and `GET /metrics`.
pub fn routes(store: Store, prepared: Prepared) -> impl IntoEndpoint {
    health(store.clone(), prepared).nest("/", metrics_endpoint(store))
}

/// `GET /health/live` and `GET /health/ready`.
pub fn health(store: Store, prepared: Prepared) -> Route {
    let readiness = Arc::new(Readiness { store, prepared, checked: Mutex::default() });
    Route::new().at("/health/live", get(live)).at("/health/ready", get(ready).data(readiness))
}

/// `GET /metrics`.
pub fn metrics_endpoint(store: Store) -> Route {
    Route::new().at("/metrics", get(figures).data(recorder()).data(Arc::new(Gauges { store, read: Mutex::default() })))
}

#[handler]
fn live() -> Json<serde_json::Value> {
    Json(json!({ "status": "alive" }))
}

/// Whether the process is ready, and when this was checked.
struct Readiness {
    store: Store,
    prepared: Prepared,
    checked: Mutex<Option<(Instant, StatusCode, serde_json::Value)>>,
}

impl Readiness {
    async fn check(&self) -> (StatusCode, serde_json::Value) {
        let mut checked = self.checked.lock().await;
        if let Some((at, status, body)) = &*checked
            && at.elapsed() < if status.is_success() { ASK_EVERY } else { ASK_AGAIN_AFTER }
        {
            return (*status, body.clone());
        }
        let asked = async {
            self.store.check_schema().await?;
            self.store.upstream().await
        };
        let (status, body) = match tokio::time::timeout(READY_WITHIN, asked).await {
            Ok(Ok(upstream)) if self.prepared.is_done() => {
                (StatusCode::OK, json!({ "status": "ready", "upstream": upstream.as_ref().map(upstream_json) }))
            }
            Ok(Ok(_)) => (StatusCode::SERVICE_UNAVAILABLE, json!({ "status": "starting" })),
            Ok(Err(StoreError::SchemaBehind | StoreError::Schema(_))) => {
                (StatusCode::SERVICE_UNAVAILABLE, json!({ "status": "schema out of date" }))
            }
            Ok(Err(_)) | Err(_) => (StatusCode::SERVICE_UNAVAILABLE, json!({ "status": "Postgres unavailable" })),
        };
        *checked = Some((Instant::now(), status, body.clone()));
        (status, body)
    }
}

#[handler]
async fn ready(Data(readiness): Data<&Arc<Readiness>>) -> Response {
    let (status, body) = readiness.check().await;
    Json(body).with_status(status).into_response()
}

/// The state of the upstream, for operators. A process whose upstream is down is ready all the same: the messages it accepts are signed
/// later.
fn upstream_json(upstream: &UpstreamState) -> serde_json::Value {
    json!({
        "rate": upstream.rate.to_string(),
        "pausedForSeconds": upstream.paused_for.as_secs_f64(),
        "breaker": match &upstream.breaker {
            None => json!({ "state": "closed" }),
            Some(open) => json!({
                "state": "open",
                "reason": open.reason,
                "failures": open.failures,
                "probeInSeconds": open.probe_in.as_secs_f64(),
            }),
        },
    })
}

/// The gauges that are read from Postgres when metrics are requested, and when they were last read.
struct Gauges {
    store: Store,
    read: Mutex<Option<Instant>>,
}

impl Gauges {
    async fn refresh(&self) {
        let mut read = self.read.lock().await;
        if read.is_some_and(|at| at.elapsed() < ASK_EVERY) {
            return;
        }
        let asked = async { Ok::<_, StoreError>((self.store.upstream().await?, self.store.pending_requests().await?)) };
        let answer = tokio::time::timeout(READY_WITHIN, asked).await;
        *read = Some(Instant::now());
        metrics::gauge!("countersign_postgres_up").set(u8::from(matches!(answer, Ok(Ok(_)))));
        if let Ok(Ok((upstream, pending))) = answer {
            #[expect(clippy::cast_precision_loss, reason = "a gauge is a float")]
            metrics::gauge!("countersign_requests_pending").set(pending as f64);
            if let Some(upstream) = upstream {
                metrics::gauge!("countersign_upstream_paused_seconds").set(upstream.paused_for.as_secs_f64());
                metrics::gauge!("countersign_upstream_breaker_open").set(u8::from(upstream.breaker.is_some()));
                metrics::gauge!("countersign_upstream_breaker_failures").set(upstream.breaker.map_or(0, |open| open.failures));
            }
        }
    }
}

#[handler]
async fn figures(Data(recorder): Data<&PrometheusHandle>, Data(gauges): Data<&Arc<Gauges>>) -> Response {
    gauges.refresh().await;
    recorder.run_upkeep();
    Response::builder().content_type("text/plain; version=0.0.4; charset=utf-8").body(recorder.render())
}
