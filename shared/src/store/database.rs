//! The connection to Postgres: which host, and what kind of connection.
//!
//! In production, Postgres is usually more than one server, and often has a proxy in front.
//!
//! - **Several hosts.** The address may name more than one (`postgres://user@a:5432,b:5432/db`). The host that accepts writes is used, and
//!   when it can't be reached any more, the hosts are searched again: that handles a failover. A standby is never used.
//! - **A proxy that pools transactions**, such as PgBouncer. No session state survives a transaction (see `session`), so every statement
//!   runs in a transaction that brings its settings along, and nobody listens.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use async_stream::try_stream;
use futures_util::future::{BoxFuture, select_ok};
use futures_util::stream::{BoxStream, TryStreamExt};
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPool, PgPoolOptions, PgRow, PgStatement, PgTypeInfo};
use sqlx::{AssertSqlSafe, Connection, Execute, Executor, Postgres, SqlSafeStr, SqlStr};
use tokio::sync::Mutex;

use super::session::{BEGIN_WITH_SETTINGS, Pooling, Server, probe, takes_writes, unavailable};
use super::transaction::{Step, Transaction};
use crate::settings::each_host;
use crate::telemetry::display_chain;

/// How long a statement waits for a free connection. It is short because callers are promised an answer within two seconds.
const ACQUIRE_WITHIN: Duration = Duration::from_secs(1);

/// How long to wait for a connection, while nobody else gets one either, before asking the hosts: with several hosts, and with only one.
const ELSEWHERE_AFTER: Duration = Duration::from_millis(250);
const ALONE_AFTER: Duration = Duration::from_millis(900);

/// How long the hosts may take to report their role.
const PROBE_WITHIN: Duration = Duration::from_secs(3);

/// The maximum number of retired pools to one server that still have open connections. With the one in use, a process has at most three
/// times its setting in connections to a server.
const MOST_RETIRED: usize = 2;

const CLOSE_WITHIN: Duration = Duration::from_secs(3);

/// How long after its last use a connection is assumed to work.
const TRUSTED_FOR: Duration = Duration::from_millis(200);

/// Connections to the Postgres that accepts writes. Clones share them. Like a pool, it runs each statement in its own transaction.
#[derive(Clone, Debug)]
pub(super) struct Database {
    hosts: Arc<[PgConnectOptions]>,
    most: u32,
    primary: Arc<RwLock<Primary>>,
    /// Held by the only search at a time: the last one that failed.
    discovering: Arc<Mutex<Option<FailedSearch>>>,
}

/// A search for the host that accepts writes, which found none.
#[derive(Clone, Debug)]
struct FailedSearch {
    ended_at: Instant,
    why: String,
}

/// The host that accepts writes, as far as is known.
#[derive(Clone, Debug)]
struct Primary {
    /// Connections to the host that was found last.
    pool: PgPool,
    /// The server behind them; `None` if no host was asked yet.
    server: Option<Server>,
    /// Earlier pools that still have open connections.
    retired: Vec<(PgPool, Option<Server>)>,
    /// How long connections keep their session; `None` if no host was asked yet.
    pooling: Option<Pooling>,
    /// How often hosts were asked successfully.
    generation: u64,
    /// When a connection was last acquired.
    last_acquired: Instant,
}

impl Database {
    /// Creates a handle that connects on first use. `url` may name several hosts.
    pub(super) fn connect_lazily(url: &str, most: u32) -> Result<Self, sqlx::Error> {
        let hosts = each_host(url)
            .iter()
            .map(|url| Ok(without_brackets(url.parse::<PgConnectOptions>()?.application_name("countersign"))))
            .collect::<Result<Arc<[_]>, sqlx::Error>>()?;
        let primary = Primary {
            pool: pool(most, hosts[0].clone()),
            server: None,
            retired: Vec::new(),
            pooling: None,
            generation: 0,
            last_acquired: Instant::now(),
        };
        Ok(Self { hosts, most, primary: Arc::new(RwLock::new(primary)), discovering: Arc::default() })
    }

    /// Closes every connection after its running statements.
    pub(super) async fn close(&self) {
        // A Postgres that hangs must not keep the process alive.
        let _ = tokio::time::timeout(CLOSE_WITHIN, self.primary().pool.close()).await;
    }

    fn primary(&self) -> Primary {
        self.primary.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Begins a transaction of several statements.
    pub(super) async fn begin(&self) -> Result<Transaction, sqlx::Error> {
        self.begin_with(None).await
    }

    /// The same. With a `lock_timeout`, it waits for a lock for no longer than this, not for as long as the session does.
    pub(super) async fn begin_with(&self, lock_timeout: Option<Duration>) -> Result<Transaction, sqlx::Error> {
        let pooling = self.pooling().await?;
        let connection = self.acquire().await?;
        let begin = if pooling == Pooling::Transaction { BEGIN_WITH_SETTINGS.as_str() } else { "begin" };
        let begin = match lock_timeout {
            Some(limit) => format!("{begin}; set local lock_timeout = {}", limit.as_millis()),
            None => begin.to_owned(),
        };
        let begin = Some(AssertSqlSafe(begin).into_sql_str());
        // In its own task, because a BEGIN must not be cancelled: sqlx 0.9.0 counts a transaction as begun only after it has read the
        // answer. A connection that is returned before that would stay in a transaction that nobody ends
        // (https://github.com/launchbadge/sqlx/issues/4385).
        let begun = tokio::spawn(sqlx::Transaction::begin(connection, begin));
        Ok(Transaction { inner: begun.await.map_err(|_| sqlx::Error::WorkerCrashed)??, pooling })
    }

    /// A connection that receives notifications. `None` where sessions are shared, because the notifications would reach other clients.
    pub(super) async fn listener(&self) -> Result<Option<PgListener>, sqlx::Error> {
        match self.pooling().await? {
            Pooling::Session => PgListener::connect_with(&self.primary().pool).await.map(Some),
            Pooling::Transaction => Ok(None),
        }
    }

    /// A connection to the host that accepts writes. If nobody could get one for a while, the hosts are asked, and connections to the one
    /// that accepts writes replace those that may be waiting for a host that vanished silently.
    async fn acquire(&self) -> Result<PoolConnection<Postgres>, sqlx::Error> {
        self.try_acquire().await.map_err(not_connected)
    }

    async fn try_acquire(&self) -> Result<PoolConnection<Postgres>, sqlx::Error> {
        let primary = self.primary();
        let patience = if self.hosts.len() == 1 { ALONE_AFTER } else { ELSEWHERE_AFTER };
        let acquired = {
            let mut acquire = Box::pin(primary.pool.acquire());
            match tokio::time::timeout(patience, &mut acquire).await {
                Ok(acquired) => acquired,
                // Others get connections: there are just too few.
                Err(_) if self.primary().last_acquired.elapsed() < patience => match acquire.await {
                    Err(sqlx::Error::PoolTimedOut) => return Err(sqlx::Error::PoolTimedOut),
                    acquired => acquired,
                },
                Err(_) => Err(sqlx::Error::PoolTimedOut),
            }
        };
        if let Ok(connection) = acquired {
            self.primary.write().unwrap_or_else(PoisonError::into_inner).last_acquired = Instant::now();
            return Ok(connection);
        }
        // Only the shutdown of the process closes the pool in use. A statement that still runs then must not open it again.
        if self.primary().pool.is_closed() {
            return Err(sqlx::Error::PoolClosed);
        }
        // The caller may give up at any moment, but the search continues.
        let database = self.clone();
        let discovered = tokio::spawn(async move { database.discover(primary.generation).await });
        discovered.await.map_err(|_| sqlx::Error::WorkerCrashed)??;
        self.primary().pool.acquire().await
    }

    /// How long connections keep their session. The first call finds it out.
    pub(super) async fn pooling(&self) -> Result<Pooling, sqlx::Error> {
        let known = self.primary.read().unwrap_or_else(PoisonError::into_inner).pooling;
        match known {
            Some(pooling) => Ok(pooling),
            None => self.discover(0).await,
        }
    }

    /// Searches the hosts, unless another search has succeeded since this `generation`. Who waits for a search shares its result:
    /// during an outage, searches must not queue up.
    async fn discover(&self, generation: u64) -> Result<Pooling, sqlx::Error> {
        let waits_since = Instant::now();
        let mut last_failed = self.discovering.lock().await;
        let before = self.primary();
        if let (true, Some(pooling)) = (before.generation != generation, before.pooling) {
            return Ok(pooling);
        }
        if let Some(failed) = last_failed.as_ref().filter(|failed| failed.ended_at >= waits_since) {
            return Err(unavailable(failed.why.clone()));
        }
        let searched = Box::pin(self.search(before)).await;
        if let Err(error) = &searched {
            let why = if let sqlx::Error::Configuration(why) = error { why.to_string() } else { display_chain(error) };
            *last_failed = Some(FailedSearch { ended_at: Instant::now(), why });
        }
        searched
    }

    /// Asks all hosts, and switches to the first that reports that it accepts writes.
    async fn search(&self, before: Primary) -> Result<Pooling, sqlx::Error> {
        let probes = self.hosts.iter().map(|host| Box::pin(probe(host)));
        let ((pooling, options, server), _) = match tokio::time::timeout(PROBE_WITHIN, select_ok(probes)).await {
            Ok(first) => first?,
            Err(_) => return Err(unavailable("no host answers")),
        };
        let mut retired = before.retired;
        retired.retain(|(pool, _)| pool.size() > 0);
        // The server answers, and still connections to it hang: for example, it lets nobody commit. More connections would only fill it up.
        // What hangs on a server that is gone hangs for ever, if the host vanished after it had received everything, and fills up nothing.
        if retired.iter().filter(|(_, of)| *of == server).count() >= MOST_RETIRED {
            return Err(unavailable("the server answers, but statements hang"));
        }
        retired.push((before.pool.clone(), before.server));
        let primary = Primary {
            pool: pool(self.most, options),
            server,
            retired,
            pooling: Some(pooling),
            generation: before.generation + 1,
            last_acquired: Instant::now(),
        };
        *self.primary.write().unwrap_or_else(PoisonError::into_inner) = primary;
        // Idle connections are closed; hanging ones are left to the operating system.
        tokio::spawn(async move { before.pool.close().await });
        Ok(pooling)
    }
}

/// sqlx 0.9.0 keeps the brackets of an IPv6 address, and then looks it up like a name.
fn without_brackets(host: PgConnectOptions) -> PgConnectOptions {
    let address = host.get_host().trim_start_matches('[').trim_end_matches(']').to_owned();
    host.host(&address)
}

/// A pool that connects on demand.
fn pool(most: u32, options: PgConnectOptions) -> PgPool {
    PgPoolOptions::new()
        .max_connections(most)
        .acquire_timeout(ACQUIRE_WITHIN)
        // Another round trip for each statement is not worth it: a connection that worked a moment ago works. A connection that was idle
        // for longer is pinged first, so that the first caller after a restart does not get a 503.
        .test_before_acquire(false)
        .before_acquire(|connection, about| {
            let idle = about.idle_for;
            Box::pin(async move {
                if idle > TRUSTED_FOR {
                    connection.ping().await?;
                }
                Ok(true)
            })
        })
        // A host that accepts writes today may be a standby tomorrow.
        .after_connect(|connection, _| Box::pin(async move { takes_writes(connection).await }))
        .connect_lazy_with(options)
}

/// Converts an error from connecting. When Postgres refuses a connection, for example because the role may not log in at present or the
/// database accepts no connections, that is its state, and says nothing about the statement that was to follow.
fn not_connected(error: sqlx::Error) -> sqlx::Error {
    match error {
        sqlx::Error::Database(refused) => unavailable(refused.to_string()),
        error => error,
    }
}

impl<'c> Executor<'c> for &'c Database {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Step, sqlx::Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        Box::pin(try_stream! {
            match self.pooling().await? {
                Pooling::Session => {
                    let mut connection = self.acquire().await?;
                    let mut steps = (&mut *connection).fetch_many(query);
                    while let Some(step) = steps.try_next().await? {
                        yield step;
                    }
                }
                Pooling::Transaction => {
                    let mut transaction = self.begin().await?;
                    let mut steps = (&mut transaction).fetch_many(query);
                    while let Some(step) = steps.try_next().await? {
                        yield step;
                    }
                    drop(steps);
                    transaction.commit().await?;
                }
            }
        })
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<PgRow>, sqlx::Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        Box::pin(async move {
            let mut rows: Vec<PgRow> = self.fetch_all(query).await?;
            Ok(if rows.is_empty() { None } else { Some(rows.swap_remove(0)) })
        })
    }

    fn prepare_with<'e>(self, sql: SqlStr, parameters: &'e [PgTypeInfo]) -> BoxFuture<'e, Result<PgStatement, sqlx::Error>>
    where
        'c: 'e,
    {
        Box::pin(async move { self.primary().pool.prepare_with(sql, parameters).await })
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, Result<sqlx::Describe<Postgres>, sqlx::Error>>
    where
        'c: 'e,
    {
        Box::pin(async move { self.primary().pool.describe(sql).await })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn hosts_may_be_names_and_addresses_of_both_kinds() {
        let database = Database::connect_lazily("postgres://u@[::1]:5433,127.0.0.1:5434,db.example/db", 1).expect("it is an address");
        let hosts: Vec<_> = database.hosts.iter().map(|host| (host.get_host(), host.get_port())).collect();
        assert_eq!(hosts, [("::1", 5433), ("127.0.0.1", 5434), ("db.example", 5432)]);
    }
}
