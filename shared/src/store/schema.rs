//! Migrations, and whether they have run.

use std::sync::LazyLock;

use sqlx::migrate::{Migrate, MigrateError, Migrator};

use super::{Result, Store, StoreError};

/// A newer schema is fine: migrations only go forward, and old processes run on while new ones start.
static MIGRATOR: LazyLock<Migrator> = LazyLock::new(|| {
    let mut migrator = sqlx::migrate!("../migrations");
    migrator.set_ignore_missing(true);
    migrator
});

impl Store {
    /// Brings the schema up to date. Several processes may call this at once: sqlx holds an advisory lock meanwhile.
    ///
    /// # Errors
    /// [`StoreError::Schema`] if a migration fails or an applied one was edited; otherwise those of a statement.
    pub async fn migrate(&self) -> Result<()> {
        let mut connection = self.pool.acquire().await?;
        // A migration may take as long as it takes, and wait for others as long; the limits of a session are for everything else.
        sqlx::query("select set_config('statement_timeout', '0', false), set_config('lock_timeout', '0', false)")
            .execute(&mut *connection)
            .await?;
        let migrated = MIGRATOR.run(&mut *connection).await;
        connection.close().await?;
        migrated.map_err(|error| match error {
            MigrateError::Execute(error) => error.into(),
            other => StoreError::Schema(other),
        })
    }

    /// Reaches Postgres and compares the newest applied migration with the newest of this program.
    ///
    /// # Errors
    /// [`StoreError::SchemaBehind`] if this program's migrations have not all been applied; otherwise those of a statement. A newer schema
    /// is fine: migrations only go forward, and old processes run on while new ones start.
    pub async fn check_schema(&self) -> Result<()> {
        let mut connection = self.pool.acquire().await?;
        let applied = connection.list_applied_migrations(&MIGRATOR.table_name).await.map_err(|error| match error {
            // Nothing was ever migrated: there is not even the table of migrations.
            MigrateError::Execute(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42P01") => StoreError::SchemaBehind,
            MigrateError::Execute(error) => error.into(),
            other => StoreError::Schema(other),
        })?;
        let all = MIGRATOR.iter().all(|wanted| applied.iter().any(|done| done.version == wanted.version));
        if all { Ok(()) } else { Err(StoreError::SchemaBehind) }
    }
}
