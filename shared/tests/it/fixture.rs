//! A database for one test, and short ways to fill it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::time::Duration;

use clap::Parser;
use devkit::wait::until;
use shared::address_guard::canonical;
use shared::contract::SigningRequest;
use shared::message::Message;
use shared::secret::Secret;
use shared::settings::DatabaseSettings;
use shared::standard_webhooks::WebhookSecret;
use shared::store::accept::{Accepted, NewRequest, Stored, WebhookTarget};
use shared::store::keys::{ApiKey, KeyId, Scope};
use shared::store::low_water::LowWater;
use shared::store::receivers::{Room, Wanted};
use shared::store::requests::RequestState;
use shared::store::sign_claim::SignJob;
use shared::store::sign_finish::{Call, SignEnding, SignFinish, UpstreamNews};
use shared::store::upstream::{Agreement, WorkerId};
use shared::store::{Claimed, Store, StoreError};
use shared::units::Rate;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub(crate) const LEASE: Duration = Duration::from_mins(1);

/// Makes every lease expire.
pub(crate) const EXPIRE: &str = "update jobs set leased_until = now() - interval '1 s' where lease_token is not null";

#[derive(Parser)]
struct Settings {
    #[command(flatten)]
    database: DatabaseSettings,
}

pub(crate) struct Fixture {
    pub(crate) store: Store,
    pub(crate) url: String,
    pub(crate) key: KeyId,
    rate: Mutex<Rate>,
}

pub(crate) fn connect(url: &str) -> Store {
    connect_with(url, 20)
}

pub(crate) fn connect_with(url: &str, most: u32) -> Store {
    let settings = Settings::parse_from(["test", "--database-url", url, "--database-max-connections", &most.to_string()]);
    Store::connect_lazily(&settings.database).unwrap()
}

async fn new_database() -> String {
    let cluster = devkit::postgres::shared_cluster().await.unwrap();
    let database = format!("t{}", Uuid::now_v7().simple());
    cluster.create_database(&database).await.unwrap();
    cluster.url(&database)
}

/// A database that was migrated up to this version.
pub(crate) async fn database_at(version: i64) -> String {
    let url = new_database().await;
    let mut connection = PgConnection::connect(&url).await.unwrap();
    sqlx::migrate!("../migrations").run_to(version, &mut connection).await.unwrap();
    url
}

impl Fixture {
    /// A migrated database with one API key, and a rate of ten calls per minute.
    pub(crate) async fn new() -> Self {
        let fixture = Self::without_rate().await;
        fixture.agree("10/60s").await;
        fixture
    }

    pub(crate) async fn without_rate() -> Self {
        Self::in_database(new_database().await).await
    }

    /// A database that was migrated up to version `from`, in which `old` was run, and which was then migrated to the newest version.
    pub(crate) async fn upgraded(from: i64, old: &[&str]) -> Self {
        let url = database_at(from).await;
        let mut connection = PgConnection::connect(&url).await.unwrap();
        for sql in old {
            sqlx::raw_sql(AssertSqlSafe(*sql)).execute(&mut connection).await.unwrap();
        }
        let fixture = Self::in_database(url).await;
        fixture.agree("10/60s").await;
        fixture
    }

    pub(crate) async fn in_database(url: String) -> Self {
        let store = connect(&url);
        // As the programs do: the first connection to a busy server may take longer than a connection may.
        store.when_available(&CancellationToken::new(), async || store.migrate().await).await.unwrap();
        let key = new_key(&store, "test").await;
        Self { store, url, key, rate: Mutex::new("10/60s".parse().unwrap()) }
    }

    /// The same database with new sessions, which have no plans yet. The previous sessions have ended, and so have reported what they read.
    pub(crate) async fn with_new_sessions(self) -> Self {
        self.store.close().await;
        let left = "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'countersign'";
        until("the sessions have ended", async || self.number(left).await == 0).await;
        let url = self.url.clone();
        self.over(url)
    }

    /// The same over another address: of another role, or another database.
    pub(crate) fn over(self, url: String) -> Self {
        Self { store: connect(&url), url, ..self }
    }

    /// Agrees on this rate, as a worker that has left again; later claims use it.
    pub(crate) async fn agree(&self, rate: &str) {
        let (worker, rate) = (WorkerId::generate(), rate.parse().unwrap());
        assert_eq!(self.store.join_workers(worker, rate).await.unwrap(), Agreement::Agreed);
        self.store.leave_workers(worker).await.unwrap();
        *self.rate.lock().unwrap() = rate;
    }

    pub(crate) async fn connection(&self) -> PgConnection {
        PgConnection::connect(&self.url).await.unwrap()
    }

    /// Resets the counts of what is read and written.
    pub(crate) async fn count_anew(&self) {
        self.statistics_have_arrived().await;
        self.run("select pg_stat_reset()").await;
        self.statistics_have_arrived().await;
    }

    /// The number that a query of the statistics returns, once those of all ended sessions have arrived.
    pub(crate) async fn counted(&self, sql: &str) -> i64 {
        self.statistics_have_arrived().await;
        self.number(sql).await
    }

    /// Waits for the statistics of all ended sessions. Before Postgres 15, sessions send them to a collector in messages that are read in
    /// order: when the last one has been read, so have the others.
    async fn statistics_have_arrived(&self) {
        let last = format!("last_{}", Uuid::now_v7().simple());
        let ending =
            "select count(*) from pg_stat_activity where datname = current_database() and application_name = '' and state = 'idle'";
        let none = async || until("nobody is about to end", async || self.number(ending).await == 0).await;
        none().await;
        self.run(&format!("create table {last} (); insert into {last} default values")).await;
        none().await;
        let arrived = format!("select coalesce(sum(n_tup_ins), 0)::bigint from pg_stat_user_tables where relname = '{last}'");
        until("the statistics have arrived", async || self.number(&arrived).await > 0).await;
    }

    /// Waits until a session of this database waits for a lock that another one holds.
    pub(crate) async fn until_somebody_waits_for_a_lock(&self) {
        let waiting = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        until("somebody waits for a lock", async || self.number(waiting).await > 0).await;
    }

    /// Runs a statement, for example to move stored times.
    pub(crate) async fn run(&self, sql: &str) {
        let mut connection = self.connection().await;
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
    }

    /// Runs a statement that Postgres refuses, and returns the reason.
    pub(crate) async fn refused(&self, sql: &str) -> String {
        let mut connection = self.connection().await;
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap_err().to_string()
    }

    /// The number that a query returns.
    pub(crate) async fn number(&self, sql: &str) -> i64 {
        let mut connection = self.connection().await;
        sqlx::query(AssertSqlSafe(sql)).fetch_one(&mut connection).await.unwrap().get(0)
    }

    pub(crate) fn request(&self, message: &str) -> NewRequest {
        NewRequest {
            id: Uuid::now_v7(),
            key: self.key,
            message: Message::new(message.to_owned()),
            webhook: None,
            client_request_id: None,
            traceparent: None,
        }
    }

    pub(crate) fn with_webhook(&self, message: &str) -> NewRequest {
        let webhook = webhook_to("http://example.com/", BTreeMap::new());
        NewRequest { webhook: Some(webhook), ..self.request(message) }
    }

    /// Stores a request as `api` does: with `accept_new` if possible, otherwise with `accept`.
    pub(crate) async fn accept(&self, request: NewRequest) -> Stored {
        self.try_accept(request).await.expect("it is stored")
    }

    /// Like [`accept`](Self::accept), for a request that may be rejected.
    pub(crate) async fn try_accept(&self, request: NewRequest) -> Accepted {
        let group = [request];
        match self.store.accept_new(&group, u64::MAX).await {
            Ok(mut accepted) if accepted[0].is_some() => Ok(accepted.remove(0).unwrap()),
            Ok(_) | Err(StoreError::Refused(_)) => self.store.accept(&group, u64::MAX).await.unwrap().remove(0),
            Err(error) => panic!("{error:?}"),
        }
    }

    /// Counts rows that refer to missing rows, where Postgres does not check the reference, and rows that nothing refers to any more.
    pub(crate) async fn strays(&self) -> i64 {
        self.number(
            "select (select count(*) from jobs j where kind = 'sign' and not exists (select from messages m where m.id = j.message_id))
                + (select count(*) from requests r where not exists (select from jobs j where j.id = r.sign_job_id))
                + (select count(*) from requests r where not exists (select from api_keys k where k.id = r.api_key_id))
                + (select count(*) from attempts a where not exists (select from jobs j where j.id = a.job_id))
                + (select count(*) from jobs j where kind = 'sign' and not exists (select from requests r where r.sign_job_id = j.id))
                + (select count(*) from messages m where not exists (select from jobs j where j.message_id = m.id))",
        )
        .await
    }

    /// Stores a request for `message`, and returns its id.
    pub(crate) async fn post(&self, message: &str) -> Uuid {
        self.accept(self.request(message)).await.id
    }

    /// What its caller sees of a request.
    pub(crate) async fn state(&self, id: Uuid) -> SigningRequest {
        self.states(&[id]).await.remove(&id).unwrap().request
    }

    /// The states of those of these requests that exist.
    pub(crate) async fn states(&self, ids: &[Uuid]) -> HashMap<Uuid, RequestState> {
        self.store.requests(ids).await.unwrap().into_iter().map(|(id, state)| (id, state.unwrap())).collect()
    }

    /// Stores a request for each of so many messages.
    pub(crate) async fn post_many(&self, count: usize) {
        let requests: Vec<_> = (0..count).map(|n| self.request(&format!("message {n}"))).collect();
        self.store.accept(&requests, u64::MAX).await.unwrap();
    }

    pub(crate) async fn claim(&self, most: usize) -> Vec<SignJob> {
        self.claimed(most).await.unwrap().jobs
    }

    pub(crate) async fn claimed(&self, most: usize) -> Result<Claimed<SignJob>, StoreError> {
        let rate = *self.rate.lock().unwrap();
        Ok(self.store.claim_sign_jobs(most, LEASE, rate, LowWater::default()).await?.0)
    }

    pub(crate) async fn finish(&self, job: SignJob, ending: SignEnding) -> shared::store::Finished {
        self.store.finish_sign_jobs(&[finish(job, ending)]).await.unwrap()[0]
    }

    /// Accepts and signs a message.
    pub(crate) async fn signed(&self, message: &str) -> Uuid {
        let id = self.post(message).await;
        let job = self.claim(1).await.remove(0);
        self.finish(job, SignEnding::Signed(format!("signature of {message}"))).await;
        id
    }
}

/// Room for any number of jobs.
pub(crate) const ANY_NUMBER: Room = Room { in_all: u32::MAX, of_one_server: u32::MAX };

/// Up to `most` jobs, for any receivers.
pub(crate) fn any_receiver(most: usize) -> Wanted {
    Wanted { most, per_receiver: u32::MAX, held: Vec::new(), newcomers: ANY_NUMBER, troubled: ANY_NUMBER }
}

pub(crate) fn finish(job: SignJob, ending: SignEnding) -> SignFinish {
    SignFinish {
        digest: job.message.digest(),
        lease: job.lease,
        ending,
        call: Call::Ended,
        status: None,
        error: None,
        upstream: UpstreamNews::None,
    }
}

pub(crate) async fn new_key(store: &Store, name: &str) -> KeyId {
    let key = ApiKey::generate();
    store.create_key(name, &key, &[Scope::Sign], &WebhookSecret::generate(), None).await.unwrap();
    store.callers(&[key.digest()]).await.unwrap().remove(0).unwrap().key
}

/// A webhook to an address, as `api` would store it.
pub(crate) fn webhook_to(url: &str, headers: BTreeMap<String, String>) -> WebhookTarget {
    WebhookTarget::new(url.to_owned(), &canonical(url.parse().unwrap()), Secret::new(headers))
}

pub(crate) fn id(accepted: &Accepted) -> Uuid {
    accepted.as_ref().expect("it is stored").id
}

/// The same request, with an idempotency key.
pub(crate) fn keyed(request: NewRequest, key: &str) -> NewRequest {
    NewRequest { client_request_id: Some(key.to_owned()), ..request }
}
