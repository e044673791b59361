//! The unreliable signing API, simulated: real HTTP, real RSA signatures, message-specific outages, a strict budget, and faults.
//!
//! It stands in for the challenge's API in tests and in the demonstration, and it judges the guarantees about the upstream: it records
//! every call as soon as its head is parsed, before anything else happens to the call.
//!
//! - `model` decides what happens to a call, from `window` (the budget), `outages` and `faults`; all of it pure;
//! - `service` is the HTTP side; [`Simulator`] is the running server; `audit` is what it saw; `signer` makes the signatures; `query`
//!   decodes the query string.
//!
//! The root page and the routes that begin with `_` cost no budget and do not count as calls.

mod audit;
mod faults;
mod model;
mod options;
mod outages;
mod query;
mod service;
mod signer;
mod simulator;
mod window;

pub use audit::{Audit, CallSummary};
pub use faults::{Fault, FaultKind, Faults, When};
pub use options::SimulatorOptions;
pub use outages::Outage;
pub use simulator::Simulator;

pub(crate) use options::UpstreamArgs;

use anyhow::Result;

use crate::signals;

/// SHA-256 of a message.
pub type Digest = [u8; 32];

pub(crate) fn sha256(message: &[u8]) -> Digest {
    ring::digest::digest(&ring::digest::SHA256, message).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// `devkit upstream`: runs until a signal arrives.
pub(crate) async fn run(args: UpstreamArgs) -> Result<()> {
    let (listen, rate) = (args.listen, args.rate);
    let simulator = Simulator::start(listen, args.into()).await?;
    say!("simulated upstream on {}, {rate}; audit: {}/_audit", simulator.url(), simulator.url());
    signals::terminate().await?;
    simulator.stop().await;
    Ok(())
}
