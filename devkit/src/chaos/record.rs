//! What Postgres saw: which process claimed and wrote which job. Each process has its own role, so a trigger on `jobs` can tell the
//! processes apart, whatever the code under test believes about its leases. A result written by a process that did not hold the lease is
//! detected.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, PgConnection, Row};
use tokio::sync::Mutex;

use super::world::PATIENCE;
use crate::postgres::Cluster;

const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Records claims (a token is set) and results (a token is cleared), in the transaction that makes them.
const RECORD: &str = "
    create table chaos_record (
        job bigint not null, kind job_kind not null, old_token uuid, new_token uuid, state job_state not null, by name not null default session_user
    );
    create index on chaos_record (new_token);
    create function chaos_record() returns trigger language plpgsql as $$
    begin
        if old.lease_token is distinct from new.lease_token or old.state <> new.state then
            insert into chaos_record (job, kind, old_token, new_token, state)
            values (new.id, new.kind, old.lease_token, new.lease_token, new.state);
        end if;
        return null;
    end $$;
    create trigger chaos_record after update on jobs for each row execute function chaos_record();
";

/// Counts the results whose writer is not the process that claimed the job under the token that it had at that time.
const UNFENCED: &str = "
    select count(*) from chaos_record result
    where new_token is null
        and not exists (select from chaos_record claim where claim.new_token = result.old_token and claim.by = result.by)
";

/// The database of a run.
pub(super) struct Database {
    pub(super) cluster: Cluster,
    pub(super) name: &'static str,
    connection: Mutex<Option<PgConnection>>,
}

/// A leased sign job.
#[derive(Clone, Debug)]
pub(super) struct Held {
    /// The lease's token.
    pub(super) token: String,
    /// The digest of the message, in hexadecimal, as in the upstream's audit.
    pub(super) message_digest: String,
}

/// Counts taken from the tables at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tables {
    pub(super) requests: i64,
    pub(super) unfinished: i64,
    pub(super) results: i64,
    pub(super) unfenced: i64,
    /// Attempts without a result: their process was killed, was stopped, or had lost its lease.
    pub(super) open_attempts: i64,
    pub(super) succeeded_without_a_successful_attempt: i64,
}

impl Database {
    /// Creates an empty database in this cluster.
    pub(super) async fn create(cluster: Cluster, name: &'static str) -> Result<Self> {
        cluster.create_database(name).await?;
        Ok(Self { cluster, name, connection: Mutex::default() })
    }

    /// Creates a role for one process, and returns the URL to log in with it.
    pub(super) async fn url_for(&self, role: &str) -> Result<String> {
        // All roles are superusers: whichever process creates the schema, every process can use it.
        self.run(&format!("create role {role} superuser login")).await?;
        Ok(format!("postgres://{role}@127.0.0.1:{}/{}", self.cluster.port(), self.name))
    }

    /// Starts recording. The schema must exist.
    pub(super) async fn record(&self) -> Result<()> {
        self.run(RECORD).await
    }

    /// The sign jobs that the processes of these roles hold now.
    pub(super) async fn leases_of(&self, roles: &[String]) -> Result<Vec<Held>> {
        let sql = format!(
            "select lease_token::text, encode(sha256(body), 'hex') from jobs join messages on messages.id = message_id
            where kind = 'sign' and lease_token in (select new_token from chaos_record where by in ({}))",
            quoted(roles)
        );
        Ok(self.rows(&sql).await?.iter().map(|row| Held { token: row.get(0), message_digest: row.get(1) }).collect())
    }

    /// Returns whether any of these jobs is still held under the same lease.
    pub(super) async fn any_live(&self, held: &[Held]) -> Result<bool> {
        let tokens: Vec<String> = held.iter().map(|held| held.token.clone()).collect();
        Ok(self.number(&format!("select count(*) from jobs where lease_token::text in ({})", quoted(&tokens))).await? > 0)
    }

    /// Waits until none of these jobs is held under the same lease any more, and returns when that was.
    pub(super) async fn when_taken_over(self: Arc<Self>, held: Vec<Held>) -> Result<Instant> {
        let since = Instant::now();
        // Postgres may be down in the meantime.
        while !self.any_live(&held).await.is_ok_and(|live| !live) {
            if since.elapsed() > PATIENCE {
                return Err(anyhow!("after {PATIENCE:?} nobody has taken over what a worker had"));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(Instant::now())
    }

    /// The number of signatures so far.
    pub(super) async fn signatures(&self) -> Result<i64> {
        self.number("select count(*) from jobs where signature is not null").await
    }

    /// The number of jobs that have not ended.
    pub(super) async fn unfinished(&self) -> Result<i64> {
        self.number("select count(*) from jobs where state = 'pending'").await
    }

    pub(super) async fn tables(&self) -> Result<Tables> {
        Ok(Tables {
            requests: self.number("select count(*) from requests").await?,
            unfinished: self.unfinished().await?,
            results: self.number("select count(*) from chaos_record where new_token is null").await?,
            unfenced: self.number(UNFENCED).await?,
            open_attempts: self
                .number("select count(*) from attempts join jobs on id = job_id where kind = 'sign' and outcome is null")
                .await?,
            succeeded_without_a_successful_attempt: self
                .number(
                    "select count(*) from jobs where state = 'succeeded'
                        and (select count(*) from attempts where job_id = id and outcome = 'succeeded') <> 1",
                )
                .await?,
        })
    }

    /// Returns the number that a query yields.
    pub(super) async fn number(&self, sql: &str) -> Result<i64> {
        Ok(self.rows(sql).await?.first().map_or(0, |row| row.get(0)))
    }

    /// Runs a query over the previous connection if it still works, because conditions are polled many times per second.
    async fn rows(&self, sql: &str) -> Result<Vec<PgRow>> {
        let mut kept = self.connection.lock().await;
        // The connection is taken out, so that a query abandoned in the middle does not leave half an answer for the next one.
        if let Some(mut connection) = kept.take()
            && let Ok(rows) = sqlx::query(AssertSqlSafe(sql.to_owned())).fetch_all(&mut connection).await
        {
            *kept = Some(connection);
            return Ok(rows);
        }
        // There is no connection, or it did not survive a fault.
        let mut connection = self.connect().await?;
        let rows = sqlx::query(AssertSqlSafe(sql.to_owned())).fetch_all(&mut connection).await.with_context(|| sql.to_owned())?;
        *kept = Some(connection);
        Ok(rows)
    }

    async fn run(&self, sql: &str) -> Result<()> {
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut self.connect().await?).await.with_context(|| sql.to_owned())?;
        Ok(())
    }

    async fn connect(&self) -> Result<PgConnection> {
        self.cluster.connect(self.name).await
    }
}

/// A list of SQL strings that always has at least one element. The texts are ours (roles and tokens), so they are not escaped.
fn quoted(texts: &[String]) -> String {
    texts.iter().fold("''".to_owned(), |list, text| format!("{list}, '{text}'"))
}

#[cfg(test)]
mod tests {
    use sqlx::Connection;

    use super::*;
    use crate::postgres::ClusterOptions;

    /// The part of the tables that the record uses.
    const TABLES: &str = "
        create type job_kind as enum ('sign', 'webhook');
        create type job_state as enum ('pending', 'succeeded', 'failed');
        create table messages (id bigint primary key, body bytea not null);
        insert into messages values (1, '');
        create table jobs (id bigint primary key, message_id bigint not null default 1, kind job_kind not null default 'sign', state job_state not null default 'pending', lease_token uuid);
        create table requests ();
        create table attempts (job_id bigint, number int, outcome text);
        insert into jobs (id) values (1), (2);
    ";

    #[tokio::test]
    async fn a_result_by_a_process_that_had_not_the_lease_shows() {
        let cluster = Cluster::start(ClusterOptions::default()).await.unwrap();
        let database = Database::create(cluster, "chaos").await.unwrap();
        database.run(TABLES).await.unwrap();
        database.record().await.unwrap();
        let (one, other) = (database.url_for("one").await.unwrap(), database.url_for("other").await.unwrap());
        let run = async |url: &str, sql: &'static str| {
            let mut connection = PgConnection::connect(url).await.unwrap();
            sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
        };
        let unfenced = async || database.tables().await.unwrap().unfenced;
        run(&one, "update jobs set lease_token = gen_random_uuid()").await;
        let held = database.leases_of(&["one".to_owned()]).await.unwrap();
        assert_eq!((held.len(), database.leases_of(&["other".to_owned()]).await.unwrap().len()), (2, 0));
        run(&one, "update jobs set lease_token = null, state = 'succeeded' where id = 1").await;
        assert_eq!((unfenced().await, database.any_live(&held).await.unwrap()), (0, true));
        run(&other, "update jobs set lease_token = null, state = 'succeeded' where id = 2").await;
        assert_eq!((unfenced().await, database.any_live(&held).await.unwrap()), (1, false));
        run(&other, "update jobs set state = 'failed' where id = 1").await;
        assert_eq!(unfenced().await, 2, "a result without any lease");
    }
}
