//! Connections: what abandoned calls leave in them, how many there are, and what it means when there is none.

use std::task::Poll;
use std::time::{Duration, Instant};

use devkit::postgres::{Cluster, ClusterOptions, StopMode};
use devkit::relay::Relay;
use devkit::wait::until;
use futures_util::future::join_all;
use shared::store::{StoreError, within};
use shared::telemetry::display_chain;
use sqlx::Connection;
use uuid::Uuid;

use crate::fixture::{Fixture, connect, connect_with};

/// Sooner than Postgres itself ends a session that is idle in a transaction.
const SOON: Duration = Duration::from_secs(3);

const OPEN: &str = "select count(*) from pg_stat_activity where datname = current_database() and state like 'idle in transaction%'";

#[tokio::test]
async fn a_transaction_whose_caller_goes_away_at_any_moment_is_not_left_open() {
    let f = Fixture::new().await;
    let mut cut = 0;
    // Where an answer is ready at once, there is no point at which a caller can go away; so each number of steps is tried more than once.
    for (_, steps) in (0..40).flat_map(|round| (1..=4).map(move |steps| (round, steps))) {
        let mut left = steps;
        let mut replay = Box::pin(f.store.replay(Uuid::now_v7(), None));
        let done = std::future::poll_fn(|context| {
            if left == 0 {
                return Poll::Ready(None);
            }
            left -= 1;
            replay.as_mut().poll(context).map(Some)
        });
        cut += u32::from(done.await.is_none());
        drop(replay);
        let since = Instant::now();
        while f.number(OPEN).await > 0 {
            assert!(since.elapsed() < SOON, "after {steps} steps a session is left in a transaction");
        }
    }
    assert!(cut > 20, "{cut} were cut off");
}

#[tokio::test]
async fn everybody_who_waits_for_a_connection_is_told_why_there_is_none() {
    let f = Fixture::new().await;
    // The server has no certificate.
    let store = connect(&format!("{}?sslmode=verify-full", f.url));
    let asked = join_all((0..8).map(|_| store.upstream())).await;
    for error in asked.into_iter().map(Result::unwrap_err) {
        assert!(error.is_transient() && display_chain(&error).contains("TLS"), "{error:?}");
    }
}

#[tokio::test]
async fn a_postgres_that_refuses_connections_is_not_available_and_refused_no_statement() {
    let f = Fixture::new().await;
    let database = f.url.rsplit('/').next().unwrap().to_owned();
    let (name, admin) = (format!("\"{database}\""), f.url.replace(&database, "postgres"));
    let mut admin = sqlx::PgConnection::connect(&admin).await.unwrap();
    let mut run = async |sql: String| sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut admin).await.unwrap();
    run(format!("alter database {name} with allow_connections false")).await;
    run(format!("select pg_terminate_backend(pid) from pg_stat_activity where datname = '{database}'")).await;
    let request = [f.request("m")];
    // First over terminated connections, then over none.
    for _ in 0..5 {
        let error = f.store.accept_new(&request, u64::MAX).await.unwrap_err();
        assert!(error.is_transient(), "{error:?}");
    }
    run(format!("alter database {name} with allow_connections true")).await;
    f.store.accept_new(&request, u64::MAX).await.unwrap();
}

#[tokio::test]
async fn while_no_commit_ends_a_process_opens_no_more_than_three_times_its_connections_and_then_goes_on() {
    const MOST: u32 = 2;
    let postgres = Cluster::start(ClusterOptions::default()).await.unwrap();
    postgres.create_database("hangs").await.unwrap();
    let mut admin = postgres.connect("postgres").await.unwrap();
    let f = Fixture::in_database(postgres.url("hangs")).await;
    f.store.close().await;
    let store = connect_with(&f.url, MOST);
    // Twice: what the first time leaves behind must not count the second time.
    for round in 0..2 {
        standbys(&mut admin, "nobody").await;
        let (mut most, mut refused, mut n) = (0, 0, 0);
        while refused < 3 {
            n += 1;
            assert!(n < 30, "it opens more and more: {most} connections");
            // A single request would notify in its transaction, and wait for the others that do.
            let request = [f.request(&format!("{round} one {n}")), f.request(&format!("{round} two {n}"))];
            match tokio::time::timeout(Duration::from_secs(2), store.accept_new(&request, u64::MAX)).await {
                Ok(Err(StoreError::Unavailable(_))) => refused += 1,
                Ok(Err(error)) => panic!("{error:?}"),
                // The server has not read the setting yet; or the commit hangs.
                Ok(Ok(_)) | Err(_) => {}
            }
            most = connections(&mut admin, "wait_event = 'SyncRep'").await.max(most);
        }
        assert!((MOST..=3 * MOST).contains(&most), "{most} connections");
        standbys(&mut admin, "").await;
        let request = [f.request(&format!("after {round}"))];
        while store.accept_new(&request, u64::MAX).await.is_err() {}
        until("the connections that hung are closed", async || connections(&mut admin, "true").await <= MOST).await;
    }
}

/// Each time, what is in flight hangs for ever: the host had received it, and sends nothing any more.
#[tokio::test]
async fn however_often_a_host_vanishes_the_one_in_its_place_is_used() {
    let postgres = Cluster::start(ClusterOptions::default()).await.unwrap();
    postgres.create_database("vanishes").await.unwrap();
    let f = Fixture::in_database(postgres.url("vanishes")).await;
    f.store.close().await;
    let relay = Relay::to(postgres.port()).await.unwrap();
    let store = connect_with(&format!("postgres://postgres@127.0.0.1:{}/vanishes", relay.port), 2);
    for n in 0..4 {
        store.accept_new(&[f.request(&format!("{n}"))], u64::MAX).await.unwrap();
        relay.fall_silent();
        postgres.stop(StopMode::Immediate).await.unwrap();
        postgres.start_again().await.unwrap();
        let request = [f.request(&format!("{n} again"))];
        let again = async || within(Duration::from_secs(2), store.accept_new(&request, u64::MAX)).await.is_ok();
        until("a request is stored by the server in its place", again).await;
    }
}

/// Sets which standbys a commit waits for, if it waits at all: that it does is not the server's default here.
async fn standbys(admin: &mut sqlx::PgConnection, names: &str) {
    let settings = [
        "alter system set synchronous_commit = 'off'".to_owned(),
        format!("alter system set synchronous_standby_names = '{names}'"),
        "select pg_reload_conf()".to_owned(),
    ];
    for sql in settings {
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut *admin).await.unwrap();
    }
}

/// How many of the connections to the database `hangs` are such.
async fn connections(admin: &mut sqlx::PgConnection, such: &str) -> u32 {
    let sql = format!("select count(*) from pg_stat_activity where datname = 'hangs' and {such}");
    let count: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(admin).await.unwrap();
    count.try_into().unwrap()
}
