use std::time::Duration;

use shared::store::sign_finish::{Ending, Failure};

use crate::fixture::{Fixture, id};
use crate::webhook::deliver;

const DAY: Duration = Duration::from_hours(24);

async fn age_everything(f: &Fixture) {
    f.run(
        "update requests set created_at = now() - interval '2 days';
        update jobs set created_at = now() - interval '2 days', finished_at = finished_at - interval '2 days'",
    )
    .await;
}

#[tokio::test]
async fn what_ended_long_ago_goes_with_all_that_belongs_to_it() {
    let f = Fixture::new().await;
    f.signed("old").await;
    f.signed("old too").await;
    age_everything(&f).await;
    f.signed("new").await;
    assert_eq!(f.store.forget(DAY, 1).await.unwrap(), 1);
    assert_eq!(f.store.forget(DAY, 10).await.unwrap(), 1);
    assert_eq!(f.store.forget(DAY, 10).await.unwrap(), 0);
    for table in ["requests", "messages", "jobs", "attempts"] {
        assert_eq!(f.number(&format!("select count(*) from {table}")).await, 1, "{table}");
    }
}

#[tokio::test]
async fn what_has_not_ended_stays_however_old_it_is() {
    let f = Fixture::new().await;
    f.post("waits for its signature").await;
    let told = id(&f.accept(f.with_webhook("waits for its webhook")).await);
    let job = f.claim(2).await.into_iter().find(|job| job.message.text().ends_with("webhook")).unwrap();
    f.finish(job, Ending::Signed("s".to_owned())).await;
    age_everything(&f).await;
    assert_eq!(f.store.forget(DAY, 10).await.unwrap(), 0);

    deliver(&f).await;
    age_everything(&f).await;
    assert_eq!(f.store.forget(DAY, 10).await.unwrap(), 1);
    assert!(f.store.requests(&[told]).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_signature_that_a_younger_request_uses_stays() {
    let f = Fixture::new().await;
    f.signed("a").await;
    age_everything(&f).await;
    let young = f.post("a").await;
    assert_eq!(f.store.forget(DAY, 10).await.unwrap(), 1);
    assert_eq!(f.store.requests(&[young]).await.unwrap()[&young].request.signature.as_deref(), Some("signature of a"));
}

#[tokio::test]
async fn a_message_whose_signing_job_is_gone_can_be_posted_and_signed_again() {
    let f = Fixture::new().await;
    let failed = id(&f.accept(f.with_webhook("a")).await);
    let job = f.claim(1).await.remove(0);
    f.finish(job, Ending::Failed(Failure::DeadlineExceeded)).await;
    f.signed("a").await;
    age_everything(&f).await;
    assert_eq!(f.store.forget(DAY, 10).await.unwrap(), 1, "the failed request's webhook still waits");
    assert_eq!(f.store.requests(&[failed]).await.unwrap().len(), 1);
    let again = f.signed("a").await;
    assert_eq!(f.store.requests(&[again]).await.unwrap()[&again].request.signature.as_deref(), Some("signature of a"));
}
