use shared::store::low_water::LowWater;
use shared::store::sign_finish::SignEnding;
use shared::store::upstream::{Agreement, Heartbeat, SEEN_EVERY, WorkerId};

use crate::fixture::{Fixture, LEASE};

const SLOTS: &str = "select count(*) from upstream_slots where not retired";
const FREE: &str = "select count(*) from upstream_slots where not retired and free_at <= now()";

#[tokio::test]
async fn workers_that_start_together_agree_on_one_set_of_slots() {
    let f = Fixture::without_rate().await;
    futures_util::future::join_all((0..6).map(|_| f.agree("10/60s"))).await;
    assert_eq!((f.number(SLOTS).await, f.number(FREE).await), (10, 10));
}

#[tokio::test]
async fn more_slots_are_usable_at_once() {
    let f = Fixture::new().await;
    f.run("update upstream_slots set free_at = now() + interval '60 s'").await;
    f.agree("15/60s").await;
    assert_eq!((f.number(SLOTS).await, f.number(FREE).await), (15, 5));
}

#[tokio::test]
async fn fewer_slots_are_those_that_are_free_last() {
    let f = Fixture::new().await;
    f.run("update upstream_slots set free_at = now() + make_interval(secs => slot * 5)").await;
    f.agree("3/60s").await;
    assert_eq!(f.number(SLOTS).await, 3);
    assert!(f.number("select extract(epoch from min(free_at) - now())::bigint from upstream_slots where not retired").await >= 38);
}

#[tokio::test]
async fn a_rate_that_is_lowered_and_raised_again_forgets_no_call() {
    let f = Fixture::new().await;
    f.run("update upstream_slots set free_at = now() + interval '50 s'").await;
    for rate in ["5/60s", "10/60s", "1/60s", "10/60s"] {
        f.agree(rate).await;
        assert_eq!(f.number(FREE).await, 0, "{rate}");
    }
    assert_eq!(f.number(SLOTS).await, 10);
}

#[tokio::test]
async fn a_longer_window_makes_all_wait_until_what_was_used_is_out_of_it() {
    let f = Fixture::new().await;
    f.run("update upstream_slots set free_at = now() + interval '10 s' where slot <= 4").await;
    f.agree("10/90s").await;
    let wait = f.number("select extract(epoch from min(free_at) - now())::bigint from upstream_slots").await;
    assert!((38..=40).contains(&wait), "10 s were left, and the window is 30 s longer: {wait}");
    f.agree("10/3600s").await;
    let wait = f.number("select extract(epoch from min(free_at) - now())::bigint from upstream_slots").await;
    assert!((3551..=3554).contains(&wait), "3510 s more, and a thousandth of them because clocks drift: {wait}");
    f.agree("10/60s").await;
    assert_eq!(f.number("select extract(epoch from window_length)::bigint from upstream").await, 60);
    let unused = Fixture::new().await;
    unused.agree("15/90s").await;
    assert_eq!(unused.number(FREE).await, 15, "where nothing was used there is nothing to wait for");
}

#[tokio::test]
async fn in_a_longer_window_slots_that_are_added_wait_like_all_others() {
    let f = Fixture::new().await;
    f.run("update upstream_slots set free_at = now() + interval '60 s'").await;
    f.agree("20/120s").await;
    let wait = f.number("select extract(epoch from min(free_at) - now())::bigint from upstream_slots").await;
    assert!((118..=120).contains(&wait), "twenty may have been used in the last 120 s: {wait}");
    assert_eq!(f.number(SLOTS).await, 20);
}

/// Makes all workers look dead: none was heard of for longer than a worker may be silent.
async fn all_seem_dead(f: &Fixture) {
    f.run("update sign_workers set seen_at = now() - interval '11 s'").await;
}

#[tokio::test]
async fn a_worker_with_another_rate_is_refused_while_one_lives_and_welcome_when_none_does() {
    let f = Fixture::new().await;
    let (ten, five) = ("10/60s".parse().unwrap(), "5/60s".parse().unwrap());
    let (first, second, other) = (WorkerId::generate(), WorkerId::generate(), WorkerId::generate());
    assert_eq!(f.store.join_workers(first, ten).await.unwrap(), Agreement::Agreed);
    assert_eq!(f.store.join_workers(second, ten).await.unwrap(), Agreement::Agreed);
    assert_eq!(f.store.join_workers(other, five).await.unwrap(), Agreement::Differs(ten));
    f.store.leave_workers(first).await.unwrap();
    assert_eq!(f.store.join_workers(other, five).await.unwrap(), Agreement::Differs(ten), "the second one lives");
    all_seem_dead(&f).await;
    assert_eq!(f.store.heartbeat(second, ten).await.unwrap().agreement, Agreement::Agreed, "it said so just in time");
    assert_eq!(f.store.join_workers(other, five).await.unwrap(), Agreement::Differs(ten));
    all_seem_dead(&f).await;
    assert_eq!(f.store.join_workers(other, five).await.unwrap(), Agreement::Agreed);
    assert_eq!(f.number(SLOTS).await, 5);
}

#[tokio::test]
async fn a_worker_that_was_seen_in_the_future_is_not_taken_for_alive_after_the_clock_was_set_back() {
    let f = Fixture::new().await;
    let (ten, five) = ("10/60s".parse().unwrap(), "5/60s".parse().unwrap());
    assert_eq!(f.store.join_workers(WorkerId::generate(), ten).await.unwrap(), Agreement::Agreed);
    f.run("update sign_workers set seen_at = now() + interval '1 h'").await;
    assert_eq!(f.store.join_workers(WorkerId::generate(), five).await.unwrap(), Agreement::Agreed);
}

#[tokio::test]
async fn of_workers_that_start_together_with_different_rates_only_those_of_one_rate_take_part() {
    let f = Fixture::new().await;
    let rates = ["10/60s", "5/60s", "10/60s", "5/60s", "7/30s"];
    let joins = rates.map(|rate| f.store.join_workers(WorkerId::generate(), rate.parse().unwrap()));
    let joined: Vec<_> = futures_util::future::join_all(joins).await.into_iter().map(Result::unwrap).collect();
    let agreed: std::collections::HashSet<&str> =
        rates.iter().zip(&joined).filter(|(_, joined)| **joined == Agreement::Agreed).map(|(rate, _)| *rate).collect();
    assert_eq!(agreed.len(), 1, "{joined:?}");
    let slots = f.number(SLOTS).await.to_string();
    assert!(agreed.iter().all(|rate| rate.starts_with(&slots)), "{agreed:?}, {slots} slots");
}

#[tokio::test]
async fn a_worker_that_was_taken_for_dead_claims_nothing_under_its_old_rate() {
    let f = Fixture::new().await;
    f.post("a").await;
    let (ten, twenty) = ("10/60s".parse().unwrap(), "20/60s".parse().unwrap());
    let (slow, quick) = (WorkerId::generate(), WorkerId::generate());
    f.store.join_workers(slow, twenty).await.unwrap();
    all_seem_dead(&f).await;
    assert_eq!(f.store.join_workers(quick, ten).await.unwrap(), Agreement::Agreed);
    assert!(f.store.claim_sign_jobs(1, LEASE, twenty, LowWater::default()).await.unwrap().0.jobs.is_empty());
    assert_eq!(f.store.heartbeat(slow, twenty).await.unwrap().agreement, Agreement::Differs(ten));
    assert_eq!(f.store.claim_sign_jobs(1, LEASE, ten, LowWater::default()).await.unwrap().0.jobs.len(), 1);
}

#[tokio::test]
async fn after_a_failover_no_slot_is_free_by_the_clock_of_the_server_before() {
    let f = Fixture::new().await;
    for n in 0..3 {
        f.post(&format!("m{n}")).await;
    }
    let used = f.claim(2).await;
    f.finish(used.into_iter().next().unwrap(), SignEnding::Retry(LEASE)).await;
    // The clock of the server that has taken over is two minutes ahead.
    f.run(
        "update upstream_slots set free_at = free_at - interval '2 min' where free_at > '-infinity';
        update jobs set leased_at = leased_at - interval '2 min', leased_until = leased_until - interval '2 min',
            next_run_at = next_run_at - interval '2 min'
        where lease_token is not null;
        update upstream set timeline = '00000000'",
    )
    .await;
    assert!(f.claim(10).await.is_empty(), "not before a worker has seen that another server has taken over");
    let (worker, rate) = (WorkerId::generate(), "10/60s".parse().unwrap());
    assert_eq!(f.store.heartbeat(worker, rate).await.unwrap(), Heartbeat { agreement: Agreement::Agreed, taken_over: true });
    let (one, other) = tokio::join!(f.store.take_over(), f.store.take_over());
    assert!(one.unwrap() || other.unwrap());
    assert_eq!(f.store.heartbeat(worker, rate).await.unwrap(), Heartbeat { agreement: Agreement::Agreed, taken_over: false });
    let waits = async |sql| {
        f.number(&format!("select extract(epoch from {sql}(free_at) - now())::bigint from upstream_slots where free_at > '-infinity'"))
            .await
    };
    assert_eq!(waits("min").await, 60, "the one that was used: a window");
    assert_eq!(waits("max").await, 120, "the one that is in use: until its lease is over, too");
    let free = f.claim(10).await;
    assert_eq!(free.len(), 1, "the slots that were never used are free, but nobody calls for a message that may be with the upstream");
    assert_eq!(free[0].message.text(), "m2");
}

#[tokio::test]
async fn after_a_failover_a_slot_in_use_waits_until_its_lease_is_over_even_if_the_rate_changes_in_the_same_moment() {
    let f = Fixture::new().await;
    f.post("m").await;
    assert_eq!(f.claim(1).await.len(), 1);
    f.run(
        "update upstream_slots set free_at = free_at - interval '2 min' where free_at > '-infinity';
        update jobs set leased_at = leased_at - interval '2 min', leased_until = leased_until - interval '2 min',
            next_run_at = next_run_at - interval '2 min';
        update upstream set timeline = '00000000'",
    )
    .await;
    all_seem_dead(&f).await;
    assert_eq!(f.store.join_workers(WorkerId::generate(), "10/1s".parse().unwrap()).await.unwrap(), Agreement::Agreed);
    let waits = f.number("select extract(epoch from max(free_at) - now())::bigint from upstream_slots").await;
    assert!(waits >= i64::try_from(LEASE.as_secs()).unwrap(), "{waits} s");
}

#[tokio::test]
async fn a_failover_with_thousands_of_slots_and_jobs_is_seen_through_in_a_moment() {
    let f = Fixture::without_rate().await;
    f.agree("3000/60s").await;
    f.run(
        "with new as (insert into messages (digest, body) select message_digest(n::text::bytea), n::text::bytea from generate_series(1, 20000) n returning id)
        insert into jobs (kind, message_id) select 'sign', id from new",
    )
    .await;
    let held = f.claim(100).await;
    f.run("update upstream_slots set free_at = now() where free_at = '-infinity'; update upstream set timeline = '00000000'").await;
    assert!(tokio::time::timeout(SEEN_EVERY, f.store.take_over()).await.expect("in time").unwrap());
    let waiting = "select count(*) from upstream_slots where free_at > now() + interval '55 s'";
    assert_eq!((f.number(waiting).await, held.len()), (3000, 100));
}
