//! A webhook receiver that records every delivery, verifies it with an independent library, and misbehaves on request.
//!
//! It accepts any path and records it, so that one receiver can serve many tests or tell requests apart. Paths that begin with `/_` control
//! it. `service` is the HTTP side, `behaviour` has the ways to answer, `hostile` has malicious receivers.

mod behaviour;
mod hostile;
mod service;

pub use behaviour::{Behaviour, Misbehaviour};
pub use hostile::{Hostile, Hostility};

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use clap::Args;
use http::HeaderMap;
use serde_json::{Value, json};
use standardwebhooks::Webhook;
use tokio::sync::watch;

use crate::signals;
use crate::wire::Server;
use service::{Service, State};

/// One request that reached the receiver.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// The header `webhook-id`; empty if it is missing.
    pub webhook_id: String,
    /// The header `webhook-timestamp`, in seconds; `None` if it is missing or not a number.
    pub timestamp: Option<i64>,
    /// Whether the independent library accepted the signature and the timestamp.
    pub verified: bool,
    /// Why it did not; `None` if it did.
    pub refusal: Option<String>,
    /// The number of this delivery among those of its webhook ID, from 1.
    pub number: u32,
    /// The path of the request.
    pub path: String,
    /// The body as JSON; null if it is not JSON.
    pub body: Value,
    /// The body, byte for byte.
    pub raw: Bytes,
    /// All headers.
    pub headers: HeaderMap,
    /// When the body was complete.
    pub received_at: SystemTime,
    /// The status of the answer; `None` if there was no answer.
    pub status: Option<u16>,
}

/// The options of a receiver.
#[derive(Clone, Debug, Default)]
pub struct ReceiverOptions {
    /// The secret (`whsec_…`) to verify with; if `None`, no delivery is verified.
    pub secret: Option<String>,
}

/// A running receiver. Dropping it stops it.
pub struct Receiver {
    server: Server,
    service: Arc<Service>,
}

impl Receiver {
    /// Starts a receiver on the address; port 0 is any free port.
    ///
    /// # Errors
    /// If it cannot listen there, or the secret is invalid.
    pub async fn start(listen: SocketAddr, options: ReceiverOptions) -> Result<Self> {
        let secret = options.secret.map(|secret| Webhook::new(&secret)).transpose().context("the webhook secret")?;
        let service = Arc::new(Service { secret, state: Mutex::new(State::default()), changed: watch::Sender::new(()) });
        Ok(Self { server: Server::start(listen, Arc::clone(&service)).await?, service })
    }

    /// The address that it listens on.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.server.addr()
    }

    /// The URL of a path, which must begin with `/`.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr())
    }

    /// All deliveries so far, in the order of arrival.
    #[must_use]
    pub fn deliveries(&self) -> Vec<Delivery> {
        self.service.state().deliveries.clone()
    }

    /// Sets the behaviour for all paths that have none of their own.
    pub fn set_behaviour(&self, behaviour: Behaviour) {
        self.service.state().behave(None, behaviour);
    }

    /// Sets the behaviour for this path.
    pub fn set_behaviour_of(&self, path: &str, behaviour: Behaviour) {
        self.service.state().behave(Some(path.to_owned()), behaviour);
    }

    /// Waits until the deliveries satisfy the condition, and returns them.
    ///
    /// # Errors
    /// If they do not within the bound; the error includes the deliveries.
    pub async fn wait_for(&self, bound: Duration, condition: impl Fn(&[Delivery]) -> bool) -> Result<Vec<Delivery>> {
        // Subscribe before the first check, so that a delivery in between is not missed.
        let mut changed = self.service.changed.subscribe();
        let satisfied = async {
            loop {
                let deliveries = self.deliveries();
                if condition(&deliveries) {
                    return deliveries;
                }
                changed.changed().await.expect("the sender lives as long as the receiver");
            }
        };
        tokio::time::timeout(bound, satisfied)
            .await
            .map_err(|_| anyhow!("not within {bound:?}; {} deliveries: {}", self.deliveries().len(), summary(&self.deliveries())))
    }

    /// The number of deliveries that match the predicate.
    pub fn count(&self, which: impl Fn(&Delivery) -> bool) -> usize {
        self.service.state().deliveries.iter().filter(|delivery| which(delivery)).count()
    }

    /// A channel that changes with every delivery.
    pub(crate) fn watch(&self) -> watch::Receiver<()> {
        self.service.changed.subscribe()
    }

    /// Stops the receiver, and waits until every connection is closed.
    pub async fn stop(self) {
        self.server.stop().await;
    }
}

/// The answer to `GET /_deliveries`: counts, and the deliveries without their headers.
fn summary(deliveries: &[Delivery]) -> Value {
    let ids: BTreeSet<&str> = deliveries.iter().map(|delivery| delivery.webhook_id.as_str()).collect();
    let verified = deliveries.iter().filter(|delivery| delivery.verified).count();
    let each: Vec<Value> = deliveries
        .iter()
        .map(|delivery| {
            let at = delivery.received_at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
            json!({
                "webhookId": delivery.webhook_id, "timestamp": delivery.timestamp, "verified": delivery.verified,
                "refusal": delivery.refusal, "number": delivery.number, "path": delivery.path, "body": delivery.body,
                "receivedAtMs": u64::try_from(at).unwrap_or(u64::MAX), "status": delivery.status,
            })
        })
        .collect();
    json!({ "count": deliveries.len(), "verified": verified, "distinctWebhookIds": ids.len(), "deliveries": each })
}

/// The settings of `devkit receiver`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ReceiverArgs {
    /// Where to listen.
    #[arg(long, env = "RECEIVER_LISTEN", default_value = "127.0.0.1:9100")]
    listen: SocketAddr,
    /// The `whsec_…` to verify with.
    #[arg(long, env = "WEBHOOK_SECRET", default_value = crate::stack::WEBHOOK_SECRET, hide_env_values = true)]
    webhook_secret: String,
}

/// `devkit receiver`: prints a line per delivery until a signal arrives.
pub(crate) async fn run(args: ReceiverArgs) -> Result<()> {
    let receiver = Receiver::start(args.listen, ReceiverOptions { secret: Some(args.webhook_secret) }).await?;
    say!("webhook receiver on {}; deliveries: {}", receiver.url("/"), receiver.url("/_deliveries"));
    let mut changed = receiver.service.changed.subscribe();
    let mut printed = 0;
    // One future for all iterations, so that no signal is lost between two.
    let mut stop = std::pin::pin!(signals::terminate());
    loop {
        for delivery in receiver.deliveries().iter().skip(printed) {
            printed += 1;
            let verdict = delivery.refusal.as_deref().unwrap_or("verified");
            say!("{} {} #{} {verdict} {}", delivery.path, delivery.webhook_id, delivery.number, delivery.body);
        }
        tokio::select! {
            _ = changed.changed() => {}
            signal = &mut stop => return signal,
        }
    }
}
