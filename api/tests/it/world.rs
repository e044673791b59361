//! Everything that a test of the whole service needs, each part the real one.

use std::collections::HashSet;
use std::time::Duration;

use devkit::ports::free_port;
use devkit::postgres::{Cluster, ClusterOptions, shared_cluster};
use devkit::processes::{self, Process};
use devkit::receiver::{Delivery, Receiver, ReceiverOptions};
use devkit::upstream::{FaultKind, Faults, Simulator, SimulatorOptions, When};
pub(crate) use devkit::wait::{PATIENCE, until};
use futures_util::future::join_all;
use reqwest::{Response, StatusCode};
use serde_json::{Value, json};

pub(crate) const KEY: &str = "key-of-the-tests";
pub(crate) const SECRET: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";

pub(crate) type Env = Vec<(String, String)>;

/// A program of the workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Binary {
    Api,
    Worker,
}

pub(crate) async fn spawn(binary: Binary, args: &[&str], env: &Env) -> Process {
    let path = match binary {
        Binary::Api => env!("CARGO_BIN_EXE_api").into(),
        Binary::Worker => tokio::task::spawn_blocking(|| {
            processes::build().unwrap();
            processes::program("worker").unwrap()
        })
        .await
        .unwrap(),
    };
    Process::spawn(&path, args, env.clone()).unwrap()
}

pub(crate) fn env(pairs: &[(&str, &str)]) -> Env {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// How a world differs from the default one.
pub(crate) struct Options {
    pub(crate) upstream: SimulatorOptions,
    pub(crate) rate: &'static str,
    pub(crate) api: Env,
    pub(crate) worker: Env,
    /// Whether it has its own Postgres, which can be crashed, instead of the one that the tests of this process share.
    pub(crate) own_postgres: bool,
    /// The database address for the programs, with `{}` in place of the database name. `None` to connect directly.
    pub(crate) address: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            upstream: SimulatorOptions::reliable(),
            rate: "1000/1s",
            api: Env::new(),
            worker: Env::new(),
            own_postgres: false,
            address: None,
        }
    }
}

pub(crate) struct World {
    pub(crate) upstream: Simulator,
    pub(crate) receiver: Receiver,
    pub(crate) api: Process,
    pub(crate) worker: Process,
    pub(crate) url: String,
    pub(crate) worker_url: String,
    pub(crate) database: String,
    pub(crate) own_postgres: Option<Cluster>,
    pub(crate) client: reqwest::Client,
    api_env: Env,
    worker_env: Env,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(Options::default()).await
    }

    pub(crate) async fn with(options: Options) -> Self {
        let own_postgres = if options.own_postgres { Some(Cluster::start(ClusterOptions::default()).await.unwrap()) } else { None };
        Self::over(own_postgres, options).await
    }

    /// A world on this Postgres, or on the shared one if `None`.
    pub(crate) async fn over(own_postgres: Option<Cluster>, options: Options) -> Self {
        shared::tls::use_ring();
        let cluster = match &own_postgres {
            Some(cluster) => cluster,
            None => shared_cluster().await.unwrap(),
        };
        let name = format!("w{}", uuid::Uuid::now_v7().simple());
        cluster.create_database(&name).await.unwrap();
        let database = cluster.url(&name);
        let address = options.address.map_or_else(|| database.clone(), |address| address.replace("{}", &name));
        let any = "127.0.0.1:0".parse().unwrap();
        let upstream = Simulator::start(any, options.upstream).await.unwrap();
        let receiver = Receiver::start(any, ReceiverOptions { secret: Some(SECRET.to_owned()) }).await.unwrap();
        let (port, worker_port) = (free_port().unwrap(), free_port().unwrap());
        let api_env = [
            env(&[
                ("DATABASE_URL", &address),
                ("API_LISTEN", &format!("127.0.0.1:{port}")),
                ("BOOTSTRAP_API_KEY", KEY),
                ("BOOTSTRAP_WEBHOOK_SECRET", SECRET),
            ]),
            options.api,
        ]
        .concat();
        let worker_env = [
            env(&[
                ("DATABASE_URL", &address),
                ("WORKER_LISTEN", &format!("127.0.0.1:{worker_port}")),
                ("UPSTREAM_URL", &upstream.url()),
                ("UPSTREAM_API_KEY", "upstream-key"),
                ("UPSTREAM_RATE", options.rate),
                ("WEBHOOK_ALLOW_NETWORKS", "127.0.0.0/8"),
                ("WEBHOOK_RETRY_SCHEDULE", "200ms,200ms,500ms,1s,1s,1s,1s,1s,1s,1s,1s,1s"),
            ]),
            options.worker,
        ]
        .concat();
        let api = spawn(Binary::Api, &[], &api_env).await;
        let worker = spawn(Binary::Worker, &[], &worker_env).await;
        let (url, worker_url) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{worker_port}"));
        let client = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().unwrap();
        let world = Self { upstream, receiver, api, worker, url, worker_url, database, own_postgres, client, api_env, worker_env };
        world.ready(&world.url, &world.api).await;
        world.ready(&world.worker_url, &world.worker).await;
        world
    }

    /// Waits until a process reports that it is ready.
    async fn ready(&self, url: &str, process: &Process) {
        let started = std::time::Instant::now();
        let ready = async || self.client.get(format!("{url}/health/ready")).send().await.is_ok_and(|answer| answer.status() == 200);
        while !ready().await {
            assert!(started.elapsed() < PATIENCE, "{url} was not ready in time:\n{}", process.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) async fn restart_api(&mut self) {
        // Otherwise the new process could ask for the port while the old one still has it.
        self.api.kill().await.unwrap();
        self.api = spawn(Binary::Api, &[], &self.api_env).await;
        self.ready(&self.url, &self.api).await;
    }

    pub(crate) async fn restart_worker(&mut self) {
        self.worker.kill().await.unwrap();
        self.worker = spawn(Binary::Worker, &[], &self.worker_env).await;
    }

    /// Starts one more worker, configured like the first but for these settings.
    pub(crate) async fn another_worker(&self, settings: &Env) -> Process {
        let listen = env(&[("WORKER_LISTEN", &format!("127.0.0.1:{}", free_port().unwrap()))]);
        spawn(Binary::Worker, &[], &[self.worker_env.clone(), listen, settings.clone()].concat()).await
    }

    /// Starts one more api with these settings, and returns it with its address. It may not be ready yet.
    pub(crate) async fn another_api(&self, settings: &Env) -> (Process, String) {
        let port = free_port().unwrap();
        let listen = env(&[("API_LISTEN", &format!("127.0.0.1:{port}"))]);
        let process = spawn(Binary::Api, &[], &[self.api_env.clone(), listen, settings.clone()].concat()).await;
        let url = format!("http://127.0.0.1:{port}");
        let lives = async || self.client.get(format!("{url}/health/live")).send().await.is_ok();
        until("the api listens", lives).await;
        (process, url)
    }

    pub(crate) fn post(&self, body: &Value) -> reqwest::RequestBuilder {
        self.client
            .post(format!("{}/crypto/sign", self.url))
            .header("X-API-Key", KEY)
            .header("Content-Type", "application/json")
            .body(body.to_string())
    }

    pub(crate) async fn sign(&self, message: &str) -> Answer {
        answer(self.post(&json!({ "message": message })).send().await.unwrap()).await
    }

    pub(crate) async fn get(&self, id: &str) -> Response {
        self.client.get(format!("{}/crypto/sign/{id}", self.url)).header("X-API-Key", KEY).send().await.unwrap()
    }

    /// Posts messages with webhooks, to be signed later, and returns their ids. Repeats each POST with its idempotency key until there is a
    /// receipt, as callers do.
    pub(crate) async fn post_all(&self, messages: impl Iterator<Item = String>) -> Vec<String> {
        let posts = messages.map(|message| {
            let body = json!({ "message": message, "webhookUrl": self.hook("/"), "clientRequestId": message });
            async move {
                let mut id = None;
                until("the request is accepted", async || {
                    let Ok(response) = self.post(&body).header("Prefer", "respond-async").send().await else { return false };
                    let answered = answer(response).await;
                    id = matches!(answered.status.as_u16(), 200 | 202).then(|| answered.id());
                    id.is_some()
                })
                .await;
                id.unwrap()
            }
        });
        join_all(posts).await
    }

    /// Waits until each of these requests is signed, and its webhook delivered and verified.
    pub(crate) async fn all_signed_and_delivered(&self, ids: &[String]) {
        let states = join_all(ids.iter().map(|id| self.settled(id))).await;
        assert!(states.iter().all(|state| state["status"] == "signed"), "{states:?}");
        until("every webhook is delivered", async || {
            let deliveries = self.receiver.deliveries();
            let verified = deliveries.iter().filter(|delivery| delivery.verified);
            let told: HashSet<&str> = verified.filter_map(|delivery| delivery.body["data"]["id"].as_str()).collect();
            ids.iter().all(|id| told.contains(id.as_str()))
        })
        .await;
    }

    /// Waits until a request is final, and returns its state.
    pub(crate) async fn settled(&self, id: &str) -> Value {
        let mut state = Value::Null;
        until("the request is final", async || {
            let waited = self.client.get(format!("{}/crypto/sign/{id}", self.url)).header("X-API-Key", KEY).header("Prefer", "wait=5");
            let Ok(answered) = waited.send().await else { return false };
            state = answer(answered).await.body;
            state["status"] == "signed" || state["status"] == "failed"
        })
        .await;
        state
    }

    /// The number that a query returns.
    pub(crate) async fn number(&self, sql: &str) -> i64 {
        use sqlx::{Connection, Row};
        let mut connection = sqlx::PgConnection::connect(&self.database).await.unwrap();
        sqlx::query(sqlx::AssertSqlSafe(sql)).fetch_one(&mut connection).await.unwrap().get(0)
    }

    /// Makes the upstream respond to these calls with a fault.
    pub(crate) async fn fault(&self, kind: FaultKind, when: When) {
        self.upstream.set_faults(Faults::one(kind, when)).await.unwrap();
    }

    pub(crate) async fn no_faults(&self) {
        self.upstream.set_faults(Faults::default()).await.unwrap();
    }

    /// Waits for at least `count` deliveries.
    pub(crate) async fn deliveries(&self, count: usize) -> Vec<Delivery> {
        self.receiver.wait_for(PATIENCE, |deliveries| deliveries.len() >= count).await.unwrap()
    }

    pub(crate) fn hook(&self, path: &str) -> String {
        self.receiver.url(path)
    }
}

/// A response whose body has been read.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) body: Value,
}

impl Answer {
    pub(crate) fn id(&self) -> String {
        self.body["id"].as_str().unwrap_or_else(|| panic!("no id in {self:?}")).to_owned()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// Asserts that the answer is a problem document with this status and code.
    #[track_caller]
    pub(crate) fn is_problem(&self, status: u16, code: &str) {
        assert_eq!((self.status.as_u16(), self.body["code"].as_str()), (status, Some(code)), "{self:?}");
        assert_eq!(self.header("content-type"), "application/problem+json");
        assert_eq!(self.body["status"], status);
        assert!(self.body["title"].is_string() && self.body["detail"].is_string() && self.body["type"].is_string());
    }
}

pub(crate) async fn answer(response: Response) -> Answer {
    let (status, headers) = (response.status(), response.headers().clone());
    let text = response.text().await.unwrap();
    Answer { status, headers, body: serde_json::from_str(&text).unwrap_or(Value::Null) }
}
