//! The simulated upstream as a value that a test owns.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::model::Model;
use super::outages::Outage;
use super::service::Service;
use super::signer::Signer;
use super::{Audit, Digest, Faults, SimulatorOptions};
use crate::error::{Context, Error, Result};
use crate::ports::free_port;
use crate::wire::{Gate, Server};

/// A running simulated upstream. Dropping it stops it and closes every connection.
pub struct Simulator {
    server: Server,
    service: Arc<Service>,
    /// Brings the listener back when its absence has a term; and does what faults that came over HTTP ask for.
    returns: Arc<Mutex<Option<JoinHandle<()>>>>,
    fault_requests: JoinHandle<()>,
}

impl Simulator {
    /// Starts on the address; port 0 is a free one, and remains free for its return while it is gone. The first start of a process makes
    /// the RSA key.
    ///
    /// # Errors
    /// When it cannot listen there.
    pub async fn start(mut listen: SocketAddr, options: SimulatorOptions) -> Result<Self> {
        if listen.port() == 0 {
            listen.set_port(free_port()?);
        }
        let signer = tokio::task::spawn_blocking(Signer::of_this_process).await.context(|| "making the upstream's key")?;
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
                // It fails only when the server is gone, and then this task is aborted.
                let _ = apply(&gate, &slot, &faults).await;
            }
        });
        Ok(Self { server, service, returns, fault_requests })
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.server.addr()
    }

    /// Its address, as `UPSTREAM_URL` wants it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.addr())
    }

    /// All calls since the start or the last [`reset_audit`](Self::reset_audit).
    #[must_use]
    pub fn audit(&self) -> Audit {
        self.audit_since(Duration::ZERO)
    }

    /// The calls that arrived so long after the start, or later.
    #[must_use]
    pub fn audit_since(&self, since: Duration) -> Audit {
        self.service.audit(since)
    }

    /// Leaves all calls so far out of later audits.
    pub fn reset_audit(&self) {
        self.service.model().log.reset();
    }

    /// Replaces the faults; [`Faults::default`] ends them all. Returns when they hold: a listener that is to be gone is gone.
    ///
    /// # Errors
    /// When a probability is none, or the port was taken by somebody else while the upstream was gone.
    pub async fn set_faults(&self, faults: Faults) -> Result<()> {
        if !faults.valid() {
            return Err(Error::new("a probability is a number from 0 to 1"));
        }
        self.service.model().faults = faults.clone();
        apply(&self.server.gate(), &self.returns, &faults).await
    }

    /// The outage of every message called for so far, by the SHA-256 of the message; empty ranges for those that never failed.
    /// Times are since the start, as in the audit.
    #[must_use]
    pub fn outages(&self) -> HashMap<Digest, Outage> {
        self.service.model().outages().fates().clone()
    }

    /// The signature that the upstream gives for a message, without a call.
    #[must_use]
    pub fn signature(&self, message: &[u8]) -> String {
        self.service.signer.sign(message)
    }

    /// Is this the signature of the message? Without a call.
    #[must_use]
    pub fn verify(&self, message: &[u8], signature: &[u8]) -> bool {
        self.service.signer.verify(message, signature)
    }

    /// Stops, and returns when the port is free and every connection closed.
    pub async fn stop(self) {
        let gate = self.server.gate();
        // An error means that it is stopped already.
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

/// Makes the listener be as the faults say. A fault of connections cuts those that are open, so that no kept-alive one slips past it.
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
            // If somebody took the port, it stays gone, and the caller's bounded wait says so.
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
