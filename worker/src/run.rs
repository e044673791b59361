//! Builds the worker and runs it until it is told to stop.

use std::sync::Arc;
use std::time::Duration;

use poem::listener::{Acceptor, Listener, TcpListener};
use shared::process::{self, ProcessError, Tasks};
use shared::store::low_water::Marks;
use shared::store::{Audience, Hint, JobKind, PREPARE_WITHIN, Store, within};
use shared::{operations, telemetry, tls};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::driver::{self, Pace};
use crate::finisher::Finisher;
use crate::listener::Unhurried;
use crate::maintenance::{self, Ages};
use crate::settings::Settings;
use crate::sign::calls::Calls;
use crate::sign::claims::Claims;
use crate::sign::membership::Membership;
use crate::sign::outcome::RetryPolicy;
use crate::sign::queue::{self, SignQueue};
use crate::sign::upstream::Upstream;
use crate::webhook::queue::WebhookQueue;
use crate::webhook::seats::{Limits, Seats};
use crate::webhook::sender::Sender;
use crate::webhook::walk::Cursor;

/// Maximum number of concurrent calls to the upstream. A need for more would say more about the settings than about the upstream.
const MOST_SIGN_CALLS: u16 = 256;

/// How long a connection of an operator, or of a metrics collector, may be idle.
const IDLE: Duration = Duration::from_mins(2);

/// Runs until SIGTERM or SIGINT, then finishes what is in flight.
///
/// # Errors
/// If it can't start. Once it runs, only a signal ends it, workers with another rate that took its place while it was taken for dead, or a
/// task that panics. While Postgres is unavailable, it waits.
pub async fn until_stopped(settings: Settings) -> Result<(), ProcessError> {
    tls::use_ring();
    let telemetry = telemetry::start(&settings.telemetry, "countersign-worker")?;
    let policy = RetryPolicy::new(&settings.sign).map_err(ProcessError::Settings)?;
    let upstream = if settings.worker_queues.sign { Some(Upstream::new(&settings.upstream)?) } else { None };
    let sender = if settings.worker_queues.webhook { Some(Sender::new(&settings.webhook)?) } else { None };
    let store = Store::connect_lazily(&settings.database)?;
    let _ = process::raise_open_files();
    let stop = process::stop_on_signal().map_err(ProcessError::Signals)?;
    let listen_error = |error| ProcessError::Listen("WORKER_LISTEN", settings.worker_listen, error);
    let acceptor = TcpListener::bind(settings.worker_listen).into_acceptor().await.map_err(listen_error)?;
    tracing::info!(listen = %acceptor.local_addr()[0], queues = ?settings.worker_queues, rate = %settings.upstream.upstream_rate, "worker starts");

    let tasks = Tasks::new(stop.clone());
    let prepared = operations::Prepared::default();
    let server = poem::Server::new_with_acceptor(Unhurried(acceptor)).idle_timeout(IDLE);
    let routes = operations::routes(store.clone(), prepared.clone());
    let serving = server.run_with_graceful_shutdown(routes, stop.clone().cancelled_owned(), Some(Duration::from_secs(1)));
    tasks.spawn(async { serving.await.expect("accepting does not fail") });
    let membership = match join(&settings, &store, &stop).await {
        Ok(membership) => {
            start_queues(&settings, &store, Clients { upstream, policy, sender }, &tasks, &stop);
            // If it is told to stop while it waits, it is not.
            if !stop.is_cancelled() {
                prepared.done();
            }
            membership
        }
        Err(error) => {
            tasks.fail(error);
            None
        }
    };
    if let Some(membership) = membership.clone() {
        let stop = stop.clone();
        tasks.try_spawn(async move { membership.stay(&stop).await });
    }

    let ended = tasks.ended().await;
    if let Some(membership) = membership {
        membership.leave().await;
    }
    store.close().await;
    tracing::info!("worker stopped");
    telemetry.finish().await;
    ended
}

/// Prepares the database, and joins the workers that call the upstream. `None` if this one does not call it, and so has no say in the rate,
/// or if it is told to stop.
async fn join(settings: &Settings, store: &Store, stop: &CancellationToken) -> Result<Option<Membership>, ProcessError> {
    store.when_available(stop, async || store.prepare(settings.database.migrate_on_start).await).await?;
    if settings.worker_queues.webhook {
        store
            .when_available(stop, async || within(PREPARE_WITHIN, store.allow_webhook_addresses(&settings.webhook.addresses)).await)
            .await?;
    }
    if settings.worker_queues.sign { Membership::join(store, settings.upstream.upstream_rate, stop).await } else { Ok(None) }
}

/// What the queues call, and when they call again. `None` for a queue that is not served.
struct Clients {
    upstream: Option<Upstream>,
    policy: RetryPolicy,
    sender: Option<Sender>,
}

fn start_queues(settings: &Settings, store: &Store, clients: Clients, tasks: &Tasks, stop: &CancellationToken) {
    let (sign_wake, webhook_wake) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let finisher = Arc::new(Finisher::new(store.clone()));
    tasks.spawn(maintenance::run(store.clone(), Ages::of(settings), Arc::clone(&finisher), stop.clone()));
    let pace = Pace { poll: settings.poll_interval, grace: settings.shutdown_grace };
    if let Some(upstream) = clients.upstream {
        let calls = settings.upstream.upstream_rate.calls().min(MOST_SIGN_CALLS).into();
        let marks = Marks::new(store.clone(), Arc::clone(&sign_wake));
        let queue = SignQueue {
            claims: Claims::new(store.clone(), marks, settings.upstream.upstream_rate, queue::lease(upstream.timeout())),
            calls: Calls::new(calls),
            upstream,
            retryable: settings.upstream.upstream_retryable_statuses.clone(),
            policy: clients.policy,
            finisher,
        };
        tasks.spawn(driver::run(Arc::new(queue), pace, Arc::clone(&sign_wake), stop.clone()));
    }
    if let Some(sender) = clients.sender {
        let calls = settings.webhook.webhook_concurrency.into();
        let limits = Limits { calls, per_receiver: settings.webhook.webhook_receiver_concurrency.into() };
        let queue = WebhookQueue {
            store: store.clone(),
            sender,
            seats: Seats::new(limits),
            cursor: Cursor::default(),
            schedule: settings.webhook.webhook_retry_schedule.clone(),
            finisher: Finisher::new(store.clone()),
        };
        tasks.spawn(driver::run(Arc::new(queue), pace, Arc::clone(&webhook_wake), stop.clone()));
    }
    tasks.spawn(listen(store.clone(), sign_wake, webhook_wake, stop.clone()));
}

/// Wakes the drivers when there is something to claim.
async fn listen(store: Store, sign: Arc<Notify>, webhook: Arc<Notify>, stop: CancellationToken) {
    let tell = |hint| match hint {
        Hint::Jobs(JobKind::Sign) => sign.notify_one(),
        Hint::Jobs(JobKind::Webhook) => webhook.notify_one(),
        Hint::Everything => {
            sign.notify_one();
            webhook.notify_one();
        }
        Hint::Results(_) | Hint::Keys => {}
    };
    store.listen(Audience::Worker, stop, tell).await;
}
