//! The order in which waiting messages are called, and when a failed one is due again.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::rngs::SmallRng;

use super::world::Message;
use crate::backoff::{Backoff, FailedAttempt};
use crate::policy::{self, Due, Slot};

/// A scheduling discipline.
#[derive(Clone, Copy, Debug)]
pub enum Discipline {
    /// One queue; a failed message goes to its end at once.
    Fifo,
    /// One queue; a failed message goes to its end after a delay. The limiter, delayed set and FIFO `wait` list of `BullMQ` amount to this;
    /// its `exponential` backoff is that of [`Backoff`], from the base without jitter.
    Delayed(Backoff),
    /// Ours: [`policy::pick`] and the delays of `SIGN_RETRY_STRATEGY`.
    Ours(Backoff),
    /// Knows every outage: starts the longest ones first, and calls again when they are over, never sooner.
    Clairvoyant,
}

/// The waiting messages, in the order of a discipline.
#[derive(Debug)]
pub struct Queue<'a> {
    discipline: Discipline,
    messages: &'a [Message],
    /// Messages that have never been tried.
    fresh: BTreeSet<Due>,
    retries: BTreeSet<Due>,
    /// When each message is or was due, by message number.
    due_at: Vec<Duration>,
}

impl<'a> Queue<'a> {
    /// An empty queue for these messages.
    pub fn new(discipline: Discipline, messages: &'a [Message]) -> Self {
        Self { discipline, messages, fresh: BTreeSet::new(), retries: BTreeSet::new(), due_at: vec![Duration::ZERO; messages.len()] }
    }

    /// Adds a message that was posted.
    pub fn arrived(&mut self, now: Duration, number: usize) {
        self.due_at[number] = now;
        self.fresh.insert(Due { at: now, job: job(number) });
    }

    /// Adds a message that failed, and returns when it is due again.
    pub fn failed(&mut self, now: Duration, number: usize, failure: FailedAttempt, outage_ends: Duration, rng: &mut SmallRng) -> Duration {
        let at = match self.discipline {
            Discipline::Fifo => now,
            Discipline::Delayed(backoff) | Discipline::Ours(backoff) => now + backoff.delay(failure, rng),
            Discipline::Clairvoyant => now.max(outage_ends),
        };
        self.due_at[number] = at;
        self.retries.insert(Due { at, job: job(number) });
        at
    }

    /// Returns whether a due message is waiting.
    pub fn due_waits(&self, now: Duration) -> bool {
        !self.fresh.is_empty() || self.retries.first().is_some_and(|due| due.at <= now)
    }

    /// Removes the messages to call now and returns them, each with a slot.
    pub fn pick(&mut self, now: Duration, window: Duration, slots: &[Slot]) -> Vec<(usize, u32)> {
        let most = slots.len();
        let due = |queue: &BTreeSet<Due>| queue.iter().copied().take(most).take_while(|due| due.at <= now).collect::<Vec<_>>();
        let picked = match self.discipline {
            Discipline::Ours(_) => policy::pick(now, window, most, &due(&self.fresh), &due(&self.retries), slots),
            Discipline::Fifo | Discipline::Delayed(_) => {
                let mut all = due(&self.fresh);
                all.extend(due(&self.retries));
                all.sort_unstable();
                all.into_iter().zip(slots).map(|(due, slot)| (due.job, slot.number)).collect()
            }
            Discipline::Clairvoyant => {
                let outage = |due: &Due| self.messages[number(due.job)].outage;
                let mut fresh: Vec<Due> = self.fresh.iter().copied().collect();
                fresh.sort_by_key(|due| std::cmp::Reverse(outage(due)));
                let failing = fresh.iter().filter(|due| !outage(due).is_zero()).count();
                let (failing, others) = fresh.split_at(failing);
                let ordered = failing.iter().chain(&due(&self.retries)).chain(others).copied().collect::<Vec<_>>();
                ordered.into_iter().zip(slots).map(|(due, slot)| (due.job, slot.number)).collect()
            }
        };
        let mut taken = Vec::with_capacity(picked.len());
        for (job, slot) in picked {
            let due = Due { at: self.due_at[number(job)], job };
            if !self.fresh.remove(&due) {
                self.retries.remove(&due);
            }
            taken.push((number(job), slot));
        }
        taken
    }
}

fn job(number: usize) -> i64 {
    i64::try_from(number).expect("there are fewer messages than that")
}

fn number(job: i64) -> usize {
    usize::try_from(job).expect("it was made from a number")
}
