//! The HTTP side of the simulated upstream: reads a call, asks the model, waits, answers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, HeaderValue, RETRY_AFTER};
use hyper::{Method, Request, Response, StatusCode};

use super::audit::{CallKind, CallNumber};
use super::model::{Call, Model, Verdict};
use super::signer::Signer;
use super::{Digest, Faults, query, sha256};
use crate::wire::{self, Body, Handler, Reply};

/// The state shared by all requests.
pub(super) struct Service {
    pub(super) api_key: String,
    pub(super) rate: crate::units::Rate,
    pub(super) signer: Signer,
    pub(super) started: Instant,
    pub(super) model: Mutex<Model>,
    /// Sends faults that came over HTTP to the simulator, which owns the listener.
    pub(super) fault_requests: tokio::sync::mpsc::UnboundedSender<Faults>,
}

impl Service {
    pub(super) fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn audit(&self, since: Duration) -> super::Audit {
        let model = self.model();
        let outages_ms = model.outages().lengths_ms(since);
        super::Audit { outages_ms, ..model.log.audit(self.rate.calls(), self.rate.window(), self.started.elapsed(), since) }
    }

    fn key_matches(&self, request: &Request<Incoming>) -> bool {
        request.headers().get(AUTHORIZATION).is_some_and(|value| value.as_bytes() == self.api_key.as_bytes())
    }

    async fn crypto(self: Arc<Self>, kind: CallKind, request: Request<Incoming>) -> Reply {
        let query = request.uri().query().unwrap_or_default();
        let value = |name| query::parameter(query, name).ok().flatten();
        let message = value("message").filter(|message| std::str::from_utf8(message).is_ok_and(|text| !text.is_empty()));
        let signature = value("signature").unwrap_or_default();
        let digest = message.as_deref().map(sha256);
        let call = Call { kind, key_matches: self.key_matches(&request), message: digest };

        let (number, verdict, latency) = {
            let mut model = self.model();
            // The clock is read under the lock, so that calls are recorded in time order.
            let now = self.started.elapsed();
            model.arrive(now, &call)
        };
        let mut under_way = UnderWay { service: &self, number, kind, message: digest, status: None, complete: false };
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
        let message = message.unwrap_or_default();
        let response = match verdict {
            Verdict::Hang => std::future::pending().await,
            Verdict::Close => return Reply::Close,
            Verdict::Reset => return Reply::Reset,
            Verdict::Sign => wire::text(StatusCode::OK, self.sign(message).await),
            Verdict::SignTruncated => wire::truncated(&self.sign(message).await.into()),
            Verdict::Verify if self.signer.verify(&message, &signature) => wire::text(StatusCode::OK, "ok"),
            Verdict::Verify => wire::text(StatusCode::BAD_REQUEST, "The signature is not one of this message."),
            Verdict::BadRequest => wire::text(StatusCode::BAD_REQUEST, "A message is needed: ?message=, percent-encoded UTF-8."),
            Verdict::Unauthorized => unauthorized(),
            Verdict::TooMany { retry_after } => {
                let mut response = wire::text(StatusCode::TOO_MANY_REQUESTS, "Too many requests.");
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(retry_after));
                response
            }
            Verdict::Error => wire::text(StatusCode::INTERNAL_SERVER_ERROR, "Internal server error."),
            Verdict::Degraded => wire::text(StatusCode::BAD_GATEWAY, "Failed to sign message due to simulated service degradation."),
        };
        under_way.status = Some(response.status().as_u16());
        under_way.complete = verdict != Verdict::SignTruncated;
        Reply::Answer(response)
    }

    /// Signs on a blocking thread: it takes a millisecond or more of CPU time, and the runtime's threads have sockets to serve.
    async fn sign(&self, message: Vec<u8>) -> String {
        let signer = self.signer.clone();
        tokio::task::spawn_blocking(move || signer.sign(&message)).await.expect("signing does not panic")
    }

    async fn control(&self, request: Request<Incoming>) -> Response<Body> {
        let since = request.uri().query().and_then(|query| query::parameter(query, "since").ok().flatten());
        let since = since.and_then(|ms| std::str::from_utf8(&ms).ok()?.parse().ok()).map_or(Duration::ZERO, Duration::from_millis);
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/_audit") => wire::json(StatusCode::OK, &self.audit(since)),
            (&Method::DELETE, "/_audit") => {
                self.model().log.reset();
                wire::empty(StatusCode::NO_CONTENT)
            }
            (&Method::GET, "/_faults") => wire::json(StatusCode::OK, &self.model().faults),
            (&Method::DELETE, "/_faults") => self.request_faults(Faults::default()),
            (&Method::PUT, "/_faults") => {
                let body = wire::read(request.into_body()).await.unwrap_or_default();
                match serde_json::from_slice::<Faults>(&body) {
                    Ok(faults) if faults.valid() => self.request_faults(faults),
                    Ok(_) => wire::text(StatusCode::BAD_REQUEST, "a probability is a number from 0 to 1"),
                    Err(error) => wire::text(StatusCode::BAD_REQUEST, error.to_string()),
                }
            }
            _ => wire::text(StatusCode::NOT_FOUND, "GET|DELETE /_audit, GET|PUT|DELETE /_faults"),
        }
    }

    /// Sets the faults. Faults of calls apply at once; open connections are cut, and the listener is closed, when the answer is on its way.
    fn request_faults(&self, faults: Faults) -> Response<Body> {
        self.model().faults = faults.clone();
        let requests = self.fault_requests.clone();
        // It fails only while the simulator stops, which closes the connections anyway.
        wire::and_then(wire::empty(StatusCode::NO_CONTENT), move || drop(requests.send(faults)))
    }
}

impl Handler for Service {
    fn accepts(&self) -> bool {
        self.model().accepts()
    }

    async fn handle(self: Arc<Self>, request: Request<Incoming>) -> Reply {
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/crypto/sign") => self.crypto(CallKind::Sign, request).await,
            (&Method::GET, "/crypto/verify") => self.crypto(CallKind::Verify, request).await,
            (&Method::GET, "/") if self.key_matches(&request) => {
                Reply::Answer(wire::text(StatusCode::OK, "Welcome to the simulated signing service."))
            }
            (&Method::GET, "/") => Reply::Answer(unauthorized()),
            (_, path) if path.starts_with("/_") => Reply::Answer(self.control(request).await),
            _ => Reply::Answer(wire::text(StatusCode::NOT_FOUND, "Not found.")),
        }
    }
}

fn unauthorized() -> Response<Body> {
    wire::text(StatusCode::UNAUTHORIZED, "The API key is missing or wrong.")
}

/// A call in flight. Its end is recorded by `drop`, because a client that disconnects ends a call, too.
struct UnderWay<'a> {
    service: &'a Service,
    number: CallNumber,
    kind: CallKind,
    message: Option<Digest>,
    status: Option<u16>,
    complete: bool,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.service.model().log.ended(self.number, self.kind, self.message, self.status, self.complete);
    }
}
