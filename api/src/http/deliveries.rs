//! The delivery log of a request, and the replay of its webhook.

use std::sync::Arc;
use std::time::Duration;

use poem::web::Data;
use poem_openapi::param::Path;
use poem_openapi::payload::Json;
use poem_openapi::{ApiResponse, OpenApi};
use shared::contract::Deliveries;
use shared::store::deliveries::Replay;
use shared::store::keys::KeyId;
use shared::store::{Store, StoreError, within};
use shared::telemetry::display_chain;
use uuid::Uuid;

use super::Services;
use super::auth::Authorized;
use super::problem::{ApiError, Documented, Fails};

/// How long each Postgres call may take: with the look-up of the key, an operation stays within two seconds.
const ASK_WITHIN: Duration = Duration::from_millis(500);

/// The operations on deliveries.
pub struct DeliveriesApi;

/// A delivery log.
#[derive(ApiResponse)]
pub enum Log {
    /// What was sent and what came back.
    #[oai(status = 200)]
    Log(Json<Deliveries>),
}

/// The answer to a replay.
#[derive(ApiResponse)]
pub enum Again {
    /// The webhook is sent again, or was about to be; this is the current log.
    #[oai(status = 202)]
    Sending(Json<Deliveries>),
}

/// The problems of a GET of the log.
#[derive(Debug)]
pub struct OnList;

impl Documented for OnList {
    const PROBLEMS: &'static [(u16, &'static str)] = &[
        (401, "The API key is missing or unknown."),
        (403, "The API key may not read requests."),
        (404, "There is no such request, or it is somebody else's."),
        (503, "The log could not be read."),
    ];
}

/// The problems of a replay.
#[derive(Debug)]
pub struct OnReplay;

impl Documented for OnReplay {
    const PROBLEMS: &'static [(u16, &'static str)] = &[
        (401, "The API key is missing or unknown."),
        (403, "The API key may not read requests."),
        (404, "There is no such request, or it is somebody else's."),
        (409, "There is nothing to tell yet (`not-final`), or the request asked for no webhook (`no-webhook`)."),
        (503, "The wish could not be stored."),
    ];
}

#[OpenApi]
impl DeliveriesApi {
    /// Deliveries of a webhook
    ///
    /// The last 100 deliveries of the request's webhook, each with what the receiver answered.
    #[oai(path = "/crypto/sign/:id/deliveries", method = "get", operation_id = "deliveries")]
    async fn list(
        &self,
        key: Authorized,
        /// The id of a request.
        id: Path<Uuid>,
        Data(services): Data<&Arc<Services>>,
    ) -> Result<Log, Fails<OnList>> {
        Ok(Log::Log(Json(read(&services.store, id.0, key.owner()?).await?)))
    }

    /// Send a webhook again
    ///
    /// The webhook is sent with the same `webhook-id` and a new timestamp, and with the whole retry schedule. A webhook that waits for its
    /// next attempt is sent now. While a delivery is in flight, nothing changes, so it is safe to ask twice.
    #[oai(path = "/crypto/sign/:id/deliveries", method = "post", operation_id = "redeliver")]
    async fn replay(
        &self,
        key: Authorized,
        /// The id of a request.
        id: Path<Uuid>,
        Data(services): Data<&Arc<Services>>,
    ) -> Result<Again, Fails<OnReplay>> {
        let owner = key.owner()?;
        match in_time(services.store.replay(id.0, owner)).await? {
            Replay::Sending => Ok(Again::Sending(Json(read(&services.store, id.0, owner).await?))),
            Replay::NotFinal => Err(ApiError::NotFinal.into()),
            Replay::NoWebhook => Err(ApiError::NoWebhook.into()),
            Replay::Unknown => Err(ApiError::UnknownRequest.into()),
        }
    }
}

async fn read(store: &Store, id: Uuid, owner: Option<KeyId>) -> Result<Deliveries, ApiError> {
    in_time(store.deliveries(id, owner)).await?.ok_or(ApiError::UnknownRequest)
}

/// The result of a Postgres call, if it comes in time.
async fn in_time<T>(asked: impl Future<Output = Result<T, StoreError>>) -> Result<T, ApiError> {
    within(ASK_WITHIN, asked).await.map_err(|error| {
        tracing::warn!(error = display_chain(&error), "can't read or change deliveries");
        ApiError::Unavailable
    })
}
