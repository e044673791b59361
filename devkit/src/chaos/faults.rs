//! Each kind of fault: how it begins, the condition that ends it, and when everything works again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use tokio_util::task::AbortOnDropHandle;

use super::plan::{Fault, Kind};
use super::record::Held;
use super::world::{World, until};
use crate::postgres::StopMode;
use crate::processes::Signal;
use crate::receiver::Behaviour;
use crate::upstream::{Faults, When};

/// A fault that is over.
#[derive(Clone, Debug)]
pub(super) struct Overcome {
    pub(super) kind: Kind,
    /// The details of what happened.
    pub(super) what: String,
    /// The time from the end of the fault (for a kill: from the kill) until everything that it affected worked again.
    pub(super) recovered_in: Duration,
}

/// Jobs of a worker that was killed or stopped, until other workers have taken them over.
#[derive(Debug)]
pub(super) struct Takeover {
    kind: Kind,
    what: String,
    /// When the worker was killed or stopped.
    since: Instant,
    /// The worker that is stopped until then; `None` if it was killed.
    frozen: Option<usize>,
    done: AbortOnDropHandle<Result<Instant>>,
}

/// The number of calls that have to meet a fault of the upstream before it ends.
const CALLS_MET: u64 = 2;

impl World {
    /// Injects the fault and waits for the recovery.
    ///
    /// Returns `None` if a worker was killed or stopped: [`taken_over`](Self::taken_over) reports the end of that fault, and other faults
    /// happen in the meantime.
    pub(super) async fn suffer(&mut self, fault: Fault) -> Result<Option<Overcome>> {
        let (what, ended) = match fault.kind {
            Kind::ApiKilled => return self.kill_api(fault.victim).await.map(Some),
            Kind::ApiStopped => return self.stop_api(fault.victim).await.map(Some),
            Kind::WorkerKilled => return self.kill_worker(fault.victim).await.map(|()| None),
            Kind::WorkerStopped => return self.stop_worker(fault.victim).await.map(|()| None),
            Kind::PostgresCrashed => {
                let before = self.refused();
                self.database.cluster.stop(StopMode::Immediate).await?;
                until("POSTs meet a Postgres that is down", async || self.refused() >= before + 2).await?;
                self.database.cluster.start_again().await?;
                (String::from("until two POSTs were answered 503"), Instant::now())
            }
            Kind::ConnectionsEnded => {
                let ended = self.database.cluster.terminate_connections(self.database.name).await?;
                (format!("{ended} of them"), Instant::now())
            }
            Kind::UpstreamGone => {
                self.upstream.set_faults(Faults { gone: true, ..Faults::default() }).await?;
                until("the breaker opens", async || self.upstream_is_shunned().await).await?;
                (String::from("until the breaker opened"), self.mend_upstream().await?)
            }
            Kind::ReceiverDrops | Kind::ReceiverHangs => {
                let met = self.receiver.count(|_| true);
                let behaviour = fault.kind.of_receivers().map(Behaviour::always).unwrap_or_default();
                self.receiver.set_behaviour(behaviour);
                until("webhooks meet the fault", async || self.receiver.count(|_| true) >= met + 2).await?;
                self.receiver.set_behaviour(Behaviour::default());
                (String::from("for two deliveries"), Instant::now())
            }
            kind => {
                let Some(fault) = kind.of_calls() else { return Err(anyhow!("nobody knows how to make this fault: {kind}")) };
                let since = Duration::from_millis(self.upstream.audit_since(Duration::MAX).now_ms);
                let calls = || self.upstream.audit_since(since).calls;
                self.upstream.set_faults(Faults::one(fault, When::Always)).await?;
                // An open breaker or a pause may hold back the others.
                until("calls meet the fault", async || calls() >= CALLS_MET || (calls() > 0 && self.upstream_is_shunned().await)).await?;
                (format!("calls that met it: {}", calls()), self.mend_upstream().await?)
            }
        };
        let recovered_in = self.recovered(fault.kind, ended).await?;
        Ok(Some(Overcome { kind: fault.kind, what, recovered_in }))
    }

    /// The takeovers that are complete by now; with `wait`, waits for all of them. Continues workers that were stopped.
    pub(super) async fn taken_over(&mut self, wait: bool) -> Result<Vec<Overcome>> {
        let mut overcome = Vec::new();
        let (over, open) = self.takeovers.drain(..).partition(|takeover| wait || takeover.done.is_finished());
        self.takeovers = open;
        let over: Vec<Takeover> = over;
        for Takeover { kind, what, since, frozen, done } in over {
            let done = done.await.map_err(|_| anyhow!("watching jobs was abandoned"))??;
            let recovered_in = match frozen {
                None => done - since,
                Some(index) => {
                    self.workers[index].process.signal(Signal::Cont)?;
                    self.workers[index].frozen = false;
                    self.recovered(kind, Instant::now()).await?
                }
            };
            overcome.push(Overcome { kind, what, recovered_in });
        }
        Ok(overcome)
    }

    async fn kill_api(&mut self, victim: usize) -> Result<Overcome> {
        let index = victim / 2 % self.apis.len();
        let target = Arc::clone(&self.apis[index].target);
        target.disturbed();
        let killed = Instant::now();
        self.apis[index].process.kill().await?;
        let (process, address) = self.spawn_api().await?;
        self.apis[index].process = process;
        target.mended(Some(address));
        self.until_accepts(index).await?;
        Ok(Overcome { kind: Kind::ApiKilled, what: format!("api {index}"), recovered_in: killed.elapsed() })
    }

    async fn stop_api(&mut self, victim: usize) -> Result<Overcome> {
        let index = victim / 2 % self.apis.len();
        let api = &self.apis[index];
        let posts = api.target.sent.load(Ordering::SeqCst);
        api.target.disturbed();
        api.process.signal(Signal::Stop)?;
        until("callers notice that an api stands still", async || api.target.sent.load(Ordering::SeqCst) >= posts + 2).await?;
        api.process.signal(Signal::Cont)?;
        api.target.mended(None);
        let continued = Instant::now();
        self.until_accepts(index).await?;
        Ok(Overcome { kind: Kind::ApiStopped, what: format!("api {index}"), recovered_in: continued.elapsed() })
    }

    async fn kill_worker(&mut self, victim: usize) -> Result<()> {
        let index = self.running_worker(victim);
        let held = self.until_holds(index, hit_in_a_call(victim)).await?;
        let killed = Instant::now();
        self.workers[index].process.kill().await?;
        self.fenced_off += self.workers[index].fenced_off();
        self.watch(Kind::WorkerKilled, index, held, killed, None);
        self.workers[index] = self.spawn_worker().await?;
        Ok(())
    }

    /// Stops a worker that holds jobs: right after it has claimed them, or in the middle of a call.
    async fn stop_worker(&mut self, victim: usize) -> Result<()> {
        let index = self.running_worker(victim);
        self.until_holds(index, hit_in_a_call(victim)).await?;
        let stopped = Instant::now();
        self.workers[index].process.signal(Signal::Stop)?;
        self.workers[index].frozen = true;
        // The worker is stopped, so it keeps what it holds now.
        let mut held = Vec::new();
        until("Postgres says what a stopped worker has", async || {
            let leases = self.database.leases_of(std::slice::from_ref(&self.workers[index].role)).await;
            leases.map(|leases| held = leases).is_ok()
        })
        .await?;
        self.watch(Kind::WorkerStopped, index, held, stopped, Some(index));
        Ok(())
    }

    fn watch(&mut self, kind: Kind, worker: usize, held: Vec<Held>, since: Instant, frozen: Option<usize>) {
        let what = format!("worker {worker}, which had {} sign jobs", held.len());
        let database = Arc::clone(&self.database);
        let done = AbortOnDropHandle::new(tokio::spawn(database.when_taken_over(held)));
        self.takeovers.push(Takeover { kind, what, since, frozen, done });
    }

    fn running_worker(&self, victim: usize) -> usize {
        let running: Vec<usize> = (0..self.workers.len()).filter(|index| !self.workers[*index].frozen).collect();
        running[victim / 2 % running.len()]
    }

    /// Waits until a worker holds a job; with `calling`, until the upstream has received a call for it and has not answered yet.
    async fn until_holds(&self, index: usize, calling: bool) -> Result<Vec<Held>> {
        let since = Duration::from_millis(self.upstream.audit_since(Duration::MAX).now_ms);
        let mut held = Vec::new();
        until("a worker has jobs", async || {
            held = self.database.leases_of(std::slice::from_ref(&self.workers[index].role)).await.unwrap_or_default();
            let calls = self.upstream.audit_since(since).recent;
            let under_way =
                |held: &Held| calls.iter().any(|call| call.status.is_none() && call.message_digest.as_ref() == Some(&held.message_digest));
            if calling { held.iter().any(under_way) } else { !held.is_empty() }
        })
        .await?;
        Ok(held)
    }

    /// Returns whether the breaker is open or a pause is in effect.
    async fn upstream_is_shunned(&self) -> bool {
        let shunned = "select count(*) from upstream where probe_at is not null or paused_until > now()";
        self.database.number(shunned).await.is_ok_and(|count| count > 0)
    }

    /// Ends the faults of the upstream, and waits until the calls that met them have ended.
    ///
    /// A worker that is stopped during a hanging call could not end the call, and the upstream would see it in flight all that time.
    async fn mend_upstream(&self) -> Result<Instant> {
        self.upstream.set_faults(Faults::default()).await?;
        let mended = Instant::now();
        let running: Vec<String> = self.workers.iter().filter(|worker| !worker.frozen).map(|worker| worker.role.clone()).collect();
        let calling = self.database.leases_of(&running).await?;
        until("calls that met a fault have ended", async || self.database.any_live(&calling).await.is_ok_and(|live| !live)).await?;
        Ok(mended)
    }

    fn refused(&self) -> u64 {
        self.apis.iter().map(|api| api.target.refused.load(Ordering::SeqCst)).sum()
    }

    async fn until_accepts(&self, index: usize) -> Result<()> {
        let accepted = &self.apis[index].target.accepted;
        let before = accepted.load(Ordering::SeqCst);
        until("an api accepts POSTs again", async || accepted.load(Ordering::SeqCst) > before).await
    }

    /// Waits until everything that a fault of this kind affects works again, and returns how long after `since` that was.
    ///
    /// After a fault of receivers, a webhook has to be delivered. After any other fault, a message has to be signed. After a fault of
    /// Postgres, every api also has to accept a POST. After a fault of the upstream, the breaker must be closed and no pause in effect, so
    /// that the next fault of the upstream is met and not mistaken for this one.
    async fn recovered(&self, kind: Kind, since: Instant) -> Result<Duration> {
        if kind.of_receivers().is_some() {
            let delivered = || self.receiver.count(|delivery| delivery.status == Some(204));
            let before = delivered();
            until("a webhook is delivered again", async || delivered() > before).await?;
            return Ok(since.elapsed());
        }
        let accepted = || self.apis.iter().map(|api| api.target.accepted.load(Ordering::SeqCst)).collect::<Vec<_>>();
        let accepted_before = accepted();
        let mut signed_before = None;
        until("POSTs are accepted and a message is signed again", async || {
            // Postgres may not be back yet.
            let Ok(signatures) = self.database.signatures().await else { return false };
            let of_postgres = matches!(kind, Kind::PostgresCrashed | Kind::ConnectionsEnded);
            let accepting = !of_postgres || accepted().iter().zip(&accepted_before).all(|(now, before)| now > before);
            let calling = !kind.is_of_upstream() || !self.upstream_is_shunned().await;
            signatures > *signed_before.get_or_insert(signatures) && accepting && calling
        })
        .await?;
        Ok(since.elapsed())
    }
}

/// Whether this victim is hit in the middle of a call, as every other one is, or right after it has claimed jobs.
fn hit_in_a_call(victim: usize) -> bool {
    !victim.is_multiple_of(2)
}
