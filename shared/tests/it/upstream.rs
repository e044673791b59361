use crate::fixture::Fixture;

const SLOTS: &str = "select count(*) from upstream_slots where not retired";
const FREE: &str = "select count(*) from upstream_slots where not retired and free_at <= now()";

async fn agree(f: &Fixture, rate: &str) {
    f.store.agree_on_rate(rate.parse().unwrap()).await.unwrap();
}

#[tokio::test]
async fn workers_that_start_together_agree_on_one_set_of_slots() {
    let f = Fixture::without_rate().await;
    futures_util::future::join_all((0..6).map(|_| agree(&f, "10/60s"))).await;
    assert_eq!((f.number(SLOTS).await, f.number(FREE).await), (10, 10));
}

#[tokio::test]
async fn more_slots_are_usable_at_once() {
    let f = Fixture::new().await;
    f.run("update upstream_slots set free_at = now() + interval '60 s'").await;
    agree(&f, "15/60s").await;
    assert_eq!((f.number(SLOTS).await, f.number(FREE).await), (15, 5));
}

#[tokio::test]
async fn fewer_slots_are_those_that_are_free_last() {
    let f = Fixture::new().await;
    f.run("update upstream_slots set free_at = now() + make_interval(secs => slot * 5)").await;
    agree(&f, "3/60s").await;
    assert_eq!(f.number(SLOTS).await, 3);
    assert!(f.number("select extract(epoch from min(free_at) - now())::bigint from upstream_slots where not retired").await >= 38);
}

#[tokio::test]
async fn a_rate_that_is_lowered_and_raised_again_forgets_no_call() {
    let f = Fixture::new().await;
    f.run("update upstream_slots set free_at = now() + interval '50 s'").await;
    for rate in ["5/60s", "10/60s", "1/60s", "10/60s"] {
        agree(&f, rate).await;
        assert_eq!(f.number(FREE).await, 0, "{rate}");
    }
    assert_eq!(f.number(SLOTS).await, 10);
}

#[tokio::test]
async fn a_longer_window_makes_what_was_used_wait_longer() {
    let f = Fixture::new().await;
    f.run("update upstream_slots set free_at = now() + interval '10 s' where slot <= 4").await;
    agree(&f, "10/90s").await;
    let wait = f.number("select extract(epoch from max(free_at) - now())::bigint from upstream_slots").await;
    assert!((38..=40).contains(&wait), "10 s were left, and the window is 30 s longer: {wait}");
    assert_eq!(f.number(FREE).await, 6);
    agree(&f, "10/60s").await;
    assert_eq!(f.number("select extract(epoch from window_length)::bigint from upstream").await, 60);
}
