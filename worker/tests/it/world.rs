//! A database, an upstream, a receiver, and workers.

use std::collections::BTreeMap;

use clap::Parser;
use devkit::ports::free_port;
use devkit::postgres::shared_cluster;
use devkit::processes::Process;
use devkit::receiver::{Receiver, ReceiverOptions};
use devkit::upstream::{FaultKind, Faults, Simulator, SimulatorOptions, When};
pub(crate) use devkit::wait::{PATIENCE, until};
use shared::contract::{Deliveries, SigningRequest, Status};
use shared::message::Message;
use shared::secret::Secret;
use shared::settings::DatabaseSettings;
use shared::store::Store;
use shared::store::accept::{NewRequest, WebhookTarget};
use shared::store::keys::{ApiKey, KeyId, Scope};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub(crate) const SECRET: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";

#[derive(Parser)]
struct Settings {
    #[command(flatten)]
    database: DatabaseSettings,
}

pub(crate) struct World {
    pub(crate) store: Store,
    pub(crate) upstream: Simulator,
    pub(crate) receiver: Receiver,
    key: KeyId,
    database: String,
    rate: String,
}

impl World {
    pub(crate) async fn new(upstream: SimulatorOptions, rate: &str) -> Self {
        shared::tls::use_ring();
        let cluster = shared_cluster().await.unwrap();
        let name = format!("k{}", Uuid::now_v7().simple());
        cluster.create_database(&name).await.unwrap();
        let database = cluster.url(&name);
        let store = Store::connect_lazily(&Settings::parse_from(["test", "--database-url", &database]).database).unwrap();
        // As the programs do: the first connection to a busy server may take longer than a connection may.
        store.when_available(&CancellationToken::new(), async || store.migrate().await).await.unwrap();
        let key = ApiKey::generate();
        store.create_key("test", &key, &[Scope::Sign], &SECRET.parse().unwrap(), None).await.unwrap();
        let key = store.callers(&[key.digest()]).await.unwrap().remove(0).unwrap().key;
        let any = "127.0.0.1:0".parse().unwrap();
        let upstream = Simulator::start(any, upstream).await.unwrap();
        let receiver = Receiver::start(any, ReceiverOptions { secret: Some(SECRET.to_owned()) }).await.unwrap();
        Self { store, upstream, receiver, key, database, rate: rate.to_owned() }
    }

    pub(crate) fn database(&self) -> &str {
        &self.database
    }

    pub(crate) fn worker(&self, more: &[(&str, &str)]) -> Process {
        let listen = format!("127.0.0.1:{}", free_port().unwrap());
        let url = self.upstream.url();
        let base = [
            ("DATABASE_URL", self.database.as_str()),
            ("WORKER_LISTEN", &listen),
            ("UPSTREAM_URL", &url),
            ("UPSTREAM_API_KEY", "upstream-key"),
            ("UPSTREAM_RATE", &self.rate),
            ("SIGN_RETRY_BASE", "50ms"),
            ("SIGN_RETRY_MAX", "1s"),
            ("WEBHOOK_ALLOW_NETWORKS", "127.0.0.0/8"),
            ("WEBHOOK_RETRY_SCHEDULE", "100ms,100ms,200ms,500ms,1s,1s,1s,1s"),
        ];
        let env: BTreeMap<&str, &str> = base.into_iter().chain(more.iter().copied()).collect();
        let env = env.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
        Process::spawn(env!("CARGO_BIN_EXE_worker").as_ref(), [""; 0], env).unwrap()
    }

    pub(crate) async fn post(&self, messages: impl IntoIterator<Item = String>) -> Vec<Uuid> {
        self.post_to(messages.into_iter().map(|message| (message, self.receiver.url("/")))).await
    }

    /// Stores requests, each with the address of its webhook.
    pub(crate) async fn post_to(&self, messages: impl IntoIterator<Item = (String, String)>) -> Vec<Uuid> {
        let requests: Vec<NewRequest> = messages
            .into_iter()
            .map(|(message, url)| NewRequest {
                id: Uuid::now_v7(),
                key: self.key,
                message: Message::new(message),
                webhook: Some(WebhookTarget::new(url.clone(), &url.parse().unwrap(), Secret::new(BTreeMap::new()))),
                client_request_id: None,
                traceparent: None,
            })
            .collect();
        self.store.accept(&requests, u64::MAX).await.unwrap();
        requests.into_iter().map(|request| request.id).collect()
    }

    /// Signs a message, so that for later requests only their webhook is left to do.
    pub(crate) async fn signed(&self, message: &str) {
        let ids = self.post_to([(message.to_owned(), self.receiver.url("/signed"))]).await;
        self.settled(&ids).await;
        self.receiver.wait_for(PATIENCE, |all| all.iter().any(|delivery| delivery.path == "/signed")).await.unwrap();
    }

    /// The delivery log of a request.
    pub(crate) async fn log(&self, id: Uuid) -> Deliveries {
        self.store.deliveries(id, None).await.unwrap().unwrap()
    }

    pub(crate) async fn states(&self, ids: &[Uuid]) -> Vec<SigningRequest> {
        let mut states = self.store.requests(ids).await.unwrap();
        ids.iter().map(|id| states.remove(id).expect("no request is lost").unwrap().request).collect()
    }

    pub(crate) async fn settled(&self, ids: &[Uuid]) -> Vec<SigningRequest> {
        let mut states = Vec::new();
        until("every request is final", async || {
            states = self.states(ids).await;
            states.iter().all(|state| state.status != Status::Pending)
        })
        .await;
        states
    }

    pub(crate) async fn fault(&self, kind: FaultKind, when: When) {
        self.upstream.set_faults(Faults::one(kind, when)).await.unwrap();
    }
}

pub(crate) fn numbered(count: usize) -> impl Iterator<Item = String> {
    (0..count).map(|n| format!("message {n}"))
}
