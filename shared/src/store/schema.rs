//! Migrations, and whether they have run.

use sqlx::migrate::{Migrate, Migrator};

use super::{Result, Store, StoreError};

static MIGRATOR: Migrator = sqlx::migrate!("../migrations");

impl Store {
    /// Brings the schema up to date. Several processes may call this at once: sqlx holds an advisory lock meanwhile.
    ///
    /// # Errors
    /// [`StoreError::Schema`] if a migration fails or an applied one was edited; otherwise those of a statement.
    pub async fn migrate(&self) -> Result<()> {
        MIGRATOR.run(&self.pool).await.map_err(|error| match error {
            sqlx::migrate::MigrateError::Execute(error) => error.into(),
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
            sqlx::migrate::MigrateError::Execute(error) => error.into(),
            other => StoreError::Schema(other),
        })?;
        let all = MIGRATOR.iter().all(|wanted| applied.iter().any(|done| done.version == wanted.version));
        if all { Ok(()) } else { Err(StoreError::SchemaBehind) }
    }
}
