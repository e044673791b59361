//! Migrations, and whether they have run.

use std::sync::LazyLock;

use sqlx::migrate::{MigrateError, Migrator};

use super::database::Pooling;
use super::{Result, Store, StoreError};

/// A newer schema is no error: migrations only go forward, and most let old processes run on. CHANGELOG.md says which do not.
static MIGRATOR: LazyLock<Migrator> = LazyLock::new(|| {
    let mut migrator = sqlx::migrate!("../migrations");
    migrator.set_ignore_missing(true);
    // The library's lock belongs to a session, which a proxy may not keep; ours belongs to the transaction.
    migrator.set_locking(false);
    migrator
});

/// Serialises the processes that migrate at once; any number that nobody else takes.
const LOCK: i64 = 0x636f_756e_7465_7273;

/// Where sessions are shared, the library's named statements would meet those of the process that migrated before, in the same session.
const FORGET_STATEMENTS: &str = r"do $$
    declare statement text;
    begin
        for statement in select name from pg_prepared_statements where name like 'sqlx\_s\_%' loop
            execute format('deallocate %I', statement);
        end loop;
    end $$";

impl Store {
    /// Makes sure that the schema is this program's, which is brought up to date first if `migrate` says so, and that the encryption keys fit.
    ///
    /// # Errors
    /// Those of [`migrate`](Self::migrate), [`check_schema`](Self::check_schema) and [`agree_on_encryption`](Self::agree_on_encryption).
    pub async fn prepare(&self, migrate: bool) -> Result<()> {
        if migrate {
            self.migrate().await?;
        }
        self.check_schema().await?;
        self.agree_on_encryption().await
    }

    /// Brings the schema up to date, in one transaction: all of it, or nothing. Of several processes that call this at once, one works
    /// and the others wait.
    ///
    /// # Errors
    /// [`StoreError::Schema`] if a migration fails or an applied one was edited; or if a statement fails.
    pub async fn migrate(&self) -> Result<()> {
        let shared = self.database.pooling().await? == Pooling::Transaction;
        let mut transaction = self.database.begin().await?;
        // A migration may take as long as it takes, and wait for others as long; the limits of a session are for everything else.
        let no_limits = "set local statement_timeout = 0; set local lock_timeout = 0";
        sqlx::raw_sql(no_limits).execute(transaction.connection()).await?;
        sqlx::query("select pg_advisory_xact_lock($1)").bind(LOCK).execute(&mut transaction).await?;
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

    /// Reaches Postgres and compares the newest applied migration with the newest of this program.
    ///
    /// # Errors
    /// [`StoreError::SchemaBehind`] if this program's migrations have not all been applied; or if a statement fails. A newer schema
    /// is no error: see `MIGRATOR`.
    pub async fn check_schema(&self) -> Result<()> {
        let applied = sqlx::query_scalar::<_, i64>("select version from _sqlx_migrations where success").fetch_all(&self.database).await;
        let applied = applied.map_err(|error| match error {
            // Nothing was ever migrated: there is not even the table of migrations.
            sqlx::Error::Database(refused) if refused.code().as_deref() == Some("42P01") => StoreError::SchemaBehind,
            error => error.into(),
        })?;
        let all = MIGRATOR.iter().all(|wanted| applied.contains(&wanted.version));
        if all { Ok(()) } else { Err(StoreError::SchemaBehind) }
    }
}
