//! The unreliable signing API, simulated: real HTTP, real RSA signatures, message-specific outages, a strict budget, and faults.
//!
//! It stands in for the challenge's API in tests, in the demonstration and in benchmarks, and it is the judge of the guarantees about
//! the upstream: it records every call at the moment its head was parsed, before anything else happens to it.
//!
//! - `model` decides what happens to a call, from `window` (the budget), `outages` and `faults`; all of it pure;
//! - `service` is the HTTP side; [`Simulator`] the running thing; `audit` what it saw; `signer` and `query` do what they say.
//!
//! What it does not do: the root page and the routes that begin with `_` cost no budget, and are no calls.

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

use crate::error::Result;
use crate::signals;

/// SHA-256 of a message.
pub type Digest = [u8; 32];

fn sha256(message: &[u8]) -> Digest {
    ring::digest::digest(&ring::digest::SHA256, message).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// `devkit upstream`: runs until a signal comes.
pub(crate) async fn run(args: UpstreamArgs) -> Result<()> {
    let (listen, rate) = (args.listen, args.rate);
    let simulator = Simulator::start(listen, args.into()).await?;
    say!("simulated upstream on {}, {rate}; audit: {}/_audit", simulator.url(), simulator.url());
    signals::terminate().await?;
    simulator.stop().await;
    Ok(())
}
