//! Administrative statements, each over its own connection, so that no pool is tied to the runtime of one test.

use std::path::Path;

use anyhow::{Context, Result};
use sqlx::migrate::Migrator;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::Cluster;

impl Cluster {
    /// Creates an empty database.
    ///
    /// # Errors
    /// If it already exists, or the server does not answer.
    pub async fn create_database(&self, name: &str) -> Result<()> {
        self.administer(&format!("create database {}", quoted(name))).await
    }

    /// Creates a database as a copy of another one, which must not have any connections.
    ///
    /// # Errors
    /// If it already exists, or the template is in use.
    pub async fn create_database_from(&self, name: &str, template: &str) -> Result<()> {
        self.administer(&format!("create database {} template {}", quoted(name), quoted(template))).await
    }

    /// Removes a database and ends the connections to it. Does nothing if there is no such database.
    ///
    /// # Errors
    /// If the server does not answer.
    pub async fn drop_database(&self, name: &str) -> Result<()> {
        self.administer(&format!("drop database if exists {} with (force)", quoted(name))).await
    }

    /// Applies the migrations in `folder` to a database.
    ///
    /// # Errors
    /// If a migration can't be read or fails.
    pub async fn migrate(&self, database: &str, folder: &Path) -> Result<()> {
        let migrator = Migrator::new(folder).await.with_context(|| format!("reading {}", folder.display()))?;
        let mut connection = self.connect(database).await?;
        migrator.run(&mut connection).await.context("applying the migrations")?;
        connection.close().await.context("applying the migrations")
    }

    /// Ends every connection to the database, as a network failure or a restart would, and returns how many there were.
    ///
    /// # Errors
    /// If the server does not answer.
    pub async fn terminate_connections(&self, database: &str) -> Result<u64> {
        let mut connection = self.connect("postgres").await?;
        let ended: i64 = sqlx::query_scalar(
            "select count(*) filter (where pg_terminate_backend(pid)) from pg_stat_activity where datname = $1 and pid <> pg_backend_pid()",
        )
        .bind(database)
        .fetch_one(&mut connection)
        .await
        .with_context(|| format!("ending the connections to {database}"))?;
        Ok(ended.unsigned_abs())
    }

    /// Connects to a database as the superuser.
    ///
    /// # Errors
    /// If the server does not answer, or there is no such database.
    pub async fn connect(&self, database: &str) -> Result<PgConnection> {
        PgConnection::connect(&self.url(database)).await.with_context(|| format!("connecting to the database {database}"))
    }

    async fn administer(&self, statement: &str) -> Result<()> {
        let mut connection = self.connect("postgres").await?;
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await.with_context(|| statement.to_owned())?;
        connection.close().await.with_context(|| statement.to_owned())
    }
}

/// Creates a database unless it exists. `url` is that of another database of the server.
pub(super) async fn create_if_missing(url: &str, name: &str) -> Result<()> {
    let mut connection = PgConnection::connect(url).await.context("connecting to Postgres")?;
    if !exists(&mut connection, name).await? {
        let statement = format!("create database {}", quoted(name));
        sqlx::raw_sql(AssertSqlSafe(statement.clone())).execute(&mut connection).await.with_context(|| statement)?;
    }
    Ok(())
}

async fn exists(connection: &mut PgConnection, name: &str) -> Result<bool> {
    sqlx::query_scalar("select exists (select from pg_database where datname = $1)")
        .bind(name)
        .fetch_one(connection)
        .await
        .with_context(|| format!("looking for the database {name}"))
}

/// Quotes a name as an SQL identifier.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_quote_in_a_name_cannot_end_it() {
        assert_eq!(super::quoted("a\"; drop"), "\"a\"\"; drop\"");
    }
}
