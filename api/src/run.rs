//! Builds the service and runs it until it is stopped.

use std::net::SocketAddr;

use shared::process::{self, ProcessError, Tasks};
use shared::store::keys::{ApiKey, Bootstrapped};
use shared::store::{Audience, Hint, PREPARE_WITHIN, Store, within};
use shared::{operations, telemetry, tls};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::answers::{Answers, Bounds};
use crate::http::auth::Keys;
use crate::http::{self, Limits, Services, WebhookAddresses};
use crate::server::serve;
use crate::settings::Settings;
use crate::waiters::Waiters;

/// Open files besides the connections of waiting callers: other callers, Postgres, the log.
const OTHER_FILES: u64 = 512;

/// Serves until SIGTERM or SIGINT, then finishes the requests in flight.
///
/// # Errors
/// If it can't start, can't prepare the database, or a task panics. Otherwise only a signal ends it: while Postgres is unavailable it
/// answers 503.
pub async fn until_stopped(settings: Settings) -> Result<(), ProcessError> {
    tls::use_ring();
    let telemetry = telemetry::start(&settings.telemetry, "countersign-api")?;
    let store = Store::connect_lazily(&settings.database)?;
    let open_files = process::raise_open_files();
    if open_files < u64::from(settings.max_waiters) + OTHER_FILES {
        tracing::warn!(
            open_files,
            max_waiters = settings.max_waiters,
            "fewer files may be open than callers may wait; raise the limit (`ulimit -Hn`)"
        );
    }
    let stop = process::stop_on_signal().map_err(ProcessError::Signals)?;
    let listener = bind("API_LISTEN", settings.api_listen).await?;
    let metrics_listener = match settings.metrics_listen.0 {
        Some(address) => Some(bind("METRICS_LISTEN", address).await?),
        None => None,
    };
    tracing::info!(listen = %listener.1, "api starts");

    let tasks = Tasks::new(stop.clone());
    let prepared = operations::Prepared::default();
    let (waiters, keys) = (Waiters::default(), Keys::new(store.clone(), prepared.clone()));
    let bounds = Bounds { waiters: settings.max_waiters as usize, pending: settings.max_pending };
    let answers = Answers::new(store.clone(), waiters.clone(), bounds, stop.clone());
    let limits =
        Limits { sync_wait: settings.sync_wait, max_wait: settings.max_wait, message_max_bytes: settings.message_max_bytes as usize };
    let health = operations::health(store.clone(), prepared.clone());
    let metrics = metrics_listener.is_none().then(|| operations::metrics_endpoint(store.clone()));
    let services = Services {
        answers,
        store: store.clone(),
        keys: keys.clone(),
        limits,
        webhook_addresses: WebhookAddresses::new(&settings.addresses, store.clone()),
    };
    let routes = http::routes(services, health, metrics);
    tasks.spawn(serve(listener, routes, stop.clone()));
    if let Some(listener) = metrics_listener {
        tasks.spawn(serve(listener, operations::metrics_endpoint(store.clone()), stop.clone()));
    }
    tasks.spawn(listen(store.clone(), waiters, keys, stop.clone()));
    match prepare(&settings, &store, &stop).await {
        Ok(()) if stop.is_cancelled() => {}
        Ok(()) => prepared.done(),
        Err(error) => tasks.fail(error),
    }

    let ended = tasks.ended().await;
    store.close().await;
    tracing::info!("api stopped");
    telemetry.finish().await;
    ended
}

/// Wakes the waiters, and clears the cache of keys when one may have changed.
async fn listen(store: Store, waiters: Waiters, keys: Keys, stop: CancellationToken) {
    let tell = |hint| match hint {
        Hint::Results(hints) => waiters.wake(&hints),
        Hint::Keys => keys.clear_cache(),
        Hint::Everything => {
            waiters.wake_all();
            keys.clear_cache();
        }
        Hint::Jobs(_) => {}
    };
    store.listen(Audience::Api, stop, tell).await;
}

/// Binds `address`, and returns the listener with the address that it got.
async fn bind(variable: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), ProcessError> {
    let fails = |error| ProcessError::Listen(variable, address, error);
    let listener = TcpListener::bind(address).await.map_err(fails)?;
    let address = listener.local_addr().map_err(fails)?;
    Ok((listener, address))
}

/// Brings the schema up to date and ensures that the bootstrap key exists; waits for Postgres as long as it takes.
async fn prepare(settings: &Settings, store: &Store, stop: &CancellationToken) -> Result<(), ProcessError> {
    let attempt = async || {
        store.prepare(settings.database.migrate_on_start).await?;
        if let Some(key) = &settings.bootstrap_api_key.0 {
            let secret = settings.bootstrap_webhook_secret.0.as_ref();
            let key = ApiKey::presented(key.expose());
            if within(PREPARE_WITHIN, Box::pin(store.bootstrap_key(&key, secret))).await? == Bootstrapped::LeftAlone {
                tracing::warn!("BOOTSTRAP_API_KEY: this key was revoked, or has another name; it stays as it is");
            }
        }
        Ok(())
    };
    store.when_available(stop, attempt).await?;
    Ok(())
}

/// Brings the schema up to date.
///
/// # Errors
/// If Postgres can't be reached, or a migration fails.
pub async fn migrate(settings: &Settings) -> Result<(), ProcessError> {
    let store = Store::connect_lazily(&settings.database)?;
    store.migrate().await?;
    println!("the schema is up to date");
    Ok(())
}
