//! API keys: the security scheme of the OpenAPI document, and the cache in front of the store.

use std::sync::Arc;
use std::time::Duration;

use moka::future::Cache;
use poem::Request;
use poem_openapi::SecurityScheme;
use poem_openapi::auth::ApiKey as PresentedKey;
use shared::batch::{BatchError, Batcher, Batches, Callers};
use shared::operations::Prepared;
use shared::store::keys::{ApiKey, Caller, KeyDigest, KeyId, Scope};
use shared::store::{Store, StoreError, within};
use shared::telemetry::display_chain;
use tokio::time::Instant;

use super::Services;
use super::problem::ApiError;

/// How long a cached key is trusted without asking the store. Every process is notified of a revocation at once; where notifications do not
/// arrive, a revoked key still works for this long.
const BELIEVED_FOR: Duration = Duration::from_secs(5);

/// Maximum number of keys in the cache.
const MOST_CACHED: u64 = 10_000;

/// How long the look-up of a key may take: it counts against the two seconds that a caller is promised.
const KNOWN_WITHIN: Duration = Duration::from_millis(800);

/// How keys that are not in the cache are looked up. Anybody can send keys that do not exist, so they share one connection.
const LOOK_UPS: Batches = Batches { largest: 256, worthwhile: 16, waiting: 4096, at_once: 1, callers: Callers::Leave };

/// Looks up API keys. Clones share the cache.
#[derive(Clone)]
pub struct Keys {
    prepared: Prepared,
    cache: Cache<KeyDigest, Arc<Caller>>,
    look_ups: Batcher<KeyDigest, Option<Caller>, StoreError>,
}

enum Failed {
    Unknown,
    Store(BatchError<StoreError>),
}

impl Keys {
    /// Starts the task that looks up keys in this store. Until the process is `prepared`, no key is reported as unknown: the bootstrap key
    /// may not exist yet.
    #[must_use]
    pub fn new(store: Store, prepared: Prepared) -> Self {
        let cache = Cache::builder().max_capacity(MOST_CACHED).time_to_live(BELIEVED_FOR).build();
        let look_ups = Batcher::spawn(LOOK_UPS, move |digests: Vec<KeyDigest>| {
            let store = store.clone();
            async move {
                within(KNOWN_WITHIN, store.callers(&digests)).await.inspect_err(|error| {
                    // Once for all of them: whoever has no key must not be able to fill the log.
                    tracing::warn!(error = display_chain(error), "can't look up API keys");
                })
            }
        });
        Self { prepared, cache, look_ups }
    }

    /// Clears the cache: a key was revoked, or may have been.
    pub fn clear_cache(&self) {
        self.cache.invalidate_all();
    }

    async fn find(&self, key: &ApiKey) -> Result<Arc<Caller>, ApiError> {
        if !self.prepared.is_done() {
            return Err(ApiError::Unavailable);
        }
        let digest = key.digest();
        // Concurrent look-ups of the same key share one query. Only keys that exist are cached.
        let found = self.cache.try_get_with(digest, async {
            let found = self.look_ups.submit(digest).await.map_err(Failed::Store)?;
            found.map(Arc::new).ok_or(Failed::Unknown)
        });
        match tokio::time::timeout(KNOWN_WITHIN, found).await {
            Ok(Ok(caller)) if caller.expires.is_none_or(|end| end > std::time::Instant::now()) => Ok(caller),
            Ok(Ok(_)) => Err(ApiError::Unauthorized),
            Ok(Err(failed)) => match &*failed {
                Failed::Unknown => Err(ApiError::Unauthorized),
                Failed::Store(error) => {
                    tracing::debug!(error = display_chain(error), "can't look up an API key");
                    Err(ApiError::Unavailable)
                }
            },
            Err(_) => Err(ApiError::Unavailable),
        }
    }
}

/// The API key of the caller.
#[derive(SecurityScheme)]
#[oai(ty = "api_key", key_name = "X-API-Key", key_in = "header", checker = "check")]
pub struct Authorized(AuthenticatedKey);

/// A known key, and its caller.
pub struct AuthenticatedKey {
    caller: Arc<Caller>,
    took: Duration,
}

impl Authorized {
    /// The caller, if its key has `scope`.
    ///
    /// # Errors
    /// If the key does not have it.
    pub fn with(&self, scope: Scope) -> Result<&Caller, ApiError> {
        if self.has(scope) { Ok(&self.0.caller) } else { Err(ApiError::Forbidden(scope.name())) }
    }

    /// Whether the key has `scope`.
    #[must_use]
    pub fn has(&self, scope: Scope) -> bool {
        self.0.caller.scopes.contains(&scope)
    }

    /// The key whose requests the caller may see. `None` if it may see all requests.
    ///
    /// # Errors
    /// If the key may not read requests.
    pub fn owner(&self) -> Result<Option<KeyId>, ApiError> {
        if self.has(Scope::Admin) { Ok(None) } else { Ok(Some(self.with(Scope::Sign)?.key)) }
    }

    /// How long the look-up took. It counts against the time within which the caller is answered.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.0.took
    }
}

async fn check(request: &Request, presented: PresentedKey) -> poem::Result<AuthenticatedKey> {
    let started = Instant::now();
    let services = request.data::<Arc<Services>>().ok_or(ApiError::Internal)?;
    let caller = services.keys.find(&ApiKey::presented(&presented.key)).await?;
    Ok(AuthenticatedKey { caller, took: started.elapsed() })
}
