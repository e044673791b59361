//! The engine without the calls: runs the worker's own loop, claim and finisher with a job that does nothing.
//!
//! Used by the benchmarks: the queues it is compared with run jobs that do nothing, so this row compares like with like. It prints `ready`,
//! starts when a line arrives on standard input, and ends when standard input does. Except for the HTTP call, sign jobs take the same
//! way as in `worker`, with the same settings: the same statements, the same batches, and the slots of the budget taken and given back.
//! Webhook jobs are claimed and finished by the same statements, without seats, and without the walk over receivers.

use std::io::BufRead;
use std::sync::Arc;

use clap::Parser;
use shared::settings::DatabaseSettings;
use shared::store::low_water::Marks;
use shared::store::receivers::{Room, Wanted};
use shared::store::sign_claim::SignJob;
use shared::store::sign_finish::{Call, SignEnding, SignFinish, UpstreamNews};
use shared::store::upstream::WorkerId;
use shared::store::webhook_claim::WebhookJob;
use shared::store::webhook_finish::{ReceiverNews, WebhookEnding, WebhookFinish};
use shared::store::{Audience, Claimed, Hint, JobKind, Store, StoreError};
use shared::units::Rate;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use worker::driver::{self, NextClaim, Pace, Queue, Stop};
use worker::finisher::Finisher;
use worker::settings::Queues;
use worker::sign::claims::Claims;

#[derive(Parser, Debug)]
struct Settings {
    /// `sign` or `webhook`.
    #[arg(long, env, default_value = "sign")]
    worker_queues: Queues,
    /// Jobs that are leased at the same time; by default as many as the worker leases for calls that take no time.
    #[arg(long, env, default_value_t = 4096)]
    most_leased: usize,
    /// The budget of calls; each takes a slot.
    #[arg(long, env, default_value = "24576/100ms")]
    upstream_rate: Rate,
    #[command(flatten)]
    database: DatabaseSettings,
}

/// The length of a worker's lease with the default timeouts.
const LEASE: std::time::Duration = std::time::Duration::from_secs(40);
const POLL: std::time::Duration = std::time::Duration::from_secs(1);

struct Sign {
    most_leased: usize,
    claims: Claims,
    finisher: Arc<Finisher<SignFinish>>,
}

impl Queue for Sign {
    type Job = SignJob;
    const NAME: &'static str = "sign";

    fn most_leased(&self) -> usize {
        self.most_leased
    }

    async fn claim(&self, most: usize) -> Result<Claimed<SignJob>, StoreError> {
        self.claims.claim(most).await
    }

    async fn work(&self, job: SignJob, _stop: Stop) -> NextClaim {
        let finish = SignFinish {
            digest: job.message.digest(),
            lease: job.lease,
            ending: SignEnding::Signed("c2lnbmF0dXJl".to_owned()),
            call: Call::Ended,
            status: Some(200),
            error: None,
            upstream: UpstreamNews::None,
        };
        self.finisher.finish(finish).await;
        NextClaim::AsPlanned
    }
}

struct Webhook {
    most_leased: usize,
    store: Store,
    finisher: Arc<Finisher<WebhookFinish>>,
}

impl Queue for Webhook {
    type Job = WebhookJob;
    const NAME: &'static str = "webhook";

    fn most_leased(&self) -> usize {
        self.most_leased
    }

    async fn claim(&self, most: usize) -> Result<Claimed<WebhookJob>, StoreError> {
        let any = Room { in_all: u32::MAX, of_one_server: u32::MAX };
        let wanted = Wanted { most, per_receiver: u32::MAX, held: Vec::new(), newcomers: any, troubled: any };
        Ok(self.store.claim_webhook_jobs(&wanted, None, LEASE).await?.0)
    }

    async fn work(&self, job: WebhookJob, _stop: Stop) -> NextClaim {
        let finish = WebhookFinish {
            lease: job.lease,
            ending: WebhookEnding::Delivered,
            status: Some(200),
            error: None,
            took: std::time::Duration::ZERO,
            response: Some(Vec::new()),
            receiver: ReceiverNews::Works { slow: false },
        };
        self.finisher.finish(finish).await;
        NextClaim::AtOnce
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let settings: Settings = Settings::parse();
    shared::tls::use_ring();
    let store = Store::connect_lazily(&settings.database)?;
    store.join_workers(WorkerId::generate(), settings.upstream_rate).await?;
    println!("ready");
    let mut line = String::new();
    if std::io::stdin().lock().read_line(&mut line)? == 0 {
        return Ok(());
    }
    let (stop, wake) = (CancellationToken::new(), Arc::new(Notify::new()));
    let pace = Pace { poll: POLL, grace: LEASE };
    let kind = if settings.worker_queues.webhook { JobKind::Webhook } else { JobKind::Sign };
    let driver = match kind {
        JobKind::Sign => {
            let queue = Sign {
                most_leased: settings.most_leased,
                claims: Claims::new(store.clone(), Marks::new(store.clone(), Arc::clone(&wake)), settings.upstream_rate, LEASE),
                finisher: Arc::new(Finisher::new(store.clone())),
            };
            tokio::spawn(driver::run(Arc::new(queue), pace, Arc::clone(&wake), stop.clone()))
        }
        JobKind::Webhook => {
            let queue =
                Webhook { most_leased: settings.most_leased, store: store.clone(), finisher: Arc::new(Finisher::new(store.clone())) };
            tokio::spawn(driver::run(Arc::new(queue), pace, Arc::clone(&wake), stop.clone()))
        }
    };
    let listener = {
        let (store, stop) = (store.clone(), stop.clone());
        tokio::spawn(async move {
            let tell = |hint| {
                if matches!(hint, Hint::Everything) || matches!(hint, Hint::Jobs(told) if told == kind) {
                    wake.notify_one();
                }
            };
            store.listen(Audience::Worker, stop, tell).await;
        })
    };
    tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink())).await??;
    stop.cancel();
    driver.await?;
    listener.await?;
    store.close().await;
    Ok(())
}
