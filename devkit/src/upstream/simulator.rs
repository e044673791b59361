//! The simulated upstream as a value that a test owns.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::model::Model;
use super::outages::Outage;
use super::service::Service;
use super::signer::Signer;
use super::{Audit, Digest, Faults, SimulatorOptions};
use crate::ports::free_port;
use crate::wire::{Gate, Server};

/// A running simulated upstream. Dropping it stops it and closes every connection.
pub struct Simulator {
    server: Server,
    service: Arc<Service>,
    /// The task that reopens the listener after `gone_for_ms`.
    returns: Arc<Mutex<Option<JoinHandle<()>>>>,
    /// The task that applies faults that came over HTTP.
    fault_requests: JoinHandle<()>,
}

impl Simulator {
    /// Starts a simulator on the address. Port 0 is any free port, which stays reserved while the upstream is gone.
    ///
    /// The first start in a process generates the RSA key.
    ///
    /// # Errors
    /// If it cannot listen there.
    pub async fn start(mut listen: SocketAddr, options: SimulatorOptions) -> Result<Self> {
        if listen.port() == 0 {
            listen.set_port(free_port()?);
        }
        let signer = tokio::task::spawn_blocking(Signer::of_this_process).await.context("making the upstream's key")?;
        let (requests, mut inbox) = mpsc::unbounded_channel::<Faults>();
        let service = Arc::new(Service {
            api_key: options.api_key.clone(),
            rate: options.rate,
            signer,
            started: Instant::now(),
            model: Mutex::new(Model::new(&options)),
            fault_requests: requests,
        });
        let server = Server::start(listen, Arc::clone(&service)).await?;
        let returns = Arc::new(Mutex::new(None));
        let (gate, slot) = (server.gate(), Arc::clone(&returns));
        let fault_requests = tokio::spawn(async move {
            while let Some(faults) = inbox.recv().await {
                // It fails if the server is gone, and then this task is aborted, or if another process has taken the port.
                let _ = apply(&gate, &slot, &faults).await;
            }
        });
        Ok(Self { server, service, returns, fault_requests })
    }

    /// The address that it listens on.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.server.addr()
    }

    /// Its URL, as needed for `UPSTREAM_URL`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.addr())
    }

    /// The audit of all calls since the start or the last [`reset_audit`](Self::reset_audit).
    #[must_use]
    pub fn audit(&self) -> Audit {
        self.audit_since(Duration::ZERO)
    }

    /// The audit of the calls that arrived at least this long after the start.
    #[must_use]
    pub fn audit_since(&self, since: Duration) -> Audit {
        self.service.audit(since)
    }

    /// Excludes all calls so far from later audits.
    pub fn reset_audit(&self) {
        self.service.model().log.reset();
    }

    /// Replaces the faults; [`Faults::default`] ends them all. Returns when they are in effect: if the upstream is gone, its listener is
    /// closed.
    ///
    /// # Errors
    /// If a probability is invalid, or another process took the port while the upstream was gone.
    pub async fn set_faults(&self, faults: Faults) -> Result<()> {
        if !faults.valid() {
            return Err(anyhow!("a probability is a number from 0 to 1"));
        }
        self.service.model().faults = faults.clone();
        apply(&self.server.gate(), &self.returns, &faults).await
    }

    /// The outage of every message seen so far, by the SHA-256 of the message; empty ranges for messages that never failed. Times are since
    /// the start, as in the audit.
    #[must_use]
    pub fn outages(&self) -> HashMap<Digest, Outage> {
        self.service.model().outages().fates().clone()
    }

    /// The signature that the upstream gives for a message. This makes no call.
    #[must_use]
    pub fn signature(&self, message: &[u8]) -> String {
        self.service.signer.sign(message)
    }

    /// Returns whether this is the signature of the message. This makes no call.
    #[must_use]
    pub fn verify(&self, message: &[u8], signature: &[u8]) -> bool {
        self.service.signer.verify(message, signature)
    }

    /// Stops the simulator, and waits until the port is free and every connection is closed.
    pub async fn stop(self) {
        let gate = self.server.gate();
        // An error means that it is already stopped.
        let _ = gate.listen(false).await;
        let _ = gate.cut().await;
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        self.fault_requests.abort();
        replace(&self.returns, None);
    }
}

/// Opens or closes the listener according to the faults. A fault of connections also cuts the open ones, so that no keep-alive connection
/// escapes it.
async fn apply(gate: &Gate, returns: &Mutex<Option<JoinHandle<()>>>, faults: &Faults) -> Result<()> {
    replace(returns, None);
    let gone = faults.gone || faults.gone_for_ms.is_some();
    gate.listen(!gone).await?;
    if gone || faults.drop_connections.is_some() {
        gate.cut().await?;
    }
    if let (false, Some(term)) = (faults.gone, faults.gone_for_ms) {
        let gate = gate.clone();
        let task = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(term)).await;
            // If another process took the port, the upstream stays gone, and the caller's wait times out.
            let _ = gate.listen(true).await;
        });
        replace(returns, Some(task));
    }
    Ok(())
}

fn replace(returns: &Mutex<Option<JoinHandle<()>>>, task: Option<JoinHandle<()>>) {
    let before = std::mem::replace(&mut *returns.lock().unwrap_or_else(PoisonError::into_inner), task);
    if let Some(before) = before {
        before.abort();
    }
}
