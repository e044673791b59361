//! The slots against everything that a network, a crash and a clock can do, in a time that runs as fast as the statements.
//!
//! Time is moved by subtracting it from every stored time, so the statements under test are the real ones and Postgres's clock is the only
//! one. What a worker and the network do with a call is simulated: within its lease a call may be sent late, arrive late, be answered late,
//! never be answered, or never be sent. The upstream counts what arrives, by a clock of its own that runs fast or slow.

use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use shared::store::sign_claim::SignJob;
use shared::store::sign_finish::{Call, SignEnding, SignFinish};
use shared::units::Rate;

use crate::fixture::{Fixture, LEASE, finish};

/// How much faster or slower the upstream's clock may run: the most that NTP corrects.
const CLOCK_SKEW: f64 = 0.0005;

/// One run of the simulation.
struct Play {
    f: Fixture,
    rng: SmallRng,
    started: Instant,
    moved: Duration,
    /// Outcomes yet to be written, each with its time.
    open: Vec<(Duration, SignFinish)>,
    /// When each call was claimed, and when it arrives.
    calls: Vec<(Duration, Duration)>,
    /// The agreed rates, each with the time since which it applies.
    rates: Vec<(Duration, Rate)>,
}

impl Play {
    async fn new(seed: u64, rate: &str) -> Self {
        let f = Fixture::without_rate().await;
        f.agree(rate).await;
        let requests: Vec<_> = (0..60).map(|n| f.request(&format!("message {n}"))).collect();
        f.store.accept(&requests, u64::MAX).await.unwrap();
        let rng = SmallRng::seed_from_u64(seed);
        Self {
            f,
            rng,
            started: Instant::now(),
            moved: Duration::ZERO,
            open: vec![],
            calls: vec![],
            rates: vec![(Duration::ZERO, rate.parse().unwrap())],
        }
    }

    fn now(&self) -> Duration {
        self.moved + self.started.elapsed()
    }

    /// A random time up to `most`, often short.
    fn some(&mut self, most: Duration) -> Duration {
        most.mul_f64(self.rng.random_range(0.0f64..1.0).powi(3))
    }

    /// Lets time pass, and writes the outcomes that are due.
    async fn pass(&mut self, time: Duration) {
        self.moved += time;
        let seconds = time.as_secs_f64();
        self.f
            .run(&format!(
                "update upstream_slots set free_at = free_at - make_interval(secs => {seconds});
                update jobs set next_run_at = next_run_at - make_interval(secs => {seconds}),
                    leased_until = leased_until - make_interval(secs => {seconds});"
            ))
            .await;
        let now = self.now();
        let (due, open) = std::mem::take(&mut self.open).into_iter().partition(|(at, _)| *at <= now);
        self.open = open;
        let finishes: Vec<SignFinish> = Vec::into_iter(due).map(|(_, finish)| finish).collect();
        self.f.store.finish_sign_jobs(&finishes).await.unwrap();
    }

    /// Claims jobs as a worker does, and decides what becomes of each call.
    async fn claim(&mut self) {
        let most = self.rng.random_range(1..=6);
        for job in self.f.claim(most).await {
            self.play(job);
        }
    }

    fn play(&mut self, job: SignJob) {
        let claimed = self.now();
        // Sent within the lease, as the worker sees it, however little of the lease is left.
        let arrives = claimed + self.some(LEASE);
        let answered = arrives + self.some((claimed + LEASE).saturating_sub(arrives));
        let delay = self.some(Duration::from_mins(3));
        let outcome = finish(job, SignEnding::Retry(delay));
        match self.rng.random_range(0..10) {
            // Killed before, during or after the call: no outcome is written.
            0 => {}
            1 | 2 => self.calls.push((claimed, arrives)),
            // Never sent: given back, or no connection was made.
            3 => self.open.push((answered, SignFinish { call: Call::NotMade, ending: SignEnding::Released, ..outcome })),
            // Suspended after its call, for longer than its lease.
            4 => {
                self.calls.push((claimed, arrives));
                self.open.push((claimed + LEASE + delay, outcome));
            }
            _ => {
                self.calls.push((claimed, arrives));
                self.open.push((answered, outcome));
            }
        }
    }

    /// Asserts that no call is one too many in the window that it closes, by the upstream's clock, under a rate that was agreed at some
    /// time between its claim and its arrival.
    fn judge(mut self, seed: u64) {
        let skew = 1.0 + self.rng.random_range(-CLOCK_SKEW..=CLOCK_SKEW);
        self.calls.sort_unstable_by_key(|(_, arrives)| *arrives);
        let times: Vec<f64> = self.calls.iter().map(|(_, arrives)| arrives.as_secs_f64() * skew).collect();
        let ends = self.rates.iter().skip(1).map(|(since, _)| *since).chain([Duration::MAX]);
        let rates: Vec<(Duration, Duration, Rate)> =
            self.rates.iter().zip(ends).map(|((since, rate), until)| (*since, until, *rate)).collect();
        for (last, (claimed, arrives)) in self.calls.iter().enumerate() {
            let fits = |rate: Rate| {
                let opens = times[last] - rate.window().as_secs_f64();
                times[..=last].iter().filter(|at| **at > opens).count() <= rate.calls().into()
            };
            let agreed = rates.iter().filter(|(since, until, _)| since <= arrives && until >= claimed).map(|(.., rate)| *rate);
            let agreed: Vec<Rate> = agreed.collect();
            assert!(agreed.iter().any(|rate| fits(*rate)), "seed {seed}: too many for {agreed:?} at {}: {times:?}", times[last]);
        }
        assert!(self.calls.len() > 20, "seed {seed}: there was something to judge");
    }
}

#[tokio::test]
async fn slots_let_no_call_too_many_into_a_window_whatever_networks_crashes_and_clocks_do() {
    for seed in 0..8 {
        let mut play = Play::new(seed, "4/60s").await;
        for _ in 0..120 {
            let time = play.some(Duration::from_secs(40));
            play.pass(time).await;
            play.claim().await;
        }
        play.judge(seed);
    }
}

#[tokio::test]
async fn a_rate_that_changes_while_calls_are_under_way_lets_no_call_too_many_into_a_window() {
    for seed in 100..108 {
        let mut play = Play::new(seed, "4/60s").await;
        for step in 0..150 {
            if step % 15 == 14 {
                let rates = ["4/60s", "1/60s", "9/60s", "4/30s", "3/90s", "12/120s"];
                let rate = rates[play.rng.random_range(0..rates.len())];
                play.f.agree(rate).await;
                play.rates.push((play.now(), rate.parse().unwrap()));
            }
            let time = play.some(Duration::from_mins(1));
            play.pass(time).await;
            play.claim().await;
        }
        play.judge(seed);
    }
}
