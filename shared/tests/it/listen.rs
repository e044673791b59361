use std::time::Duration;

use shared::message::Message;
use shared::store::sign_finish::Ending;
use shared::store::{Audience, Hint, JobKind};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::fixture::Fixture;

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
    f.finish(job, Ending::Signed("s".to_owned())).await;
    assert_eq!(next(&mut jobs).await, Hint::Jobs(JobKind::Webhook));
    assert_eq!(next(&mut results).await, Hint::Results(vec![Message::new("a".to_owned()).digest().hint()]));
    stop_jobs.cancel();
    stop_results.cancel();
}

#[tokio::test]
async fn a_group_of_requests_is_one_notification() {
    let f = Fixture::new().await;
    let (mut jobs, stop) = listen(&f, Audience::Worker);
    assert_eq!(next(&mut jobs).await, Hint::Everything);
    f.store.accept(&[f.request("a"), f.request("b"), f.request("c")], u64::MAX).await.unwrap();
    f.run("notify countersign_jobs, 'webhook'").await;
    assert_eq!((next(&mut jobs).await, next(&mut jobs).await), (Hint::Jobs(JobKind::Sign), Hint::Jobs(JobKind::Webhook)));
    stop.cancel();
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
