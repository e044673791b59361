//! Postgres as in production: behind a proxy that pools transactions, and with a standby that takes over.

use devkit::postgres::{Bouncer, Cluster, ClusterOptions, StopMode};
use devkit::relay::Relay;
use devkit::upstream::{FaultKind, When};
use serde_json::json;
use sqlx::{Connection, PgConnection, Row};

use crate::world::{Env, Options, World, answer, env, until};

#[tokio::test]
async fn through_a_proxy_that_pools_transactions_all_works_by_polling_alone() {
    if Bouncer::program().is_none() {
        devkit::wait::not_run("pgbouncer is not installed; install the package `pgbouncer` to run this test");
        return;
    }
    // What the server sets for all sessions must not count here either.
    let serializable = vec![("default_transaction_isolation".into(), "serializable".into())];
    let postgres = Cluster::start(ClusterOptions { settings: serializable, ..ClusterOptions::default() }).await.unwrap();
    let proxy = Bouncer::start(postgres.port()).await.unwrap();
    let worker = env(&[("POLL_INTERVAL", "100ms")]);
    let options = Options { address: Some(proxy.url("{}")), worker, rate: "20/1s", ..Options::default() };
    let mut world = World::over(Some(postgres), options).await;

    // Answered at once, although no notification can arrive.
    let answered = world.sign("at once").await;
    assert_eq!(answered.status, 200, "{answered:?}\n{}\n{}", world.api.log(), world.worker.log());
    // More requests at a time than there are sessions; a second worker; and a restart of the api.
    let ids = world.post_all((0..40).map(|n| format!("proxied {n}"))).await;
    let another = world.another_worker(&Env::new()).await;
    let replaced = std::mem::replace(&mut world.worker, another);
    world.restart_api().await;
    world.all_signed_and_delivered(&ids).await;
    assert!(world.upstream.audit().max_in_window <= 20);

    for log in [world.api.log(), world.worker.log(), replaced.log()] {
        assert_eq!(log.matches("polling alone").count(), 1, "said once:\n{log}");
        assert!(!log.contains("ERROR") && !log.contains("serialize"), "{log}");
    }
}

#[tokio::test]
async fn a_failover_to_a_standby_loses_nothing_that_was_acknowledged() {
    let primary = Cluster::start(ClusterOptions::default()).await.unwrap();
    let standby = Cluster::start(ClusterOptions { standby_of: Some(primary.port()), ..ClusterOptions::default() }).await.unwrap();
    let admin = primary.url("postgres");
    let mut connection = PgConnection::connect(&admin).await.unwrap();
    for statement in ["alter system set synchronous_standby_names = '*'", "select pg_reload_conf()"] {
        sqlx::query(statement).execute(&mut connection).await.unwrap();
    }
    until("the standby is synchronous", async || {
        let synchronous = "select count(*) from pg_stat_replication where sync_state = 'sync'";
        sqlx::query(synchronous).fetch_one(&mut connection).await.unwrap().get::<i64, _>(0) == 1
    })
    .await;
    drop(connection);

    // The standby is listed first: it must be skipped while it accepts no writes.
    let address = format!("postgres://postgres@127.0.0.1:{},127.0.0.1:{}/{{}}", standby.port(), primary.port());
    let worker = env(&[("UPSTREAM_TIMEOUT", "1s"), ("WEBHOOK_TIMEOUT", "1s")]);
    let options = Options { address: Some(address), worker, rate: "10/1s", ..Options::default() };
    let world = World::over(Some(primary), options).await;
    let mut ids = world.post_all((0..60).map(|n| format!("before {n}"))).await;
    until("some are signed", async || world.upstream.audit().sign_calls >= 15).await;

    world.own_postgres.as_ref().unwrap().stop(StopMode::Immediate).await.unwrap();
    let mut promoted = PgConnection::connect(&standby.url("postgres")).await.unwrap();
    sqlx::query("select pg_promote()").execute(&mut promoted).await.unwrap();

    ids.extend(world.post_all((0..10).map(|n| format!("after {n}"))).await);
    world.all_signed_and_delivered(&ids).await;
    let audit = world.upstream.audit();
    assert!(audit.max_in_window <= 10 && audit.max_in_flight_per_message == 1, "{audit:?}");

    let name = world.database.rsplit('/').next().unwrap();
    let mut connection = PgConnection::connect(&standby.url(name)).await.unwrap();
    let stored: i64 = sqlx::query("select count(*) from requests").fetch_one(&mut connection).await.unwrap().get(0);
    assert_eq!(usize::try_from(stored).unwrap(), ids.len(), "each was accepted once");
}

/// A world whose connections to Postgres go through a relay.
async fn over_a_relay() -> (World, Relay) {
    let postgres = Cluster::start(ClusterOptions::default()).await.unwrap();
    let relay = Relay::to(postgres.port()).await.unwrap();
    let address = format!("postgres://postgres@127.0.0.1:{}/{{}}", relay.port);
    let world = World::over(Some(postgres), Options { address: Some(address), ..Options::default() }).await;
    (world, relay)
}

#[tokio::test]
async fn a_host_that_vanishes_without_a_word_is_left_for_the_one_in_its_place() {
    let (world, relay) = over_a_relay().await;
    assert_eq!(world.sign("before").await.status, 200);
    relay.fall_silent();
    let started = std::time::Instant::now();
    let mut n = 0;
    until("a message is signed again", async || {
        n += 1;
        let asked = std::time::Instant::now();
        let answered = world.sign(&format!("after {n}")).await;
        assert!(asked.elapsed() < std::time::Duration::from_secs(2), "{:?}", asked.elapsed());
        answered.status == 200
    })
    .await;
    // A claim that waits for the host that vanished is given up after 15 seconds.
    assert!(started.elapsed() < std::time::Duration::from_secs(30), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_host_that_vanishes_while_the_queue_is_read_ends_no_forecast_for_good() {
    let (world, relay) = over_a_relay().await;
    world.fault(FaultKind::Hang, When::Always).await;
    // The statement that reads the queue, when it is prepared.
    relay.fall_silent_at(b"-- queue.forecast");
    let mut n = 0;
    until("a receipt has a place behind others", async || {
        n += 1;
        let receipt =
            answer(world.post(&json!({ "message": n.to_string() })).header("Prefer", "respond-async").send().await.unwrap()).await;
        receipt.body["queuePosition"].as_u64() > Some(1)
    })
    .await;
    assert!(n > 2, "the first ones had none");
}
