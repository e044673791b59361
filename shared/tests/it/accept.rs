use std::collections::HashSet;

use futures_util::future::join_all;
use shared::contract::Status;
use shared::store::accept::{NewRequest, Rejection};
use shared::store::sign_finish::{Failure, SignEnding};
use shared::store::{Finished, Store, StoreError};
use sqlx::Connection;
use uuid::Uuid;

use crate::fixture::{Fixture, finish, id, keyed, new_key};

#[tokio::test]
async fn requests_for_one_message_share_one_job_in_a_group_and_across_groups() {
    let f = Fixture::new().await;
    let accepted = f.store.accept(&[f.request("a"), f.request("a"), f.request("b")], u64::MAX).await.unwrap();
    f.post("a").await;
    assert_eq!(accepted.iter().map(id).collect::<HashSet<Uuid>>().len(), 3);
    assert_eq!(f.number("select count(*) from requests").await, 4);
    assert_eq!(f.number("select count(*) from jobs").await, 2);
    assert_eq!(f.number("select count(*) from messages").await, 2);
}

#[tokio::test]
async fn a_message_with_the_digest_of_another_is_not_taken_for_it_and_spoils_no_other() {
    let f = Fixture::new().await;
    f.signed("a").await;
    f.run("update messages set body = 'another one' where body = 'a'").await;
    let group = [f.request("a"), f.request("b")];
    let new = f.store.accept_new(&group, u64::MAX).await.unwrap();
    assert_eq!(new.iter().map(Option::is_some).collect::<Vec<_>>(), [false, true]);
    let known = f.store.accept(&[f.request("a"), f.request("b")], u64::MAX).await.unwrap();
    assert_eq!(known[0], Err(Rejection::Collision));
    assert!(known[1].is_ok());
}

/// Stores a group, also if so many come before it that a lock may not be waited for any longer: on a slow disk, each takes its time.
async fn accept_in_turn(store: &Store, group: &[NewRequest]) -> usize {
    loop {
        match store.accept(group, u64::MAX).await {
            Err(StoreError::Contended(_)) => {}
            accepted => return accepted.unwrap().len(),
        }
    }
}

#[tokio::test]
async fn groups_that_race_for_one_message_make_one_job() {
    let f = Fixture::new().await;
    let posts = (0..20).map(|n| {
        let other = format!("other {n}");
        let group = [f.request("same"), f.request(&other), f.request("same too")];
        let store = f.store.clone();
        async move { accept_in_turn(&store, &group).await }
    });
    join_all(posts).await;
    assert_eq!(f.number("select count(*) from requests").await, 60);
    assert_eq!(f.number("select count(*) from jobs").await, 22);
}

#[tokio::test]
async fn the_short_way_stores_what_is_new_and_leaves_what_is_known_to_the_long_one() {
    let f = Fixture::new().await;
    f.post("known").await;
    f.signed("signed").await;
    let group = [
        f.request("a"),
        f.request("known"),
        f.request("a"),
        keyed(f.with_webhook("b"), "k"),
        keyed(f.request("c"), "k"),
        f.request("signed"),
    ];
    let accepted = f.store.accept_new(&group, u64::MAX).await.unwrap();
    let stored: Vec<bool> = accepted.iter().map(Option::is_some).collect();
    assert_eq!(stored, [true, false, false, true, false, false], "one of each new message, and of each key");
    assert_eq!((accepted[0].as_ref().unwrap().id, accepted[3].as_ref().unwrap().id), (group[0].id, group[3].id));
    assert_eq!(f.number("select count(*) from requests").await, 4);
    assert_eq!(f.number("select count(*) from jobs").await, 4);
    assert_eq!(f.store.pending_requests().await.unwrap(), 3);
    let state = f.state(group[3].id).await;
    assert_eq!((state.client_request_id.as_deref(), state.webhook.is_some()), (Some("k"), true));
    assert_eq!(f.strays().await, 0);
}

#[tokio::test]
async fn a_key_that_was_used_for_something_else_is_told_the_long_way_and_keeps_no_other_from_the_short_one() {
    let f = Fixture::new().await;
    f.accept(keyed(f.request("a"), "k")).await;
    let group = [f.request("new"), keyed(f.request("b"), "k"), keyed(f.request("c"), "another")];
    let accepted = f.store.accept_new(&group, u64::MAX).await.unwrap();
    assert!(matches!(accepted[..], [Some(_), None, Some(_)]));
    let accepted = f.store.accept(&group[1..2], u64::MAX).await.unwrap();
    assert!(matches!(accepted[..], [Err(Rejection::Mismatch)]));
    assert_eq!((f.number("select count(*) from messages").await, f.strays().await), (3, 0));
}

#[tokio::test]
async fn where_there_is_not_room_for_all_the_short_way_stores_nothing() {
    let f = Fixture::new().await;
    f.post("a").await;
    let group = [f.request("b"), f.request("c")];
    assert_eq!(f.store.accept_new(&group, 2).await.unwrap(), [None, None]);
    assert_eq!(f.number("select count(*) from messages").await, 1);
    assert!(f.store.accept_new(&group, 3).await.unwrap().iter().all(Option::is_some));
}

#[tokio::test]
async fn a_group_with_a_message_that_someone_else_is_storing_waits_for_them_and_goes_the_long_way_if_they_commit() {
    let f = Fixture::new().await;
    for (theirs, they_commit) in [("a", false), ("b", true)] {
        let group = [f.request(theirs), f.request(&format!("beside {theirs}"))];
        let mut session = f.connection().await;
        let mut others = session.begin().await.unwrap();
        let insert = "insert into messages (digest, body) values (message_digest($1), $1)";
        sqlx::query(insert).bind(theirs.as_bytes()).execute(&mut *others).await.unwrap();
        let (store, ours) = (f.store.clone(), group.clone());
        let short = tokio::spawn(async move { store.accept_new(&ours, u64::MAX).await });
        f.until_somebody_waits_for_a_lock().await;
        if they_commit {
            others.commit().await.unwrap();
            assert!(matches!(short.await.unwrap(), Err(StoreError::Refused(_))));
            assert_eq!(f.number("select count(*) from messages where body = 'beside b'").await, 0, "nothing of the group");
            assert!(f.store.accept(&group, u64::MAX).await.unwrap().iter().all(Result::is_ok));
        } else {
            others.rollback().await.unwrap();
            assert!(short.await.unwrap().unwrap().iter().all(Option::is_some));
        }
    }
    assert_eq!(f.number("select count(*) from jobs").await, 4);
    assert_eq!(f.strays().await, 0);
}

#[tokio::test]
async fn groups_that_race_the_short_and_the_long_way_make_one_job_per_message() {
    let f = Fixture::new().await;
    let posts = (0..40).map(|n| {
        let group = [f.request(&format!("m{}", n % 7)), f.request(&format!("m{}", (n + 3) % 7)), f.request(&format!("own {n}"))];
        let store = f.store.clone();
        async move {
            if n % 3 == 0 {
                return accept_in_turn(&store, &group).await;
            }
            let new = match store.accept_new(&group, u64::MAX).await {
                Err(error) if error.may_be_of_one_item() => vec![None; group.len()],
                stored => stored.unwrap(),
            };
            let left: Vec<NewRequest> = group.into_iter().zip(&new).filter(|(_, new)| new.is_none()).map(|(request, _)| request).collect();
            new.iter().flatten().count() + accept_in_turn(&store, &left).await
        }
    });
    assert_eq!(join_all(posts).await.into_iter().sum::<usize>(), 120);
    assert_eq!(f.number("select count(*) from requests").await, 120);
    assert_eq!(f.number("select count(*) from jobs").await, 47);
    assert_eq!(f.store.pending_requests().await.unwrap(), 120);
    assert_eq!(f.strays().await, 0);
}

#[tokio::test]
async fn the_same_idempotency_key_with_the_same_payload_is_the_same_request() {
    let f = Fixture::new().await;
    let group = [keyed(f.request("a"), "k"), keyed(f.request("a"), "k")];
    let accepted = f.store.accept(&group, u64::MAX).await.unwrap();
    let again = f.accept(keyed(f.request("a"), "k")).await;
    assert_eq!(id(&accepted[0]), id(&accepted[1]));
    assert_eq!(id(&accepted[0]), again.id);
    assert_eq!(f.number("select count(*) from requests").await, 1);
}

#[tokio::test]
async fn the_same_idempotency_key_with_another_payload_stores_nothing() {
    let f = Fixture::new().await;
    f.accept(keyed(f.request("a"), "k")).await;
    for other in [f.request("b"), f.with_webhook("a")] {
        assert_eq!(f.try_accept(keyed(other, "k")).await, Err(Rejection::Mismatch));
    }
    let group = [keyed(f.request("c"), "l"), keyed(f.request("d"), "l"), f.request("e")];
    let accepted = f.store.accept(&group, u64::MAX).await.unwrap();
    assert_eq!(accepted.iter().filter(|accepted| **accepted == Err(Rejection::Mismatch)).count(), 1);
    for table in ["requests", "messages", "jobs"] {
        assert_eq!(f.number(&format!("select count(*) from {table}")).await, 3, "{table}");
    }
}

#[tokio::test]
async fn an_idempotency_key_belongs_to_an_api_key() {
    let f = Fixture::new().await;
    let other = new_key(&f.store, "other").await;
    let one = f.accept(keyed(f.request("a"), "k")).await;
    let two = f.accept(NewRequest { key: other, ..keyed(f.request("b"), "k") }).await;
    assert_ne!(one.id, two.id);
}

#[tokio::test]
async fn groups_that_race_for_one_idempotency_key_store_one_request_and_no_stray_job() {
    let f = Fixture::new().await;
    let posts = (0..12).map(|n| {
        // Two payloads compete for one key, so the loser's message is not needed.
        let request = keyed(f.request(if n % 2 == 0 { "even" } else { "odd" }), "k");
        let store = f.store.clone();
        async move { store.accept(&[request], u64::MAX).await }
    });
    // A request that loses several races in a row fails, and its caller sees 503; it must not become a second row.
    let stored = join_all(posts).await.into_iter().flatten().flatten().filter(|accepted| *accepted != Err(Rejection::Mismatch));
    assert_eq!(stored.map(|accepted| id(&accepted)).collect::<HashSet<Uuid>>().len(), 1);
    for table in ["requests", "messages", "jobs"] {
        assert_eq!(f.number(&format!("select count(*) from {table}")).await, 1, "{table}");
    }
}

#[tokio::test]
async fn a_signed_message_is_settled_at_once_without_a_job_and_with_its_webhook() {
    let f = Fixture::new().await;
    f.signed("a").await;
    let accepted = f.accept(f.with_webhook("a")).await;
    assert!(accepted.settled);
    let state = f.state(accepted.id).await;
    assert_eq!((state.status, state.signature.as_deref()), (Status::Signed, Some("signature of a")));
    assert_eq!(f.number("select count(*) from jobs where kind = 'sign'").await, 1);
    assert_eq!(f.number("select count(*) from jobs where kind = 'webhook'").await, 1);
}

#[tokio::test]
async fn a_message_that_failed_for_good_is_tried_again_for_a_new_request_and_stays_failed_for_the_old() {
    let f = Fixture::new().await;
    let old = f.post("a").await;
    let job = f.claim(1).await.remove(0);
    f.finish(job, SignEnding::Failed(Failure::Refused)).await;
    f.signed("a").await;
    let state = f.state(old).await;
    assert_eq!((state.status, state.signature.as_deref()), (Status::Failed, None));
    assert_eq!(state.last_error.as_ref().unwrap().code, "upstream-refused");
}

#[tokio::test]
async fn a_request_that_races_with_the_end_of_its_job_is_never_left_without_an_end() {
    let f = Fixture::new().await;
    f.agree("1000/60s").await;
    for round in 0..40 {
        let message = format!("round {round}");
        f.accept(f.with_webhook(&message)).await;
        let job = f.claim(1).await.remove(0);
        let ending = if round % 2 == 0 { SignEnding::Signed("s".to_owned()) } else { SignEnding::Failed(Failure::Refused) };
        let finishes = [finish(job, ending)];
        let posts = (0..4).map(|_| f.accept(f.with_webhook(&message)));
        let (finished, _) = tokio::join!(f.store.finish_sign_jobs(&finishes), join_all(posts));
        finished.unwrap();
    }
    let forgotten = "select count(*) from requests r join jobs s on s.id = r.sign_job_id
        where s.state <> 'pending' and not exists (select from jobs w where w.kind = 'webhook' and w.request_id = r.id)";
    assert_eq!(f.number(forgotten).await, 0);
    let sent_twice = "select count(*) from messages m join jobs j on j.message_id = m.id
        join jobs signed on signed.message_id = m.id where signed.signature is not null and j.state = 'pending'";
    assert_eq!(f.number(sent_twice).await, 0);
    assert_eq!(f.number("select count(*) from requests").await, 200);
}

#[tokio::test]
async fn a_request_that_is_attached_while_the_end_of_its_job_waits_is_ended_too() {
    let f = Fixture::new().await;
    f.accept(f.with_webhook("m")).await;
    let job = f.claim(1).await.remove(0);
    let mut connection = f.connection().await;
    let mut attaching = connection.begin().await.unwrap();
    sqlx::raw_sql("select from jobs for no key update").execute(&mut *attaching).await.unwrap();
    let store = f.store.clone();
    let finished = tokio::spawn(async move { store.finish_sign_jobs(&[finish(job, SignEnding::Signed("s".to_owned()))]).await.unwrap() });
    f.until_somebody_waits_for_a_lock().await;
    let attach = "insert into requests (id, api_key_id, sign_job_id, payload_digest, webhook_url)
            select gen_random_uuid(), api_key_id, sign_job_id, payload_digest, webhook_url from requests;
        update jobs set attached = attached + 1;
        insert into pending_changes (requests) values (1)";
    sqlx::raw_sql(attach).execute(&mut *attaching).await.unwrap();
    attaching.commit().await.unwrap();
    assert_eq!(finished.await.unwrap(), [Finished::Written]);
    assert_eq!(f.number("select count(*) from jobs where kind = 'webhook'").await, 2);
    assert_eq!(f.store.pending_requests().await.unwrap(), 0);
}

#[tokio::test]
async fn a_job_that_says_more_requests_than_there_are_ends_all_the_same() {
    let f = Fixture::new().await;
    f.post("m").await;
    let job = f.claim(1).await.remove(0);
    f.run("update jobs set attached = 7").await;
    assert_eq!(f.finish(job, SignEnding::Signed("s".to_owned())).await, Finished::Written);
}

#[tokio::test]
async fn a_job_counts_the_requests_that_are_attached_to_it_either_way() {
    let f = Fixture::new().await;
    f.post("m").await;
    f.store.accept(&[f.request("m"), f.request("m"), f.request("n"), f.request("n")], u64::MAX).await.unwrap();
    f.store.accept(&[f.request("n")], u64::MAX).await.unwrap();
    let wrong = "select count(*) from jobs j where attached <> (select count(*) from requests r where r.sign_job_id = j.id)";
    assert_eq!((f.number("select count(*) from jobs").await, f.number(wrong).await), (2, 0));
}

#[tokio::test]
async fn no_more_requests_wait_for_one_message_than_one_statement_can_end() {
    let f = Fixture::new().await;
    f.post("m").await;
    f.run("update jobs set attached = 9999").await;
    let group = [f.request("m"), f.request("m"), f.request("n")];
    let accepted = f.store.accept(&group, u64::MAX).await.unwrap();
    let full: Vec<bool> = accepted.iter().map(|accepted| *accepted == Err(Rejection::Full)).collect();
    assert_eq!(full, [false, true, false]);
    let job = f.claim(1).await.remove(0);
    assert_eq!(f.finish(job, SignEnding::Signed("s".to_owned())).await, Finished::Written);
    assert!(f.accept(f.request("m")).await.settled, "who asks later does not wait for it");
}

#[tokio::test]
async fn bytes_that_text_cannot_hold_survive() {
    let f = Fixture::new().await;
    let message = "\0 a\n\u{7f}🦀 é\u{301} ";
    let id = f.post(message).await;
    assert_eq!(f.claim(1).await[0].message.text(), message);
    assert_eq!(f.state(id).await.message, message);
}
