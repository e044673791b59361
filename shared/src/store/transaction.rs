//! A transaction of several statements, over either kind of connection. [`Database::begin`](super::database::Database::begin) makes one.

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use sqlx::postgres::{PgQueryResult, PgRow, PgStatement, PgTypeInfo};
use sqlx::{Either, Execute, Executor, PgConnection, Postgres, SqlStr};

use super::session::Pooling;

/// A transaction of several statements. Dropped without a commit, it is rolled back.
#[derive(Debug)]
pub(super) struct Transaction {
    pub(super) inner: sqlx::Transaction<'static, Postgres>,
    pub(super) pooling: Pooling,
}

impl Transaction {
    /// Commits it.
    pub(super) async fn commit(self) -> Result<(), sqlx::Error> {
        self.inner.commit().await
    }

    /// Rolls it back.
    pub(super) async fn rollback(self) -> Result<(), sqlx::Error> {
        self.inner.rollback().await
    }

    /// The connection, for code that runs its own statements.
    pub(super) fn connection(&mut self) -> &mut PgConnection {
        &mut self.inner
    }
}

/// A statement that is prepared with a name only where sessions are kept.
struct UnnamedIfPooled<E> {
    statement: E,
    pooling: Pooling,
}

impl<'q, E: Execute<'q, Postgres>> Execute<'q, Postgres> for UnnamedIfPooled<E> {
    fn sql(self) -> SqlStr {
        self.statement.sql()
    }

    fn statement(&self) -> Option<&PgStatement> {
        self.statement.statement()
    }

    fn take_arguments(&mut self) -> Result<Option<sqlx::postgres::PgArguments>, sqlx::error::BoxDynError> {
        self.statement.take_arguments()
    }

    fn persistent(&self) -> bool {
        self.pooling == Pooling::Session && self.statement.persistent()
    }
}

/// What a statement yields: the end of it, or a row.
pub(super) type Step = Either<PgQueryResult, PgRow>;

impl<'c> Executor<'c> for &'c mut Transaction {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Step, sqlx::Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let pooling = self.pooling;
        (&mut *self.inner).fetch_many(UnnamedIfPooled { statement: query, pooling })
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<PgRow>, sqlx::Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let pooling = self.pooling;
        (&mut *self.inner).fetch_optional(UnnamedIfPooled { statement: query, pooling })
    }

    fn prepare_with<'e>(self, sql: SqlStr, parameters: &'e [PgTypeInfo]) -> BoxFuture<'e, Result<PgStatement, sqlx::Error>>
    where
        'c: 'e,
    {
        (&mut *self.inner).prepare_with(sql, parameters)
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, Result<sqlx::Describe<Postgres>, sqlx::Error>>
    where
        'c: 'e,
    {
        (&mut *self.inner).describe(sql)
    }
}
