//! Telling others, after the commit: what was hinted at while a notification was under way, or soon after it, goes together into the next one.
//!
//! Not in the transaction that makes it true: while that is being forced to the disk, Postgres lets no other transaction commit that notifies,
//! so that they would be forced there one by one. A statement that does nothing but notify has nothing to force. What a process does not tell,
//! because it is killed in between or Postgres is away, is found by polling, as is whatever else is not heard. Only a new message that comes
//! alone, and an outcome that does, are not told under load, and save the round trip: see [`goes_with_commit`].

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::task::TaskTracker;

use super::Store;
use super::database::Database;
use super::listen::{Hint, JOBS, JobKind, MOST_HINTS, RESULTS, results_payload};

/// From the end of one to the begin of the next, of those that are sent after a commit. Each one wakes all who listen to this database,
/// whatever they want to hear: with more processes there are more of both.
const BETWEEN: Duration = Duration::from_millis(5);

/// The longest a notification may take; beyond, the connection is taken for dead. And how long the end of a process waits for the last ones.
const SEND_WITHIN: Duration = Duration::from_secs(2);
const CLOSE_WITHIN: Duration = Duration::from_secs(3);

/// Most results that wait to be told, in as many notifications as they need; of more than these nobody is told which they are.
const MOST_RESULTS: usize = 16 * MOST_HINTS;

/// Whether a group of this size notifies in its own transaction: this process has nothing else to commit at the moment.
pub(super) fn goes_with_commit(group: usize) -> bool {
    group == 1
}

impl Store {
    /// Tells others of what was committed, soon, and waits for nothing.
    pub(super) fn tell(&self, hints: impl IntoIterator<Item = Hint>) {
        self.notifier.tell(&self.database, hints);
    }
}

/// Sends notifications. Clones share what waits to be sent.
#[derive(Clone, Debug, Default)]
pub(super) struct Notifier {
    waiting: Arc<Mutex<Waiting>>,
    tasks: TaskTracker,
}

#[derive(Debug, Default)]
struct Waiting {
    jobs: HashSet<JobKind>,
    results: Vec<u64>,
    /// Whether somebody is sending, and will look here again.
    is_sending: bool,
}

impl Notifier {
    fn tell(&self, database: &Database, hints: impl IntoIterator<Item = Hint>) {
        let mut waiting = self.waiting();
        for hint in hints {
            waiting.add(hint);
        }
        if !waiting.is_empty() && !std::mem::replace(&mut waiting.is_sending, true) {
            self.tasks.spawn(self.clone().send(database.clone()));
        }
    }

    /// Waits until all is sent, but not for a Postgres that stands still.
    pub(super) async fn close(&self) {
        self.tasks.close();
        let _ = tokio::time::timeout(CLOSE_WITHIN, self.tasks.wait()).await;
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
            let sent = tokio::time::timeout(SEND_WITHIN, send).await;
            if let Err(error) = sent.unwrap_or(Err(sqlx::Error::PoolTimedOut)) {
                tracing::debug!(%error, "could not notify; those who wait look by themselves");
            }
            tokio::time::sleep(BETWEEN).await;
        }
    }

    /// What waits, as columns; nothing: nobody is sending any more.
    fn next(&self) -> Option<(Vec<&'static str>, Vec<String>)> {
        let mut waiting = self.waiting();
        waiting.is_sending = !waiting.is_empty();
        waiting.is_sending.then(|| waiting.take())
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn add(&mut self, hint: Hint) {
        match hint {
            Hint::Jobs(kind) => {
                self.jobs.insert(kind);
            }
            Hint::Results(results) => self.results.extend(results.into_iter().take(MOST_RESULTS + 1 - self.results.len())),
            // Told by what changes them.
            Hint::Keys | Hint::Everything => {}
        }
    }

    fn is_empty(&self) -> bool {
        self.jobs.is_empty() && self.results.is_empty()
    }

    fn take(&mut self) -> (Vec<&'static str>, Vec<String>) {
        let jobs = self.jobs.drain().map(|kind| (JOBS, kind.payload().to_owned()));
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
        let mut waiting = Waiting::default();
        for hint in [Hint::Jobs(JobKind::Webhook), Hint::Results(vec![1]), Hint::Jobs(JobKind::Webhook), Hint::Results(vec![2, 3])] {
            waiting.add(hint);
        }
        let told = (vec![JOBS, RESULTS], vec!["webhook".to_owned(), results_payload([1, 2, 3].into_iter())]);
        assert_eq!(waiting.take(), told);
        assert!(waiting.is_empty());
    }

    #[test]
    fn many_results_are_several_notifications_and_too_many_are_one() {
        let payloads = |results: usize| {
            let mut waiting = Waiting::default();
            (0..results as u64).for_each(|hint| waiting.add(Hint::Results(vec![hint])));
            assert!(waiting.results.len() <= MOST_RESULTS + 1);
            waiting.take().1
        };
        assert_eq!(payloads(MOST_HINTS).len(), 1);
        assert_eq!(payloads(MOST_HINTS + 1).len(), 2);
        assert!(payloads(MOST_RESULTS).iter().all(|payload| payload != "*"));
        assert_eq!(payloads(MOST_RESULTS + 1), ["*"]);
        assert_eq!(payloads(2 * MOST_RESULTS), ["*"]);
    }
}
