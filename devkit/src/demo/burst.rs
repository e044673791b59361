//! Posts the messages at an even pace and follows each one to its end.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::progress::Progress;
use crate::hex::hex;
use crate::http;
use crate::upstream::sha256;

/// What the caller of one message saw.
#[derive(Clone, Debug, Default)]
pub(super) struct Outcome {
    /// SHA-256 of the message, in hexadecimal.
    pub(super) message_digest: String,
    /// When it was posted, counted from the first one.
    pub(super) posted: Duration,
    /// The status of the answer to the POST; `None` if there was no answer.
    pub(super) answer: Option<u16>,
    /// How long the POST took.
    pub(super) answered_in: Duration,
    /// The ID of the request, once accepted.
    pub(super) id: Option<String>,
    /// The signature, and the time from the start of the POST until the caller had it.
    pub(super) signature: Option<(String, Duration)>,
}

/// What to post, where, and how long to follow it.
#[derive(Clone)]
pub(super) struct Burst {
    pub(super) client: Client,
    pub(super) api: String,
    pub(super) key: String,
    pub(super) webhook_url: String,
    pub(super) total: usize,
    /// The messages are spread evenly over this time.
    pub(super) window: Duration,
    /// How long the whole demo may take.
    pub(super) bound: Duration,
}

impl Burst {
    /// Runs until every message is signed and its webhook is delivered, or until the bound is reached. `changed` signals that the result of
    /// `delivered` may have changed.
    pub(super) async fn run(
        self,
        progress: &Progress,
        mut changed: watch::Receiver<()>,
        delivered: impl Fn() -> HashSet<String>,
    ) -> Vec<Outcome> {
        let deadline = Instant::now() + self.bound;
        let (total, pace) = (self.total, self.window / u32::try_from(self.total).unwrap_or(u32::MAX));
        let burst = Arc::new(self);
        let run = uuid::Uuid::now_v7();
        let mut tasks = JoinSet::new();
        let began = tokio::time::Instant::now();
        for number in 1..=total {
            let burst = Arc::clone(&burst);
            let due = began + pace * u32::try_from(number - 1).unwrap_or(u32::MAX);
            tasks.spawn(async move {
                tokio::time::sleep_until(due).await;
                // Each run has its own messages: otherwise, a second run would be answered from the first.
                let posted = began.elapsed();
                Outcome { posted, ..burst.follow(format!("demo {run} #{number} of {total}"), deadline).await }
            });
        }
        let mut outcomes = Vec::with_capacity(total);
        loop {
            let ids = delivered();
            let signed = outcomes.iter().filter(|outcome: &&Outcome| outcome.signature.is_some()).count();
            progress.show(signed, ids.len().min(total));
            let all_delivered = outcomes.iter().all(|outcome| outcome.id.as_ref().is_some_and(|id| ids.contains(id)));
            let left = deadline.saturating_duration_since(Instant::now());
            if (outcomes.len() == total && all_delivered) || left.is_zero() {
                return outcomes;
            }
            tokio::select! {
                Some(outcome) = tasks.join_next() => outcomes.push(outcome.unwrap_or_default()),
                _ = changed.changed() => {}
                () = tokio::time::sleep(left) => {}
            }
        }
    }

    async fn follow(&self, message: String, deadline: Instant) -> Outcome {
        let began = Instant::now();
        let mut outcome = Outcome { message_digest: hex(&sha256(message.as_bytes())), ..Outcome::default() };
        let post = self.client.post(format!("{}/crypto/sign", self.api)).header("Content-Type", "application/json");
        let body = json!({ "message": message, "webhookUrl": self.webhook_url }).to_string();
        let Ok((status, mut answer)) = http::json(post.header("X-API-Key", &self.key).body(body)).await else {
            outcome.answered_in = began.elapsed();
            return outcome;
        };
        outcome.answer = Some(status.as_u16());
        outcome.answered_in = began.elapsed();
        outcome.id = answer["id"].as_str().map(str::to_owned);
        let Some(id) = outcome.id.clone() else { return outcome };
        loop {
            match answer["status"].as_str() {
                Some("signed") => {
                    outcome.signature = answer["signature"].as_str().map(|signature| (signature.to_owned(), began.elapsed()));
                    return outcome;
                }
                Some("failed") => return outcome,
                _ if Instant::now() > deadline => return outcome,
                _ => answer = self.state(&id).await,
            }
        }
    }

    /// The state of the request once it is final, or after a while; null if there is no answer.
    async fn state(&self, id: &str) -> Value {
        let get = self.client.get(format!("{}/crypto/sign/{id}", self.api));
        let answer = http::json(get.header("X-API-Key", &self.key).header("Prefer", "wait=20")).await;
        if let Ok((StatusCode::OK, state)) = answer {
            return state;
        }
        // The stack may be restarted during the demo, which is meant to survive that.
        tokio::time::sleep(Duration::from_millis(500)).await;
        Value::Null
    }
}
