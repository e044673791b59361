//! The callers: one POST after another at a steady pace, each repeated until it is accepted.
//!
//! A caller behaves as the API asks callers to: if there is no answer, or a 503, it retries with another `api` and the same
//! `Idempotency-Key`. Every single POST has to be answered within two seconds, 503 included. A POST does not count if, at any time while it
//! was in flight, its process was killed, not yet ready again, or stopped (SIGSTOP): no program can answer then.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use reqwest::Client;
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::error::line;
use crate::http;

/// The time within which every POST has to be answered.
pub(super) const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// The timeout of one POST; longer than allowed, so that the report can say how late answers are.
const GIVE_UP: Duration = Duration::from_secs(6);
/// The pause between two POSTs of one caller.
const PAUSE: Duration = Duration::from_millis(200);
/// One message in this many was posted before, by another caller.
const SHARED: usize = 5;

/// An `api` process as its callers see it.
#[derive(Debug, Default)]
pub(super) struct Target {
    address: Mutex<String>,
    /// Odd while the process cannot answer, because it was killed or is stopped.
    disturbances: AtomicU64,
    /// POSTs that it accepted.
    pub(super) accepted: AtomicU64,
    /// POSTs that it answered 503.
    pub(super) refused: AtomicU64,
    /// POSTs sent to it.
    pub(super) sent: AtomicU64,
}

impl Target {
    /// Marks the process as unable to answer. Called before the signal is sent.
    pub(super) fn disturbed(&self) {
        self.disturbances.fetch_add(1, Ordering::SeqCst);
    }

    /// Marks the process as able to answer, at this address if it is new. Called once the process is ready or continued.
    pub(super) fn mended(&self, address: Option<String>) {
        if let Some(address) = address {
            *self.address.lock().unwrap_or_else(PoisonError::into_inner) = address;
        }
        self.disturbances.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn address(&self) -> String {
        self.address.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What the callers saw.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// Every accepted request: its id and its message.
    pub(super) accepted: Vec<(String, String)>,
    /// How long each POST that counts took, in no order.
    pub(super) answered_in: Vec<Duration>,
    /// Those of them that took too long: when they began, and the answer.
    pub(super) late: Vec<String>,
    /// The number of them that were answered 503.
    pub(super) refused: usize,
    /// POSTs that count and got no answer, or one that a caller cannot understand.
    pub(super) unanswered: Vec<String>,
    /// The number of POSTs that do not count.
    pub(super) excused: usize,
}

/// The callers.
pub(super) struct Load {
    pub(super) client: Client,
    pub(super) targets: Vec<Arc<Target>>,
    pub(super) key: &'static str,
    pub(super) webhook_url: String,
    pub(super) seed: u64,
    pub(super) pace: Duration,
    /// When the run began; the times of late answers are relative to it.
    pub(super) began: Instant,
}

/// A client that keeps no idle connection to a process that is gone.
pub(super) fn client() -> Result<Client> {
    http::client_that(GIVE_UP, |builder| builder.pool_max_idle_per_host(0))
}

impl Load {
    /// Posts until cancelled, and returns when every message that was begun is accepted.
    pub(super) async fn run(self, stop: CancellationToken) -> Seen {
        let (load, seen) = (Arc::new(self), Arc::new(Mutex::new(Seen::default())));
        let mut callers = JoinSet::new();
        let mut ticks = tokio::time::interval(load.pace);
        for number in 0.. {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = ticks.tick() => {}
            }
            let (load, seen) = (Arc::clone(&load), Arc::clone(&seen));
            callers.spawn(async move { load.caller(number, &seen).await });
        }
        // Each caller ends when its message is accepted; whoever awaits this sets a timeout.
        while callers.join_next().await.is_some() {}
        let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.clone()
    }

    async fn caller(&self, number: usize, seen: &Mutex<Seen>) {
        let original = if number % SHARED == SHARED - 1 { number - 2 } else { number };
        let message = format!("chaos {} #{original}", self.seed);
        let body = json!({ "message": message, "webhookUrl": self.webhook_url }).to_string();
        for attempt in 0.. {
            let target = &self.targets[(number + attempt) % self.targets.len()];
            let before = target.disturbances.load(Ordering::SeqCst);
            target.sent.fetch_add(1, Ordering::SeqCst);
            let started = Instant::now();
            let mut post = self.client.post(format!("{}/crypto/sign", target.address())).header("Content-Type", "application/json");
            post = post.header("X-API-Key", self.key).header("Idempotency-Key", format!("chaos-{number}")).body(body.clone());
            // Half of the callers wait for a signature, the others do not.
            if number.is_multiple_of(2) {
                post = post.header("Prefer", "respond-async");
            }
            let answer = http::json(post).await;
            let took = started.elapsed();
            let disturbed = before % 2 == 1 || target.disturbances.load(Ordering::SeqCst) != before;
            let at = started.saturating_duration_since(self.began);
            let post = Post { number, message: &message, target, at, took, disturbed };
            if post.note(&answer, seen) {
                return;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// One completed POST.
struct Post<'a> {
    number: usize,
    message: &'a str,
    target: &'a Target,
    /// When it began, relative to the start of the run.
    at: Duration,
    took: Duration,
    /// Whether it does not count.
    disturbed: bool,
}

impl Post<'_> {
    /// Records the outcome, and returns whether the POST was accepted.
    fn note(&self, answer: &Answer, seen: &Mutex<Seen>) -> bool {
        let Self { number, message, target, at, took, disturbed } = *self;
        let id = match answer {
            Ok((status, body)) if matches!(status.as_u16(), 200 | 202) => body["id"].as_str(),
            _ => None,
        };
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        match answer {
            _ if disturbed => seen.excused += 1,
            Ok((status, _)) if id.is_some() || status.as_u16() == 503 => {
                seen.answered_in.push(took);
                if took > ANSWER_WITHIN {
                    seen.late.push(format!("POST #{number} at {at:.1?}: {status} after {took:.2?}"));
                }
                if id.is_none() {
                    seen.refused += 1;
                    target.refused.fetch_add(1, Ordering::SeqCst);
                }
            }
            Ok((status, body)) => seen.unanswered.push(format!("POST #{number} at {at:.1?}: {status} {} after {took:.1?}", body["code"])),
            Err(error) => seen.unanswered.push(format!("POST #{number} at {at:.1?}: {} after {took:.1?}", line(error))),
        }
        if let Some(id) = id {
            target.accepted.fetch_add(1, Ordering::SeqCst);
            seen.accepted.push((id.to_owned(), message.to_owned()));
        }
        id.is_some()
    }
}

type Answer = Result<(reqwest::StatusCode, serde_json::Value)>;
