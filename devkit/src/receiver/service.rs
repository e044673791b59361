//! The HTTP side of the receiver: records a delivery, then answers according to the behaviour that is set.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use hyper::body::Incoming;
use hyper::header::{HeaderValue, LOCATION, RETRY_AFTER};
use hyper::{Method, Request, Response, StatusCode};
use standardwebhooks::Webhook;
use tokio::sync::watch;

use super::{Behaviour, Delivery, Misbehaviour};
use crate::wire::{self, Body, Handler, Reply};

/// The interval between two bytes of a slow body.
const SLOW: Duration = Duration::from_millis(250);
/// The number of deliveries that are kept; the oldest are dropped first.
const REMEMBERED: usize = 100_000;

/// The state shared by all requests.
pub(super) struct Service {
    pub(super) secret: Option<Webhook>,
    pub(super) state: Mutex<State>,
    /// Notified after every delivery, so that waiters check again.
    pub(super) changed: watch::Sender<()>,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) behaviour: Behaviour,
    pub(super) behaviour_of_path: HashMap<String, Behaviour>,
    pub(super) deliveries: Vec<Delivery>,
    /// The number of deliveries of each webhook ID.
    seen: HashMap<String, u32>,
}

impl Service {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn deliver(&self, request: Request<Incoming>) -> Reply {
        let (parts, body) = request.into_parts();
        let Ok(body) = wire::read(body).await else { return Reply::Close };
        let refusal = match &self.secret {
            Some(secret) => secret.verify(&body, &parts.headers).err().map(|error| error.to_string()),
            None => Some("no secret to verify with".to_owned()),
        };
        let header = |name| parts.headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).map(str::to_owned);
        let id = header("webhook-id").unwrap_or_default();
        let path = parts.uri.path().to_owned();
        let (misbehaviour, response, latency) = {
            let mut state = self.state();
            let seen = state.seen.entry(id.clone()).or_default();
            *seen += 1;
            let number = *seen;
            let behaviour = state.behaviour_of_path.get(&path).unwrap_or(&state.behaviour).clone();
            let misbehaviour = behaviour.of(number).cloned();
            let response = answer(&behaviour, misbehaviour.as_ref());
            if state.deliveries.len() == REMEMBERED {
                state.deliveries.remove(0);
            }
            state.deliveries.push(Delivery {
                webhook_id: id,
                timestamp: header("webhook-timestamp").and_then(|text| text.parse().ok()),
                verified: refusal.is_none(),
                refusal,
                number,
                path,
                body: serde_json::from_slice(&body).unwrap_or_default(),
                raw: body,
                headers: parts.headers,
                received_at: SystemTime::now(),
                status: response.as_ref().map(|response| response.status().as_u16()),
            });
            (misbehaviour, response, behaviour.latency_ms)
        };
        self.changed.send_replace(());
        if latency > 0 {
            tokio::time::sleep(Duration::from_millis(latency)).await;
        }
        match (response, misbehaviour) {
            (Some(response), _) => Reply::Answer(response),
            (None, Some(Misbehaviour::Hang)) => std::future::pending().await,
            (None, _) => Reply::Close,
        }
    }

    async fn set_behaviour(&self, request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().query().and_then(|query| query.strip_prefix("path=")).map(str::to_owned);
        let body = wire::read(request.into_body()).await.unwrap_or_default();
        match serde_json::from_slice::<Behaviour>(&body) {
            Ok(behaviour) if behaviour.valid() => {
                self.state().behave(path, behaviour);
                wire::empty(StatusCode::NO_CONTENT)
            }
            Ok(_) => wire::text(StatusCode::BAD_REQUEST, "a status is a number from 200 to 599"),
            Err(error) => wire::text(StatusCode::BAD_REQUEST, error.to_string()),
        }
    }
}

impl State {
    pub(super) fn behave(&mut self, path: Option<String>, behaviour: Behaviour) {
        match path {
            Some(path) => drop(self.behaviour_of_path.insert(path, behaviour)),
            None => self.behaviour = behaviour,
        }
    }
}

/// The answer; `None` if none is given.
fn answer(behaviour: &Behaviour, misbehaviour: Option<&Misbehaviour>) -> Option<Response<Body>> {
    let status = |status| StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = match misbehaviour {
        None => wire::empty(status(behaviour.status)),
        Some(Misbehaviour::Status { status: other }) => wire::empty(status(*other)),
        Some(Misbehaviour::SlowBody) => wire::slow(StatusCode::OK, SLOW),
        Some(Misbehaviour::Redirect { location }) => {
            let mut response = wire::empty(StatusCode::FOUND);
            response.headers_mut().insert(LOCATION, HeaderValue::from_str(location).ok()?);
            response
        }
        Some(Misbehaviour::Hang | Misbehaviour::Drop) => return None,
    };
    if let Some(seconds) = behaviour.retry_after.filter(|_| !response.status().is_success()) {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    Some(response)
}

impl Handler for Service {
    async fn handle(self: Arc<Self>, request: Request<Incoming>) -> Reply {
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/_deliveries") => Reply::Answer(wire::json(StatusCode::OK, &super::summary(&self.state().deliveries))),
            (&Method::DELETE, "/_deliveries") => {
                self.state().deliveries.clear();
                Reply::Answer(wire::empty(StatusCode::NO_CONTENT))
            }
            (&Method::PUT, "/_behaviour") => Reply::Answer(self.set_behaviour(request).await),
            (_, path) if path.starts_with("/_") => {
                Reply::Answer(wire::text(StatusCode::NOT_FOUND, "GET|DELETE /_deliveries, PUT /_behaviour[?path=/…]"))
            }
            // Any method: a client that follows a redirect with GET should be recorded, not hidden.
            _ => self.deliver(request).await,
        }
    }
}
