//! Migrations, and whether they have been applied.

use std::sync::LazyLock;
use std::time::Duration;

use sqlx::migrate::{MigrateError, Migrator};

use super::session::Pooling;
use super::transaction::Transaction;
use super::{Result, Store, StoreError, TRY_AGAIN_AFTER, within};
use crate::telemetry::display_chain;

/// A newer schema is not an error: migrations only go forward, and most let old processes keep running. CHANGELOG.md lists those that do
/// not.
static MIGRATOR: LazyLock<Migrator> = LazyLock::new(|| {
    let mut migrator = sqlx::migrate!("../migrations");
    migrator.set_ignore_missing(true);
    // sqlx's own lock belongs to a session, which a proxy may not keep; ours belongs to the transaction.
    migrator.set_locking(false);
    migrator
});

/// The advisory lock that serializes concurrent migrations; any number that nothing else uses.
const LOCK: i64 = 0x636f_756e_7465_7273;

/// The longest that each step may take before a process serves, except a migration. After that, the connection is taken for dead.
pub const PREPARE_WITHIN: Duration = Duration::from_secs(10);

/// Where sessions are shared, sqlx's named statements would collide with those of a process that migrated before, in the same session.
const FORGET_STATEMENTS: &str = r"do $$
    declare statement text;
    begin
        for statement in select name from pg_prepared_statements where name like 'sqlx\_s\_%' loop
            execute format('deallocate %I', statement);
        end loop;
    end $$";

impl Store {
    /// Checks that the schema and the encryption keys fit this program. If `migrate` is set, brings the schema up to date first.
    ///
    /// # Errors
    /// [`StoreError::Encoding`], and those of [`migrate`](Self::migrate), [`check_schema`](Self::check_schema) and [`agree_on_encryption`](Self::agree_on_encryption).
    pub async fn prepare(&self, migrate: bool) -> Result<()> {
        if migrate {
            self.migrate().await?;
        } else {
            within(PREPARE_WITHIN, self.check_encoding()).await?;
        }
        within(PREPARE_WITHIN, self.check_schema()).await?;
        within(PREPARE_WITHIN, self.agree_on_encryption()).await
    }

    /// Brings the schema up to date in one transaction, all or nothing. If several processes call this at once, one works and the others
    /// wait.
    ///
    /// # Errors
    /// [`StoreError::Encoding`] if the database is not in UTF-8; [`StoreError::Schema`] if an applied migration was edited; another error if
    /// a migration or another statement fails.
    pub async fn migrate(&self) -> Result<()> {
        within(PREPARE_WITHIN, self.check_encoding()).await?;
        let mut waiting = false;
        loop {
            // Whoever waits for another process asks again and again: it would not notice the end of a host while it waits for a lock.
            if let Some(transaction) = within(PREPARE_WITHIN, Box::pin(self.begin_migrating())).await? {
                match Box::pin(self.run_migrations(transaction)).await {
                    Err(error @ StoreError::Contended(_)) => {
                        if !waiting {
                            tracing::warn!(error = display_chain(&error), "a migration waits for a table that another session holds");
                        }
                        waiting = true;
                    }
                    ended => return ended,
                }
            }
            tokio::time::sleep(TRY_AGAIN_AFTER).await;
        }
    }

    async fn check_encoding(&self) -> Result<()> {
        let encoding: String = sqlx::query_scalar("show server_encoding").fetch_one(&self.database).await?;
        if encoding == "UTF8" { Ok(()) } else { Err(StoreError::Encoding(encoding)) }
    }

    /// A transaction with the right to migrate, until its end. `None` while another process has it.
    async fn begin_migrating(&self) -> Result<Option<Transaction>> {
        let mut transaction = self.database.begin().await?;
        let alone: bool = sqlx::query_scalar("select pg_try_advisory_xact_lock($1)").bind(LOCK).fetch_one(&mut transaction).await?;
        Ok(alone.then_some(transaction))
    }

    async fn run_migrations(&self, mut transaction: Transaction) -> Result<()> {
        let shared = self.database.pooling().await? == Pooling::Transaction;
        // A migration may run for as long as it needs. But while it waits for a table, such as one that is being backed up, everybody else
        // waits behind it. So it lets them through, and begins again.
        let limits = "set local statement_timeout = 0; set local lock_timeout = '300ms'";
        sqlx::raw_sql(limits).execute(transaction.connection()).await?;
        if shared {
            sqlx::raw_sql(FORGET_STATEMENTS).execute(transaction.connection()).await?;
        }
        MIGRATOR.run(transaction.connection()).await.map_err(|error| match error {
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => error.into(),
            other => StoreError::Schema(other),
        })?;
        if shared {
            sqlx::raw_sql(FORGET_STATEMENTS).execute(transaction.connection()).await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Connects to Postgres and checks that all migrations of this program have been applied.
    ///
    /// # Errors
    /// [`StoreError::SchemaBehind`] if they have not; another error if a statement fails. A newer schema is not an error: see `MIGRATOR`.
    pub async fn check_schema(&self) -> Result<()> {
        let applied = sqlx::query_scalar::<_, i64>("select version from _sqlx_migrations where success").fetch_all(&self.database).await;
        let applied = applied.map_err(|error| match error {
            // Nothing was ever migrated: even the table of migrations is missing.
            sqlx::Error::Database(refused) if refused.code().as_deref() == Some("42P01") => StoreError::SchemaBehind,
            error => error.into(),
        })?;
        let all = MIGRATOR.iter().all(|wanted| applied.contains(&wanted.version));
        if all { Ok(()) } else { Err(StoreError::SchemaBehind) }
    }
}
