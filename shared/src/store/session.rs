//! A session of Postgres: its settings, how long a connection keeps it, and which server it is on.
//!
//! A proxy that pools transactions, such as PgBouncer, gives each transaction another session, so no session state survives: no setting, no
//! prepared statement, no LISTEN. It is recognized by what it does with the session settings that a connection asks for: it refuses them or
//! forgets them. Then every statement runs in a transaction that brings its settings along, and is prepared without a name (see
//! `database`).

use std::sync::LazyLock;

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgConnection, Row};

/// The settings of every session, whatever the defaults of the server, the database and the role are. A process that hangs in a transaction
/// must not hold its row locks for long, and nobody may wait for them for long. An acknowledged commit is durable. A statement that waited
/// for a row sees what became of it; at a stricter level it would fail instead. Plans are made once, and by indexes: statements are
/// prepared while the tables may still be empty, when sequential scans look cheap, and joins are written so that an index lookup is the
/// only possible plan. Planning on each execution would take longer than most statements run, and JIT compilation longer still.
const SESSION: [(&str, &str); 10] = [
    ("lock_timeout", "500ms"),
    ("statement_timeout", "10s"),
    ("idle_in_transaction_session_timeout", "5s"),
    ("synchronous_commit", "on"),
    ("default_transaction_isolation", "read committed"),
    ("standard_conforming_strings", "on"),
    ("enable_seqscan", "off"),
    ("enable_mergejoin", "off"),
    ("jit", "off"),
    ("plan_cache_mode", "force_generic_plan"),
];

/// The same settings for one transaction, where statements have no names and so no generic plans.
pub(super) static BEGIN_WITH_SETTINGS: LazyLock<String> = LazyLock::new(|| {
    let settings = SESSION.iter().filter(|(name, _)| !["plan_cache_mode", "default_transaction_isolation"].contains(name));
    settings
        .fold("begin isolation level read committed".to_owned(), |begin, (name, value)| format!("{begin}; set local {name} = '{value}'"))
});

/// A setting that only this program uses. A connection that still has it after connecting has a session of its own.
const MARK: &str = "countersign.session";

/// How long a connection keeps its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pooling {
    /// One Postgres session for as long as the connection is open.
    Session,
    /// A session for one transaction, and another one for the next.
    Transaction,
}

/// When a server was started, by which it is told from one that took its place under the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Server(String);

/// Connects to `host` once. Returns how long its connections keep their session, how to make them, and which server they reach, or an error
/// if it does not accept writes.
pub(super) async fn probe(host: &PgConnectOptions) -> Result<(Pooling, PgConnectOptions, Option<Server>), sqlx::Error> {
    let kept = host.clone().options(SESSION).options([(MARK, "kept")]);
    // Named statements would outlive the transaction, in a session that belongs to another client by then.
    let shared = host.clone().extra_float_digits(None).statement_cache_capacity(0);
    let (mut connection, options) = match kept.connect().await {
        Ok(connection) => (connection, kept),
        // PgBouncer answers "unsupported startup parameter".
        Err(sqlx::Error::Database(refused)) if refused.code().as_deref() == Some("08P01") => (shared.connect().await?, shared.clone()),
        Err(error) => return Err(error),
    };
    takes_writes(&mut connection).await?;
    let about = "select current_setting('countersign.session', true), pg_postmaster_start_time()::text";
    let row = sqlx::raw_sql(about).fetch_one(&mut connection).await?;
    let pooling = if row.try_get::<Option<&str>, _>(0)? == Some("kept") { Pooling::Session } else { Pooling::Transaction };
    let server = Some(Server(row.try_get(1)?));
    let _ = connection.close().await;
    Ok((pooling, if pooling == Pooling::Session { options } else { shared }, server))
}

/// Returns an error if the server behind this connection is a standby.
pub(super) async fn takes_writes(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let row = sqlx::raw_sql("select pg_is_in_recovery()").fetch_one(connection).await?;
    if row.try_get(0)? { Err(unavailable("this server is a standby")) } else { Ok(()) }
}

/// Why there is no connection, as an error of connecting.
pub(super) fn unavailable(why: impl Into<String>) -> sqlx::Error {
    sqlx::Error::Configuration(why.into().into())
}
