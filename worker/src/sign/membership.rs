//! Membership among the workers that call the upstream: they all use one rate, or do not call.

use std::time::Duration;

use shared::process::ProcessError;
use shared::store::upstream::{Agreement, Heartbeat, LIVES_FOR, SEEN_EVERY, TAKE_OVER_WITHIN, WorkerId};
use shared::store::{Store, within};
use shared::telemetry::display_chain;
use shared::units::Rate;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// How long a worker with a different rate waits for the others to go: a little longer than a killed worker seems to live.
const OTHERS_GO_WITHIN: Duration = Duration::from_secs(LIVES_FOR.as_secs() + 2);
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long joining may take at first. A server that has just taken over may need more, each time it fails; one that hangs should not get
/// it at once.
const JOIN_WITHIN: Duration = Duration::from_secs(15);
const LEAVE_WITHIN: Duration = Duration::from_secs(1);

/// The membership of this process.
#[derive(Clone, Debug)]
pub struct Membership {
    store: Store,
    worker: WorkerId,
    rate: Rate,
}

impl Membership {
    /// Joins with `rate`. If living workers use another rate, waits until they have gone, in case they are just being replaced. Returns
    /// `None` if `stop` is cancelled meanwhile.
    ///
    /// # Errors
    /// If they stay, or if the store fails in a way that waiting does not fix.
    pub async fn join(store: &Store, rate: Rate, stop: &CancellationToken) -> Result<Option<Self>, ProcessError> {
        let member = Self { store: store.clone(), worker: WorkerId::generate(), rate };
        let mut refused: Option<Instant> = None;
        let mut patience = JOIN_WITHIN;
        while !stop.is_cancelled() {
            match within(patience, store.join_workers(member.worker, rate)).await {
                Ok(Agreement::Agreed) => return Ok(Some(member)),
                Ok(Agreement::Differs(others)) => {
                    let since = *refused.get_or_insert_with(|| {
                        tracing::warn!(%rate, %others, "waiting for the workers with another UPSTREAM_RATE to stop");
                        Instant::now()
                    });
                    if since.elapsed() > OTHERS_GO_WITHIN {
                        return Err(ProcessError::Settings(differs(rate, others)));
                    }
                }
                Err(error) if error.is_transient() => patience = (2 * patience).min(TAKE_OVER_WITHIN),
                Err(error) => return Err(error.into()),
            }
            stop.run_until_cancelled(tokio::time::sleep(LOOK_EVERY)).await;
        }
        Ok(None)
    }

    /// Sends heartbeats until `stop`.
    ///
    /// # Errors
    /// If other workers, which had to take this worker for dead, use another rate by now. What is already claimed is finished, but nothing
    /// more is claimed.
    pub async fn stay(&self, stop: &CancellationToken) -> Result<(), ProcessError> {
        let mut failing = false;
        let mut taking_over: Option<AbortOnDropHandle<()>> = None;
        while !stop.is_cancelled() {
            let beat = within(SEEN_EVERY, self.store.heartbeat(self.worker, self.rate));
            let Some(beat) = stop.run_until_cancelled(beat).await else { return Ok(()) };
            match beat {
                Ok(Heartbeat { agreement: Agreement::Differs(others), .. }) => {
                    return Err(ProcessError::Settings(differs(self.rate, others)));
                }
                Ok(Heartbeat { agreement: Agreement::Agreed, taken_over }) => {
                    failing = false;
                    // In a separate task: a worker that sends no heartbeat for too long is taken for dead.
                    if taken_over && taking_over.as_ref().is_none_or(AbortOnDropHandle::is_finished) {
                        taking_over = Some(AbortOnDropHandle::new(tokio::spawn(take_over(self.store.clone()))));
                    }
                }
                // Log once per outage, not once per attempt.
                Err(error) if !std::mem::replace(&mut failing, true) => {
                    tracing::warn!(error = display_chain(&error), "can't say that this worker lives; trying on");
                }
                Err(_) => {}
            }
            stop.run_until_cancelled(tokio::time::sleep(SEEN_EVERY)).await;
        }
        Ok(())
    }

    /// Reports that this worker is gone, so that no other one waits for it. If that fails, the missing heartbeats show it.
    pub async fn leave(&self) {
        let _ = tokio::time::timeout(LEAVE_WITHIN, self.store.leave_workers(self.worker)).await;
    }
}

/// After a failover, makes the slots wait until the clock of the new server counts.
async fn take_over(store: Store) {
    match within(TAKE_OVER_WITHIN, store.take_over()).await {
        Ok(true) => tracing::info!(
            "another Postgres server has taken over: every call waits until what may have been called before is out of the window"
        ),
        Ok(false) => {}
        Err(error) => {
            tracing::warn!(error = display_chain(&error), "can't set the budget to the clock of another Postgres server; trying on");
        }
    }
}

fn differs(rate: Rate, others: Rate) -> String {
    format!("UPSTREAM_RATE={rate}: other workers call the upstream with {others}; give all of them the same rate, or stop them first")
}
