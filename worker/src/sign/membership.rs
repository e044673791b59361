//! Being one of the workers that call the upstream: all of them with one rate, or not at all.

use std::time::Duration;

use shared::store::upstream::{Agreement, Heartbeat, LIVES_FOR, SEEN_EVERY, WorkerId};
use shared::store::{Store, StoreError};
use shared::telemetry::display_chain;
use shared::units::Rate;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::StartError;

/// How long a worker whose rate differs waits for the others to go: a little longer than one that was killed seems to live.
const OTHERS_GO_WITHIN: Duration = Duration::from_secs(LIVES_FOR.as_secs() + 2);
const LOOK_EVERY: Duration = Duration::from_millis(500);
const JOIN_WITHIN: Duration = Duration::from_secs(15);
const LEAVE_WITHIN: Duration = Duration::from_secs(1);
/// A million jobs that wait are read in seconds, and more slowly by a server that was a standby just now.
const TAKE_OVER_WITHIN: Duration = Duration::from_mins(1);

/// The part that this process takes.
#[derive(Clone, Debug)]
pub struct Membership {
    store: Store,
    worker: WorkerId,
    rate: Rate,
}

impl Membership {
    /// Takes part with `rate`. If others live that work with another one, waits until they have gone, in case they are just being
    /// replaced; `None` if `stop` is cancelled meanwhile.
    ///
    /// # Errors
    /// If they stay, and those that waiting for Postgres does not mend.
    pub async fn join(store: &Store, rate: Rate, stop: &CancellationToken) -> Result<Option<Self>, StartError> {
        let member = Self { store: store.clone(), worker: WorkerId::generate(), rate };
        let mut refused: Option<Instant> = None;
        while !stop.is_cancelled() {
            let join = tokio::time::timeout(JOIN_WITHIN, store.join_workers(member.worker, rate));
            match join.await.unwrap_or_else(|_| Err(StoreError::TimedOut)) {
                Ok(Agreement::Agreed) => return Ok(Some(member)),
                Ok(Agreement::Differs(others)) => {
                    let since = *refused.get_or_insert_with(|| {
                        tracing::warn!(%rate, %others, "waiting for the workers with another UPSTREAM_RATE to stop");
                        Instant::now()
                    });
                    if since.elapsed() > OTHERS_GO_WITHIN {
                        return Err(StartError::Settings(differs(rate, others)));
                    }
                }
                Err(error) if error.is_transient() => {}
                Err(error) => return Err(error.into()),
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
        Ok(None)
    }

    /// Says from time to time that this worker lives, until `stop`; then that it is gone.
    ///
    /// # Errors
    /// If others, who had to take this worker for dead, work with another rate by now. What is claimed is finished; nothing more is.
    pub async fn run(self, stop: CancellationToken) -> Result<(), StartError> {
        let mut failing = false;
        let mut taking_over: Option<JoinHandle<()>> = None;
        while !stop.is_cancelled() {
            let stay = tokio::time::timeout(SEEN_EVERY, self.store.heartbeat(self.worker, self.rate));
            let stayed = tokio::select! {
                stayed = stay => stayed.unwrap_or_else(|_| Err(StoreError::TimedOut)),
                () = stop.cancelled() => return Ok(()),
            };
            match stayed {
                Ok(Heartbeat { agreement: Agreement::Differs(others), .. }) => {
                    return Err(StartError::Settings(differs(self.rate, others)));
                }
                Ok(Heartbeat { agreement: Agreement::Agreed, taken_over }) => {
                    failing = false;
                    // Beside this loop: who is silent for too long is taken for dead.
                    if taken_over && taking_over.as_ref().is_none_or(JoinHandle::is_finished) {
                        taking_over = Some(tokio::spawn(take_over(self.store.clone())));
                    }
                }
                // Once per outage, not once per try.
                Err(error) if !std::mem::replace(&mut failing, true) => {
                    tracing::warn!(error = display_chain(&error), "can't say that this worker lives; trying on");
                }
                Err(_) => {}
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(SEEN_EVERY) => {}
            }
        }
        Ok(())
    }

    /// Says that this worker is gone, so that nobody waits for it. Should that fail, it shows by itself.
    pub async fn leave(self) {
        let _ = tokio::time::timeout(LEAVE_WITHIN, self.store.leave_workers(self.worker)).await;
    }
}

/// Makes the slots wait for the clock of the server that has taken over.
async fn take_over(store: Store) {
    let taken_over = tokio::time::timeout(TAKE_OVER_WITHIN, store.take_over()).await;
    match taken_over.unwrap_or_else(|_| Err(StoreError::TimedOut)) {
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
