//! Sends notifications after the commit. Hints that arrive while a notification is being sent, or soon after, go together into the next
//! one.
//!
//! They are not sent in the transaction that they announce: while it is being flushed to disk, Postgres lets no other notifying transaction
//! commit, so these transactions would be flushed one by one. A statement that only notifies has nothing to flush. If a notification is not
//! sent, because the process is killed in between or Postgres is down, polling finds the change, as it does for any notification that is
//! not heard. A single new message or a single outcome is announced in its own transaction ([`goes_with_commit`]): no other commit of this
//! process waits then, and it saves the round trip.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::database::Database;
use super::listen::{Hint, JOBS, MOST_HINTS, RESULTS, results_payload};
use super::{JobKind, Store, within};
use crate::telemetry::display_chain;

/// The pause from the end of one notification to the start of the next, for those that are sent after a commit. Each one wakes everything
/// that listens on this database, whatever it wants to hear; more processes mean more notifications and more listeners.
const BETWEEN: Duration = Duration::from_millis(5);

/// The maximum time for a notification. After it, the connection is assumed dead.
const SEND_WITHIN: Duration = Duration::from_secs(2);

/// The maximum number of waiting results that are announced by name, in as many notifications as needed; above it, none is named.
const MOST_RESULTS: usize = 16 * MOST_HINTS;

/// Whether a batch of this size notifies in its own transaction: this process has nothing else to commit at the moment.
pub(super) fn goes_with_commit(group: usize) -> bool {
    group == 1
}

impl Store {
    /// Announces what was committed, soon, without waiting for anything.
    pub(super) fn tell(&self, hints: impl IntoIterator<Item = Hint>) {
        if self.notifier.add(hints) {
            self.tasks.spawn(self.notifier.clone().send(self.database.clone()));
        }
    }
}

/// Sends notifications. Clones share the outbox.
#[derive(Clone, Debug, Default)]
pub(super) struct Notifier {
    outbox: Arc<Mutex<Outbox>>,
}

#[derive(Debug, Default)]
struct Outbox {
    jobs: HashSet<JobKind>,
    results: Vec<u64>,
    /// Whether a task is sending, and will look here again.
    is_sending: bool,
}

impl Notifier {
    /// Adds `hints` to the outbox. Returns `true` if no task is sending, and the caller has to start one.
    fn add(&self, hints: impl IntoIterator<Item = Hint>) -> bool {
        let mut outbox = self.outbox();
        for hint in hints {
            outbox.add(hint);
        }
        !outbox.is_empty() && !std::mem::replace(&mut outbox.is_sending, true)
    }

    async fn send(self, database: Database) {
        while let Some((channels, payloads)) = self.next() {
            let send = sqlx::query!(
                "-- notify
                select set_config('synchronous_commit', 'off', true), pg_notify(channel, payload)
                from unnest($1::text[], $2::text[]) as hints (channel, payload)",
                &channels as _,
                &payloads,
            )
            .fetch_all(&database);
            if let Err(error) = within(SEND_WITHIN, async { Ok(send.await?) }).await {
                tracing::debug!(error = display_chain(&error), "could not notify; those who wait look by themselves");
            }
            tokio::time::sleep(BETWEEN).await;
        }
    }

    /// Takes what is waiting, as columns. `None` if nothing is; then no task is sending any more.
    fn next(&self) -> Option<(Vec<&'static str>, Vec<String>)> {
        let mut outbox = self.outbox();
        outbox.is_sending = !outbox.is_empty();
        outbox.is_sending.then(|| outbox.take())
    }

    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outbox {
    fn add(&mut self, hint: Hint) {
        match hint {
            Hint::Jobs(kind) => {
                self.jobs.insert(kind);
            }
            Hint::Results(results) => self.results.extend(results.into_iter().take(MOST_RESULTS + 1 - self.results.len())),
            // Announced by the code that changes them.
            Hint::Keys | Hint::Everything => {}
        }
    }

    fn is_empty(&self) -> bool {
        self.jobs.is_empty() && self.results.is_empty()
    }

    fn take(&mut self) -> (Vec<&'static str>, Vec<String>) {
        let jobs = self.jobs.drain().map(|kind| (JOBS, kind.name().to_owned()));
        let results = std::mem::take(&mut self.results);
        let largest = if results.len() > MOST_RESULTS { results.len() } else { MOST_HINTS };
        let results = results.chunks(largest).map(|some| (RESULTS, results_payload(some.iter().copied())));
        jobs.chain(results).unzip()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_goes_together_and_is_told_once() {
        let mut outbox = Outbox::default();
        for hint in [Hint::Jobs(JobKind::Webhook), Hint::Results(vec![1]), Hint::Jobs(JobKind::Webhook), Hint::Results(vec![2, 3])] {
            outbox.add(hint);
        }
        let told = (vec![JOBS, RESULTS], vec!["webhook".to_owned(), results_payload([1, 2, 3].into_iter())]);
        assert_eq!(outbox.take(), told);
        assert!(outbox.is_empty());
    }

    #[test]
    fn many_results_are_several_notifications_and_too_many_are_one() {
        let payloads = |results: usize| {
            let mut outbox = Outbox::default();
            (0..results as u64).for_each(|hint| outbox.add(Hint::Results(vec![hint])));
            assert!(outbox.results.len() <= MOST_RESULTS + 1);
            outbox.take().1
        };
        assert_eq!(payloads(MOST_HINTS).len(), 1);
        assert_eq!(payloads(MOST_HINTS + 1).len(), 2);
        assert!(payloads(MOST_RESULTS).iter().all(|payload| payload != "*"));
        assert_eq!(payloads(MOST_RESULTS + 1), ["*"]);
        assert_eq!(payloads(2 * MOST_RESULTS), ["*"]);
    }
}
