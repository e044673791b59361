use std::collections::HashSet;
use std::time::{Duration, Instant};

use devkit::postgres::{Cluster, ClusterOptions};
use devkit::relay::Relay;
use devkit::wait::not_run;
use shared::message::Message;
use shared::store::deliveries::Replay;
use shared::store::keys::Changed;
use shared::store::sign_finish::SignEnding;
use shared::store::{Audience, Finished, Hint, JobKind};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::fixture::{Fixture, connect, finish};

fn listen(f: &Fixture, audience: Audience) -> (mpsc::UnboundedReceiver<Hint>, CancellationToken) {
    let (tell, heard) = mpsc::unbounded_channel();
    let (store, stop) = (f.store.clone(), CancellationToken::new());
    let until = stop.clone();
    tokio::spawn(async move { store.listen(audience, until, move |hint| drop(tell.send(hint))).await });
    (heard, stop)
}

async fn next(heard: &mut mpsc::UnboundedReceiver<Hint>) -> Hint {
    tokio::time::timeout(Duration::from_secs(20), heard.recv()).await.expect("a hint comes").unwrap()
}

#[tokio::test]
async fn workers_hear_of_jobs_and_callers_of_results() {
    let f = Fixture::new().await;
    let (mut jobs, stop_jobs) = listen(&f, Audience::Worker);
    let (mut results, stop_results) = listen(&f, Audience::Api);
    assert_eq!((next(&mut jobs).await, next(&mut results).await), (Hint::Everything, Hint::Everything));
    f.accept(f.with_webhook("a")).await;
    assert_eq!(next(&mut jobs).await, Hint::Jobs(JobKind::Sign));
    let job = f.claim(1).await.remove(0);
    f.finish(job, SignEnding::Signed("s".to_owned())).await;
    assert_eq!(next(&mut jobs).await, Hint::Jobs(JobKind::Webhook));
    assert_eq!(next(&mut results).await, Hint::Results(vec![Message::new("a".to_owned()).digest().hint()]));
    stop_jobs.cancel();
    stop_results.cancel();
}

#[tokio::test]
async fn a_group_of_requests_is_one_notification_whichever_way_it_is_stored() {
    let f = Fixture::new().await;
    let (mut jobs, stop) = listen(&f, Audience::Worker);
    assert_eq!(next(&mut jobs).await, Hint::Everything);
    let group = |name: &str| ["a", "b", "c"].map(|n| f.request(&format!("{name} {n}")));
    let stored = f.store.accept_new(&group("new"), u64::MAX).await.unwrap();
    assert!(stored.iter().all(Option::is_some));
    for way in ["short", "long"] {
        assert_eq!(next(&mut jobs).await, Hint::Jobs(JobKind::Sign), "{way}");
        f.run("notify countersign_jobs, 'webhook'").await;
        assert_eq!(next(&mut jobs).await, Hint::Jobs(JobKind::Webhook), "{way}: one, and no other");
        if way == "short" {
            f.store.accept(&group("any"), u64::MAX).await.unwrap();
        }
    }
    stop.cancel();
}

#[tokio::test]
async fn groups_that_follow_one_another_closely_are_told_of_together() {
    let f = Fixture::new().await;
    let (mut jobs, stop) = listen(&f, Audience::Worker);
    assert_eq!(next(&mut jobs).await, Hint::Everything);
    let begun = Instant::now();
    // One after the other: in parallel, the first notification would wait for a connection behind all of them.
    for n in 0..100 {
        let group = [f.request(&format!("a {n}")), f.request(&format!("b {n}"))];
        assert!(f.store.accept_new(&group, u64::MAX).await.unwrap().iter().all(Option::is_some));
    }
    f.run("notify countersign_jobs, 'webhook'").await;
    let most = 2 + begun.elapsed().as_millis() / 5;
    let mut told = 0;
    while next(&mut jobs).await == Hint::Jobs(JobKind::Sign) {
        told += 1;
    }
    assert!(told > 0 && told <= most, "{told} notifications, no more than {most} expected");
    stop.cancel();
}

#[tokio::test]
async fn of_groups_that_end_at_once_every_result_is_told() {
    let f = Fixture::new().await;
    f.agree("100/60s").await;
    let requests: Vec<_> = (0..60).map(|n| f.with_webhook(&n.to_string())).collect();
    f.store.accept(&requests, u64::MAX).await.unwrap();
    let (mut jobs, stop_jobs) = listen(&f, Audience::Worker);
    let (mut results, stop_results) = listen(&f, Audience::Api);
    assert_eq!((next(&mut jobs).await, next(&mut results).await), (Hint::Everything, Hint::Everything));
    let mut finishes: Vec<_> = f.claim(60).await.into_iter().map(|job| finish(job, SignEnding::Signed("s".to_owned()))).collect();
    let groups: Vec<Vec<_>> = std::iter::from_fn(|| (!finishes.is_empty()).then(|| finishes.drain(..3).collect())).collect();
    futures_util::future::join_all(groups.iter().map(|group| f.store.finish_sign_jobs(group))).await;

    let mut expected: HashSet<u64> = requests.iter().map(|request| request.message.digest().hint()).collect();
    while !expected.is_empty() {
        let Hint::Results(told) = next(&mut results).await else { panic!("it names them") };
        for hint in told {
            assert!(expected.remove(&hint), "each is told once");
        }
    }
    // The notification of the POSTs may arrive only now.
    while next(&mut jobs).await != Hint::Jobs(JobKind::Webhook) {}
    stop_jobs.cancel();
    stop_results.cancel();
}

#[tokio::test]
async fn a_lost_connection_is_told_because_notifications_were_lost_with_it() {
    let f = Fixture::new().await;
    let (mut jobs, stop) = listen(&f, Audience::Worker);
    assert_eq!(next(&mut jobs).await, Hint::Everything);
    f.run("select pg_terminate_backend(pid) from pg_stat_activity where query ilike 'listen%' and datname = current_database()").await;
    assert_eq!(next(&mut jobs).await, Hint::Everything, "when it is lost");
    assert_eq!(next(&mut jobs).await, Hint::Everything, "when it is there again");
    f.post("a").await;
    assert_eq!(next(&mut jobs).await, Hint::Jobs(JobKind::Sign));
    stop.cancel();
}

#[tokio::test]
async fn a_host_that_vanished_in_the_middle_of_a_notification_silences_nobody() {
    let f = Fixture::new().await;
    f.signed("a").await;
    let (mut jobs, stop) = listen(&f, Audience::Worker);
    let port = devkit::postgres::shared_cluster().await.unwrap().port();
    let relay = Relay::to(port).await.unwrap();
    let store = connect(&f.url.replace(&port.to_string(), &relay.port.to_string()));

    // Like `api`, it does not wait long on a connection that may be dead.
    let accept = async || loop {
        let known = [f.with_webhook("a"), f.with_webhook("a")];
        if let Ok(Ok(_)) = tokio::time::timeout(Duration::from_secs(1), store.accept(&known, u64::MAX)).await {
            return;
        }
    };
    accept().await;
    while next(&mut jobs).await != Hint::Jobs(JobKind::Webhook) {}
    // An array element in the protocol: its length, then its bytes.
    relay.fall_silent_at(b"\0\0\0\x07webhook");
    accept().await;
    accept().await;
    while next(&mut jobs).await != Hint::Jobs(JobKind::Webhook) {}

    relay.fall_silent_at(b"\0\0\0\x07webhook");
    accept().await;
    tokio::time::timeout(Duration::from_secs(10), store.close()).await.expect("it does not wait for the host that vanished");
    stop.cancel();
}

#[tokio::test]
async fn while_postgres_takes_no_notification_nothing_is_lost_and_a_key_can_be_revoked() {
    // A server of its own: the queue of notifications belongs to all of it, and its size is a setting since version 17.
    let version: String =
        sqlx::query_scalar("show server_version_num").fetch_one(&mut Fixture::new().await.connection().await).await.unwrap();
    if version.parse::<u32>().unwrap() < 170_000 {
        return not_run("before Postgres 17 the queue of notifications is full only with 8 GB");
    }
    let settings = vec![("max_notify_queue_pages".to_owned(), "64".to_owned())];
    let postgres = Cluster::start(ClusterOptions { settings, ..ClusterOptions::default() }).await.unwrap();
    postgres.create_database("test").await.unwrap();
    let f = Fixture::in_database(postgres.url("test")).await;
    f.agree("10/60s").await;
    // A session that listens, and reads nothing because it stays in its transaction.
    let mut deaf = f.connection().await;
    for step in ["listen anything", "begin", "select 1"] {
        sqlx::raw_sql(step).execute(&mut deaf).await.unwrap();
    }
    let mut teller = f.connection().await;
    let mut told = Ok(sqlx::postgres::PgQueryResult::default());
    for _ in 0..100 {
        let fill = "select pg_notify('anything', repeat('x', 7000) || n) from generate_series(1, 20) n";
        told = sqlx::raw_sql(fill).execute(&mut teller).await;
        if told.is_err() {
            break;
        }
    }
    let full = told.expect_err("the queue is full");
    assert_eq!(full.as_database_error().unwrap().code().as_deref(), Some("54000"));

    let id = f.accept(f.with_webhook("a")).await.id;
    let job = f.claim(1).await.remove(0);
    assert_eq!(f.finish(job, SignEnding::Signed("s".to_owned())).await, Finished::Written);
    f.run("update jobs set state = 'failed', failure = 'exhausted', finished_at = now() where kind = 'webhook'").await;
    assert_eq!(f.store.replay(id, None).await.unwrap(), Replay::Sending);
    assert_eq!(f.store.revoke_key("test").await.unwrap(), Changed::Done);
    assert_eq!(f.number("select count(*) from api_keys where revoked_at is not null").await, 1);
}
