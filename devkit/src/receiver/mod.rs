//! A receiver of webhooks: records every delivery, verifies it with a library that is not ours, and misbehaves on request.
//!
//! Any path is recorded as it is, so that one receiver can serve many tests or tell requests apart; paths that begin with `_` control it.
//! `service` is the HTTP side, `behaviour` the ways to answer, `hostile` receivers that mean harm.

mod behaviour;
mod hostile;
mod service;

pub use behaviour::{Behaviour, Misbehaviour};
pub use hostile::{Hostile, Hostility};

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use clap::Args;
use http::HeaderMap;
use serde_json::{Value, json};
use standardwebhooks::Webhook;
use tokio::sync::watch;

use crate::error::{Context, Error, Result};
use crate::signals;
use crate::wire::Server;
use service::{Service, State};

/// One request that reached the receiver.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// `webhook-id`; empty when the header is missing.
    pub webhook_id: String,
    /// `webhook-timestamp`, in seconds.
    pub timestamp: Option<i64>,
    /// Did the independent library accept the signature and the timestamp?
    pub verified: bool,
    /// Why not.
    pub refusal: Option<String>,
    /// The how-manieth of this webhook id, from 1.
    pub number: u32,
    /// The path it was sent to.
    pub path: String,
    /// The body; null when it is no JSON.
    pub body: Value,
    /// The body, byte for byte.
    pub raw: Bytes,
    /// All headers.
    pub headers: HeaderMap,
    /// When the body was complete.
    pub received_at: SystemTime,
    /// What was answered; `None`: nothing.
    pub status: Option<u16>,
}

/// What a receiver is made with.
#[derive(Clone, Debug, Default)]
pub struct ReceiverOptions {
    /// The `whsec_…` to verify with; `None`: nothing verifies.
    pub secret: Option<String>,
}

/// A running receiver. Dropping it stops it.
pub struct Receiver {
    server: Server,
    service: Arc<Service>,
}

impl Receiver {
    /// Starts on the address; port 0 is a free one.
    ///
    /// # Errors
    /// When it cannot listen there, or the secret is none.
    pub async fn start(listen: SocketAddr, options: ReceiverOptions) -> Result<Self> {
        let secret = options.secret.map(|secret| Webhook::new(&secret)).transpose().context(|| "the webhook secret")?;
        let service = Arc::new(Service { secret, state: Mutex::new(State::default()), changed: watch::Sender::new(()) });
        Ok(Self { server: Server::start(listen, Arc::clone(&service)).await?, service })
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.server.addr()
    }

    /// The address of a path, which begins with `/`.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr())
    }

    /// All deliveries so far, in the order of their arrival.
    #[must_use]
    pub fn deliveries(&self) -> Vec<Delivery> {
        self.service.state().deliveries.clone()
    }

    /// Behaves so from now on, wherever no path has a behaviour of its own.
    pub fn set_behaviour(&self, behaviour: Behaviour) {
        self.service.state().behave(None, behaviour);
    }

    /// Behaves so from now on at this path.
    pub fn set_behaviour_of(&self, path: &str, behaviour: Behaviour) {
        self.service.state().behave(Some(path.to_owned()), behaviour);
    }

    /// Waits until the deliveries satisfy the condition, and returns them.
    ///
    /// # Errors
    /// When they do not within the bound; the error says how many there are.
    pub async fn wait_for(&self, bound: Duration, condition: impl Fn(&[Delivery]) -> bool) -> Result<Vec<Delivery>> {
        // Subscribed before the first look: a delivery in between is a change.
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
        tokio::time::timeout(bound, satisfied).await.map_err(|_| {
            Error::new(format!("not within {bound:?}; {} deliveries: {}", self.deliveries().len(), summary(&self.deliveries())))
        })
    }

    /// How many deliveries are such.
    pub fn count(&self, which: impl Fn(&Delivery) -> bool) -> usize {
        self.service.state().deliveries.iter().filter(|delivery| which(delivery)).count()
    }

    /// Changes with every delivery.
    pub(crate) fn watch(&self) -> watch::Receiver<()> {
        self.service.changed.subscribe()
    }

    /// Stops, and returns when every connection is closed.
    pub async fn stop(self) {
        self.server.stop().await;
    }
}

/// What `GET /_deliveries` answers: counts, and the deliveries without their headers.
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

/// `devkit receiver`: prints a line per delivery until a signal comes.
pub(crate) async fn run(args: ReceiverArgs) -> Result<()> {
    let receiver = Receiver::start(args.listen, ReceiverOptions { secret: Some(args.webhook_secret) }).await?;
    say!("webhook receiver on {}; deliveries: {}", receiver.url("/"), receiver.url("/_deliveries"));
    let mut changed = receiver.service.changed.subscribe();
    let mut printed = 0;
    // One future for all rounds, so that no signal falls between two.
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
