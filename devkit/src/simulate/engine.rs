//! One run: events in time order, and nothing else. There is no clock and no sleep; the same world, discipline and seed give the same run.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::discipline::{Discipline, Queue};
use super::world::World;
use crate::backoff::FailedAttempt;
use crate::policy::{RETRY_EVERY, RETRY_OVERDUE_WINDOWS, Slot};

/// The factor that stretches the window for which a slot waits: `store::slots::CLOCKS_DRIFT` in production.
const CLOCKS_DRIFT: f64 = 1.001;
/// The claim counts competing messages only up to this number.
const COMPETING_COUNTED: usize = 1_000;

/// What happened in a run.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// When the answer with its signature arrived, for each message; `None` for those that the horizon cut off.
    pub signed: Vec<Option<Duration>>,
    /// When the calls arrived, in ascending order.
    pub calls: Vec<Duration>,
    /// The total time in which due work waited for a free slot.
    pub due_time: Duration,
    /// The part of the budget that was used in that time, in slots × time.
    pub spent_time: Duration,
    /// The longest time that a due message waited for its next attempt.
    pub longest_wait: Duration,
    /// The largest fraction of its [`bound`] that a due message waited; above 1, the bound does not hold.
    pub largest_part_of_bound: f64,
}

/// The longest that a due message can wait for its next attempt when `ahead` messages of its lane are due before it.
///
/// `cycle` is a window plus the time of an answer: while due work waits, each slot is used once per cycle.
///
/// Of every [`RETRY_EVERY`] consecutive uses of a slot, one prefers a retry that has been due for [`RETRY_OVERDUE_WINDOWS`] windows, and
/// the others prefer first attempts; each lane is served in the order of due times. So in every [`RETRY_EVERY`] cycles, `calls` retries are
/// called, or `calls` first attempts for each of the other uses, and no message overtakes those ahead of it.
pub fn bound(ahead: usize, retry: bool, calls: u16, cycle: Duration) -> Duration {
    let every = u32::from(RETRY_EVERY);
    let called = u32::from(calls) * if retry { 1 } else { every - 1 };
    let rounds = u32::try_from(ahead).unwrap_or(u32::MAX) / called + 1;
    cycle * (every * rounds + if retry { u32::from(RETRY_OVERDUE_WINDOWS) } else { 0 })
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    attempt: u32,
    first_call: Option<Duration>,
    /// When the message became, or becomes, due.
    due_at: Duration,
    /// The number of messages of its lane that were due when it became due.
    ahead: Option<usize>,
    /// The number of competing messages that the claim saw.
    competing: usize,
    age: Duration,
}

#[derive(Clone, Copy, Debug)]
struct UsedSlot {
    slot: Slot,
    last_call: Option<Duration>,
}

struct Simulation<'a> {
    world: &'a World,
    queue: Queue<'a>,
    rng: SmallRng,
    now: Duration,
    states: Vec<State>,
    slots: Vec<UsedSlot>,
    /// Calls in flight: when the answer arrives, for which message, and whether it is a signature.
    answers: BinaryHeap<Reverse<(Duration, usize, bool)>>,
    /// Retries that are not due yet.
    becoming_due: BinaryHeap<Reverse<(Duration, usize)>>,
    /// The number of due messages in each lane: first attempts, retries.
    due: [usize; 2],
    pending: usize,
    next_arrival: usize,
    run: Run,
}

/// Runs a world under a discipline. The seed determines latencies and jitter.
#[must_use]
pub fn run(world: &World, discipline: Discipline, seed: u64) -> Run {
    let slots = (1..=u32::from(world.rate.calls()))
        .map(|number| UsedSlot { slot: Slot { number, free_at: Duration::ZERO, uses: 0 }, last_call: None })
        .collect();
    let mut simulation = Simulation {
        world,
        queue: Queue::new(discipline, &world.messages),
        rng: SmallRng::seed_from_u64(seed),
        now: Duration::ZERO,
        states: vec![State::default(); world.messages.len()],
        slots,
        answers: BinaryHeap::new(),
        becoming_due: BinaryHeap::new(),
        due: [0; 2],
        pending: 0,
        next_arrival: 0,
        run: Run { signed: vec![None; world.messages.len()], ..Run::default() },
    };
    while let Some(next) = simulation.next_event() {
        simulation.account(next);
        simulation.now = next;
        simulation.admit();
        simulation.answer();
        simulation.call();
    }
    simulation.run
}

impl Simulation<'_> {
    fn next_event(&self) -> Option<Duration> {
        let arrival = self.world.messages.get(self.next_arrival).map(|message| message.arrives);
        let answer = self.answers.peek().map(|Reverse((at, ..))| *at);
        let due = self.becoming_due.peek().map(|Reverse((at, _))| *at);
        let free = self.queue.due_waits(self.now).then(|| self.slots.iter().map(|used| used.slot.free_at).min()).flatten();
        [arrival, answer, due, free].into_iter().flatten().min().map(|at| at.max(self.now)).filter(|at| *at <= self.world.horizon)
    }

    /// Adds up the budget that is used until `next`, if due work is waiting.
    fn account(&mut self, next: Duration) {
        if !self.queue.due_waits(self.now) {
            return;
        }
        self.run.due_time += next.saturating_sub(self.now);
        let window = self.world.rate.window();
        for used in &self.slots {
            let until = used.last_call.map_or(Duration::ZERO, |call| call + window).min(next);
            self.run.spent_time += until.saturating_sub(self.now);
        }
    }

    fn admit(&mut self) {
        while let Some(message) = self.world.messages.get(self.next_arrival).filter(|message| message.arrives <= self.now) {
            let number = self.next_arrival;
            self.queue.arrived(message.arrives, number);
            self.states[number] = State { due_at: message.arrives, ahead: Some(self.due[0]), ..State::default() };
            self.due[0] += 1;
            self.pending += 1;
            self.next_arrival += 1;
        }
        self.ripen();
    }

    /// Counts the retries that have become due.
    fn ripen(&mut self) {
        while let Some(Reverse((at, number))) = self.becoming_due.peek().copied().filter(|Reverse((at, _))| *at <= self.now) {
            debug_assert_eq!(at, self.states[number].due_at);
            self.becoming_due.pop();
            self.states[number].ahead = Some(self.due[1]);
            self.due[1] += 1;
        }
    }

    fn answer(&mut self) {
        while let Some(Reverse((_, number, signed))) = self.answers.peek().copied().filter(|Reverse((at, ..))| *at <= self.now) {
            self.answers.pop();
            if signed {
                self.run.signed[number] = Some(self.now);
                self.pending -= 1;
                continue;
            }
            let state = &mut self.states[number];
            let failure = FailedAttempt {
                attempt: state.attempt,
                competing: u32::try_from(state.competing).unwrap_or(u32::MAX),
                interval: self.world.rate.interval(),
                age: state.age,
            };
            let ends = state.first_call.unwrap_or_default() + self.world.messages[number].outage;
            state.due_at = self.queue.failed(self.now, number, failure, ends, &mut self.rng);
            self.becoming_due.push(Reverse((state.due_at, number)));
        }
        self.ripen();
    }

    fn call(&mut self) {
        let free: Vec<Slot> = self.slots.iter().map(|used| used.slot).filter(|slot| slot.free_at <= self.now).collect();
        if free.is_empty() || !self.queue.due_waits(self.now) {
            return;
        }
        let window = self.world.rate.window();
        let cycle = window.mul_f64(CLOCKS_DRIFT) + *self.world.latency.end();
        let competing = self.pending.min(COMPETING_COUNTED);
        for (number, slot) in self.queue.pick(self.now, window, &free) {
            let (state, message) = (&mut self.states[number], &self.world.messages[number]);
            let retry = state.attempt > 0;
            self.due[usize::from(retry)] -= 1;
            let waited = self.now.saturating_sub(state.due_at);
            let bound = bound(state.ahead.unwrap_or_default(), retry, self.world.rate.calls(), cycle);
            self.run.longest_wait = self.run.longest_wait.max(waited);
            self.run.largest_part_of_bound = self.run.largest_part_of_bound.max(waited.div_duration_f64(bound));
            state.attempt += 1;
            (state.competing, state.age) = (competing, self.now.saturating_sub(message.arrives));
            let first = *state.first_call.get_or_insert(self.now);
            let signed = self.now >= first + message.outage;
            let answered = self.now + self.rng.random_range(self.world.latency.clone());
            let used = &mut self.slots[slot as usize - 1];
            used.slot.free_at = answered + window.mul_f64(CLOCKS_DRIFT);
            used.slot.uses += 1;
            used.last_call = Some(self.now);
            self.run.calls.push(self.now);
            self.answers.push(Reverse((answered, number, signed)));
        }
    }
}
