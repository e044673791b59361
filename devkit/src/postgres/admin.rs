//! Statements of administration, each over a connection of its own, so that no pool is tied to one test's runtime.

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::Cluster;
use crate::error::{Context, Result};

impl Cluster {
    /// Creates an empty database.
    ///
    /// # Errors
    /// When it exists already, or the server does not answer.
    pub async fn create_database(&self, name: &str) -> Result<()> {
        self.administer(&format!("create database {}", quoted(name))).await
    }

    /// Creates a database as a copy of another one, to which nobody may be connected.
    ///
    /// # Errors
    /// When it exists already, or somebody uses the template.
    pub async fn create_database_from(&self, name: &str, template: &str) -> Result<()> {
        self.administer(&format!("create database {} template {}", quoted(name), quoted(template))).await
    }

    /// Removes a database and ends the connections to it; nothing happens when there is none of that name.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn drop_database(&self, name: &str) -> Result<()> {
        self.administer(&format!("drop database if exists {} with (force)", quoted(name))).await
    }

    /// Is there a database of this name?
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn has_database(&self, name: &str) -> Result<bool> {
        exists(&mut self.connect("postgres").await?, name).await
    }

    /// Ends every connection to the database, as a failing network or a restart would; how many there were.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn terminate_connections(&self, database: &str) -> Result<u64> {
        let mut connection = self.connect("postgres").await?;
        let ended: i64 = sqlx::query_scalar(
            "select count(*) filter (where pg_terminate_backend(pid)) from pg_stat_activity where datname = $1 and pid <> pg_backend_pid()",
        )
        .bind(database)
        .fetch_one(&mut connection)
        .await
        .context(|| format!("ending the connections to {database}"))?;
        Ok(ended.unsigned_abs())
    }

    /// One connection to a database, as the superuser.
    ///
    /// # Errors
    /// When the server does not answer, or there is no such database.
    pub async fn connect(&self, database: &str) -> Result<PgConnection> {
        PgConnection::connect(&self.url(database)).await.context(|| format!("connecting to the database {database}"))
    }

    async fn administer(&self, statement: &str) -> Result<()> {
        let mut connection = self.connect("postgres").await?;
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await.context(|| statement.to_owned())?;
        connection.close().await.context(|| statement.to_owned())
    }
}

/// Creates a database by way of another one, unless it exists.
pub(super) async fn create_if_missing(url: &str, name: &str) -> Result<()> {
    let mut connection = PgConnection::connect(url).await.context(|| "connecting to Postgres")?;
    if !exists(&mut connection, name).await? {
        let statement = format!("create database {}", quoted(name));
        sqlx::raw_sql(AssertSqlSafe(statement.clone())).execute(&mut connection).await.context(|| statement)?;
    }
    Ok(())
}

async fn exists(connection: &mut PgConnection, name: &str) -> Result<bool> {
    sqlx::query_scalar("select exists (select from pg_database where datname = $1)")
        .bind(name)
        .fetch_one(connection)
        .await
        .context(|| format!("looking for the database {name}"))
}

/// A name as SQL wants it.
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
