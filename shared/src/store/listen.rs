//! Notifications: hints that something may have changed. They are never data, and never required: whoever waits also polls.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{JobKind, Store};

/// What a notification hints at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hint {
    /// There may be a job of this kind.
    Jobs(JobKind),
    /// The outcomes of messages may be available, by [`crate::message::MessageDigest::hint`].
    Results(Vec<u64>),
    /// The API keys have changed.
    Keys,
    /// Anything may have changed: notifications were lost.
    Everything,
}

pub(super) const JOBS: &str = "countersign_jobs";
pub(super) const RESULTS: &str = "countersign_results";
pub(super) const KEYS: &str = "countersign_keys";

/// The maximum number of digests in one notification: Postgres allows payloads below 8,000 bytes, and each digest takes 17.
pub(super) const MOST_HINTS: usize = 400;

/// The payload of a notification about these results; `*` if there are too many to list.
pub(super) fn results_payload(hints: impl ExactSizeIterator<Item = u64>) -> String {
    if hints.len() > MOST_HINTS {
        return "*".to_owned();
    }
    hints.map(|hint| format!("{hint:016x}")).collect::<Vec<_>>().join(",")
}

fn read(channel: &str, payload: &str) -> Hint {
    match (channel, payload) {
        (JOBS, name) if name == JobKind::Sign.name() => Hint::Jobs(JobKind::Sign),
        (JOBS, name) if name == JobKind::Webhook.name() => Hint::Jobs(JobKind::Webhook),
        (KEYS, _) => Hint::Keys,
        (RESULTS, list) => {
            let hints: Option<Vec<u64>> = list.split(',').map(|hex| u64::from_str_radix(hex, 16).ok()).collect();
            hints.map_or(Hint::Everything, Hint::Results)
        }
        _ => Hint::Everything,
    }
}

/// Which notifications a process listens to.
#[derive(Clone, Copy, Debug)]
pub enum Audience {
    /// Results and keys.
    Api,
    /// Jobs.
    Worker,
}

impl Store {
    /// Passes hints to `tell` until `stop` is cancelled. Each time it has (re)connected, it passes [`Hint::Everything`], because
    /// notifications in between are lost. It never fails: while Postgres is down there is nothing to hear, and behind a proxy that keeps no
    /// sessions there never is. Whoever waits also polls.
    pub async fn listen(&self, audience: Audience, stop: CancellationToken, tell: impl Fn(Hint)) {
        let channels: &[&str] = match audience {
            Audience::Api => &[RESULTS, KEYS],
            Audience::Worker => &[JOBS],
        };
        let listening = async {
            loop {
                let ended = self.listen_once(channels, &tell).await;
                self.listening.store(false, Ordering::Release);
                if ended.as_ref().is_ok_and(|ended| *ended == Listening::Unsupported) {
                    tracing::warn!("Postgres is behind a proxy that keeps no sessions, so nothing can be listened to: polling alone");
                    return std::future::pending().await;
                }
                tracing::debug!(error = ended.err().map(tracing::field::display), "the listening connection is gone; connecting again");
                tell(Hint::Everything);
                tokio::time::sleep(RECONNECT_AFTER).await;
            }
        };
        stop.run_until_cancelled(listening).await;
    }

    async fn listen_once(&self, channels: &[&str], tell: &impl Fn(Hint)) -> Result<Listening, sqlx::Error> {
        let Some(mut listener) = self.database.listener().await? else { return Ok(Listening::Unsupported) };
        listener.eager_reconnect(false);
        let subscribed = tokio::time::timeout(ALIVE_WITHIN, listener.listen_all(channels.iter().copied()));
        subscribed.await.map_err(|_| sqlx::Error::PoolTimedOut)??;
        self.listening.store(true, Ordering::Release);
        tell(Hint::Everything);
        loop {
            match tokio::time::timeout(SILENT_FOR, listener.try_recv()).await {
                Ok(Ok(Some(notification))) => tell(read(notification.channel(), notification.payload())),
                Ok(Ok(None)) => return Ok(Listening::Ended),
                Ok(Err(error)) => return Err(error),
                // A server that vanished silently sends nothing either.
                Err(_) => {
                    let alive = tokio::time::timeout(ALIVE_WITHIN, sqlx::raw_sql("select 1").execute(&mut listener));
                    alive.await.map_err(|_| sqlx::Error::PoolTimedOut)??;
                }
            }
        }
    }

    /// Whether notifications arrive at present. If not, whoever waits for something has to poll more often.
    #[must_use]
    pub fn is_listening(&self) -> bool {
        self.listening.load(Ordering::Acquire)
    }
}

/// How listening ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listening {
    /// The connection was lost.
    Ended,
    /// No connection can receive notifications.
    Unsupported,
}

/// The time without a notification after which the connection is checked, and the timeout of that check.
const SILENT_FOR: Duration = Duration::from_secs(5);
const ALIVE_WITHIN: Duration = Duration::from_secs(2);

const RECONNECT_AFTER: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_is_read_as_it_was_written() {
        let hints = vec![0, 1, u64::MAX];
        assert_eq!(read(RESULTS, &results_payload(hints.clone().into_iter())), Hint::Results(hints));
        assert_eq!(read(JOBS, "sign"), Hint::Jobs(JobKind::Sign));
    }

    #[test]
    fn too_many_results_wake_everybody_and_so_does_what_cannot_be_read() {
        let payload = results_payload((0..1000).collect::<Vec<u64>>().into_iter());
        assert_eq!(read(RESULTS, &payload), Hint::Everything);
        assert_eq!(read("other", "?"), Hint::Everything);
        assert!(results_payload((0..400).collect::<Vec<u64>>().into_iter()).len() < 8000);
    }
}
