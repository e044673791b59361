//! The number of unfinished requests, and its limit.

use futures_util::future::join_all;
use shared::store::accept::{NewRequest, Rejection};
use shared::store::sign_finish::SignEnding;

use crate::fixture::{Fixture, LEASE, id, keyed};

#[tokio::test]
async fn no_more_than_the_most_unfinished_requests_are_accepted_and_a_place_is_free_when_one_is_finished() {
    let f = Fixture::new().await;
    let post = async |request: NewRequest| f.store.accept(&[request], 3).await.unwrap().remove(0);
    f.signed("signed").await;
    let group = [f.request("a"), keyed(f.request("b"), "k"), f.request("b"), f.request("c"), f.request("signed")];
    let accepted = f.store.accept(&group, 3).await.unwrap();
    let full: Vec<bool> = accepted.iter().map(|accepted| *accepted == Err(Rejection::Full)).collect();
    assert_eq!(full, [false, false, false, true, false], "what is signed already needs no place");
    assert_eq!(f.store.pending_requests().await.unwrap(), 3);
    assert_eq!(post(f.request("a")).await, Err(Rejection::Full), "another request for a message that waits is a request all the same");
    assert_eq!(id(&post(keyed(f.request("b"), "k")).await), id(&accepted[1]), "and one that is there already is none");
    assert_eq!(f.number("select count(*) from messages where body = 'c'").await, 0, "a refused one leaves nothing");

    let (b, a): (Vec<_>, Vec<_>) = f.claim(2).await.into_iter().partition(|job| job.message.text() == "b");
    for job in a {
        f.finish(job, SignEnding::Retry(LEASE)).await;
    }
    assert_eq!(post(f.request("d")).await, Err(Rejection::Full), "a retry is not finished");
    for job in b {
        f.finish(job, SignEnding::Signed("s".to_owned())).await;
    }
    assert_eq!(f.store.pending_requests().await.unwrap(), 1, "both that waited for it are finished");
    assert!(post(f.request("d")).await.is_ok());
    assert!(post(f.request("e")).await.is_ok());
    assert_eq!(post(f.request("f")).await, Err(Rejection::Full));
}

#[tokio::test]
async fn the_count_of_unfinished_requests_is_right_after_anything_at_once() {
    let f = Fixture::new().await;
    f.agree("1000/60s").await;
    let posts = (0..40).map(|n| {
        let f = &f;
        async move {
            let message = format!("m{}", n % 13);
            f.accept(f.request(&message)).await;
            for job in f.claim(2).await {
                let ending = match n % 4 {
                    0 => SignEnding::Retry(std::time::Duration::ZERO),
                    1 => SignEnding::Failed(shared::store::sign_finish::Failure::Refused),
                    2 => SignEnding::Released,
                    _ => SignEnding::Signed("s".to_owned()),
                };
                f.finish(job, ending).await;
            }
            // Rejected if another message has the key.
            let _ = f.try_accept(keyed(f.request(&message), &format!("k{}", n % 5))).await;
        }
    });
    futures_util::future::join_all(posts).await;
    let counted = "select count(*) from requests r join jobs j on j.id = r.sign_job_id where j.state = 'pending'";
    assert_eq!(i64::try_from(f.store.pending_requests().await.unwrap()).unwrap(), f.number(counted).await);
    assert_eq!(f.strays().await, 0);
}

#[tokio::test]
async fn a_session_that_holds_every_row_of_the_count_delays_nobody() {
    use sqlx::Connection;
    let f = Fixture::new().await;
    f.post("m").await;
    let mut connection = f.connection().await;
    let mut holder = connection.begin().await.unwrap();
    sqlx::query("select from pending_changes for update").execute(&mut *holder).await.unwrap();
    for n in 0..20 {
        f.post(&format!("m{n}")).await;
    }
    holder.rollback().await.unwrap();
    assert_eq!(f.store.pending_requests().await.unwrap(), 21);
}

#[tokio::test]
async fn many_changes_of_the_count_become_one_and_two_who_do_it_at_once_lose_none() {
    let f = Fixture::new().await;
    f.run("insert into pending_changes (requests) select 1 from generate_series(1, 3000)").await;
    let sums = join_all((0..4).map(|_| f.store.pending_requests())).await;
    assert!(sums.into_iter().all(|sum| sum.unwrap() == 3000));
    assert!(f.number("select count(*) from pending_changes").await <= 4);
    assert_eq!(f.store.pending_requests().await.unwrap(), 3000);
}
