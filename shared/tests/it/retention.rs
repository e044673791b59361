use std::time::Duration;

use shared::store::sign_finish::{Failure, SignEnding};
use sqlx::Connection;

use crate::fixture::Fixture;
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
    assert_eq!(f.store.delete_ended_requests(DAY, 1).await.unwrap(), 1);
    assert_eq!(f.store.delete_ended_requests(DAY, 10).await.unwrap(), 1);
    assert_eq!(f.store.delete_ended_requests(DAY, 10).await.unwrap(), 0);
    for table in ["requests", "messages", "jobs", "attempts"] {
        assert_eq!(f.number(&format!("select count(*) from {table}")).await, 1, "{table}");
    }
}

#[tokio::test]
async fn what_has_not_ended_stays_however_old_it_is() {
    let f = Fixture::new().await;
    f.post("waits for its signature").await;
    let told = f.accept(f.with_webhook("waits for its webhook")).await.id;
    let job = f.claim(2).await.into_iter().find(|job| job.message.text().ends_with("webhook")).unwrap();
    f.finish(job, SignEnding::Signed("s".to_owned())).await;
    age_everything(&f).await;
    assert_eq!(f.store.delete_ended_requests(DAY, 10).await.unwrap(), 0);

    deliver(&f).await;
    age_everything(&f).await;
    assert_eq!(f.store.delete_ended_requests(DAY, 10).await.unwrap(), 1);
    assert!(f.states(&[told]).await.is_empty());
}

#[tokio::test]
async fn a_signature_that_a_younger_request_uses_stays() {
    let f = Fixture::new().await;
    f.signed("a").await;
    age_everything(&f).await;
    let young = f.post("a").await;
    assert_eq!(f.store.delete_ended_requests(DAY, 10).await.unwrap(), 1);
    assert_eq!(f.state(young).await.signature.as_deref(), Some("signature of a"));
}

#[tokio::test]
async fn a_message_whose_signing_job_is_gone_can_be_posted_and_signed_again() {
    let f = Fixture::new().await;
    let failed = f.accept(f.with_webhook("a")).await.id;
    let job = f.claim(1).await.remove(0);
    f.finish(job, SignEnding::Failed(Failure::DeadlineExceeded)).await;
    f.signed("a").await;
    age_everything(&f).await;
    assert_eq!(f.store.delete_ended_requests(DAY, 10).await.unwrap(), 1, "the failed request's webhook still waits");
    assert_eq!(f.states(&[failed]).await.len(), 1);
    assert_eq!(f.strays().await, 0, "the message stays for the job that failed");
    let again = f.signed("a").await;
    assert_eq!(f.state(again).await.signature.as_deref(), Some("signature of a"));
}

#[tokio::test]
async fn retention_in_small_groups_disturbs_neither_claims_nor_posts_and_leaves_exactly_what_is_young() {
    let f = Fixture::new().await;
    f.agree("1000/60s").await;
    let old: Vec<_> = (0..120).map(|n| f.request(&format!("old {n}"))).collect();
    f.store.accept(&old, u64::MAX).await.unwrap();
    for job in f.claim(200).await {
        f.finish(job, SignEnding::Signed("s".to_owned())).await;
    }
    age_everything(&f).await;
    let forgetting = async {
        let mut groups = Vec::new();
        loop {
            let deleted = f.store.delete_ended_requests(DAY, 16).await.unwrap();
            groups.push(deleted);
            if deleted < 16 {
                return groups;
            }
        }
    };
    let working = async {
        for n in 0..40 {
            // Some are posted again while they are being deleted.
            let message = if n % 2 == 0 { format!("old {n}") } else { format!("young {n}") };
            f.post(&message).await;
            for job in f.claimed(5).await.unwrap().jobs {
                f.finish(job, SignEnding::Signed("s".to_owned())).await;
            }
        }
    };
    let (groups, ()) = tokio::join!(forgetting, working);
    assert!(groups.iter().all(|deleted| *deleted <= 16) && groups.iter().sum::<u32>() == 120, "{groups:?}");
    assert_eq!(f.number("select count(*) from requests").await, 40);
    let unsigned = "select count(*) from requests r join jobs j on j.id = r.sign_job_id join messages m on m.id = j.message_id
        where j.signature is null";
    assert_eq!(f.number(unsigned).await, 0, "each of the young has its signature");
    assert_eq!(f.strays().await, 0, "nothing refers to what is gone");
    assert_eq!(f.store.pending_requests().await.unwrap(), 0);
}

#[tokio::test]
async fn two_that_forget_the_last_requests_of_a_message_at_once_leave_nothing_of_it() {
    let f = Fixture::new().await;
    let first = f.signed("a").await;
    f.post("a").await;
    age_everything(&f).await;

    // Another process, which has deleted the first request and checks the message while the second request still seems to exist.
    let mut other = f.connection().await;
    let mut other = other.begin().await.unwrap();
    let deleted = format!("delete from requests where id = '{first}'; select from messages for update");
    sqlx::raw_sql(sqlx::AssertSqlSafe(deleted)).execute(&mut *other).await.unwrap();
    let store = f.store.clone();
    let forgetting = tokio::spawn(async move { store.delete_ended_requests(DAY, 10).await.unwrap() });
    f.until_somebody_waits_for_a_lock().await;
    let judged = "delete from jobs j where not exists (select from requests r where r.sign_job_id = j.id)";
    assert_eq!(sqlx::raw_sql(judged).execute(&mut *other).await.unwrap().rows_affected(), 0);
    other.commit().await.unwrap();
    assert_eq!(forgetting.await.unwrap(), 1);
    for table in ["requests", "messages", "jobs", "attempts"] {
        assert_eq!(f.number(&format!("select count(*) from {table}")).await, 0, "{table}");
    }
}
