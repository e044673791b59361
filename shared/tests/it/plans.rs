//! What the hot statements read, as counted by Postgres: whenever a plan was made, it must be good enough when the tables are full.

use std::time::Duration;

use shared::store::accept::NewRequest;
use shared::store::deliveries::Replay;
use shared::store::low_water::LowWater;
use shared::store::sign_finish::{SignEnding, SignFinish};
use shared::store::sign_overdue::Scan;
use shared::store::webhook_finish::{ReceiverNews, WebhookEnding, WebhookFinish};

use sqlx::Connection;

use crate::fixture::{Fixture, LEASE, any_receiver, finish};

/// Rows of the backlog, which must not affect a statement that works on a few rows.
const BACKLOG: i64 = 30_000;

/// The tables that grow.
const TABLES: [&str; 4] = ["jobs", "messages", "requests", "attempts"];

/// Older requests are deleted.
const RETENTION: Duration = Duration::from_hours(24);

/// Does twenty of everything: new messages, known ones with and without a key, a claim, a finish, states; their webhooks, the delivery log,
/// one replay; and deletes twenty that are old enough, if there are as many.
async fn work(f: &Fixture, round: &str) {
    let new: Vec<NewRequest> = (0..20).map(|n| f.with_webhook(&format!("{round} {n}"))).collect();
    let stored = f.store.accept_new(&new, u64::MAX).await.unwrap();
    let key = |n| Some(format!("{round} {}", n % 10));
    let known = (0..20).map(|n| NewRequest { client_request_id: key(n), ..f.request(&format!("{round} {}", n % 10)) });
    f.store.accept(&known.collect::<Vec<_>>(), u64::MAX).await.unwrap();
    let finishes: Vec<SignFinish> = f.claim(20).await.into_iter().map(|job| finish(job, SignEnding::Signed("s".to_owned()))).collect();
    assert_eq!(finishes.len(), 20);
    f.store.finish_sign_jobs(&finishes).await.unwrap();
    let ids: Vec<_> = stored.iter().flatten().map(|stored| stored.id).collect();
    assert_eq!(f.states(&ids).await.len(), 20);

    let mut delivered = 0;
    // The first time, the receiver has to show that it works.
    while delivered < 20 {
        let claimed = f.store.claim_webhook_jobs(&any_receiver(20), None, LEASE).await.unwrap().0.jobs;
        assert!(!claimed.is_empty());
        delivered += claimed.len();
        let finishes: Vec<WebhookFinish> = claimed
            .into_iter()
            .map(|job| WebhookFinish {
                lease: job.lease,
                ending: WebhookEnding::Delivered,
                status: Some(200),
                error: None,
                took: Duration::ZERO,
                response: None,
                receiver: ReceiverNews::Works { slow: false },
            })
            .collect();
        f.store.finish_webhook_jobs(&finishes).await.unwrap();
    }
    assert_eq!(f.store.deliveries(ids[0], None).await.unwrap().unwrap().deliveries.len(), 1);
    assert_eq!(f.store.replay(ids[0], None).await.unwrap(), Replay::Sending);
    f.store.delete_ended_requests(RETENTION, 20).await.unwrap();
    f.store.exhaust_webhooks_of_lost_receivers(RETENTION, 20).await.unwrap();
    f.store.delete_idle_receivers(RETENTION, 20).await.unwrap();
    f.store.delete_retired_secrets(20).await.unwrap();
}

/// Fresh tables with finished jobs and a backlog, which are not analyzed.
async fn full() -> Fixture {
    filled(planned_on_nothing().await).await
}

async fn planned_on_nothing() -> Fixture {
    let f = Fixture::new().await;
    f.agree("10000/60s").await;
    for table in TABLES {
        f.run(&format!("alter table {table} set (autovacuum_enabled = off)")).await;
    }
    f
}

async fn filled(f: Fixture) -> Fixture {
    for round in 0..3 {
        work(&f, &format!("before {round}")).await;
    }
    f.run(
        "update requests set created_at = created_at - interval '2 days';
        update jobs set created_at = created_at - interval '2 days', finished_at = finished_at - interval '2 days';
        update receivers set changed_at = changed_at - interval '2 days'",
    )
    .await;
    // None of these is due, and none is old.
    f.run(&format!(
        "with texts as (
            insert into messages (digest, body) select message_digest(n::text::bytea), n::text::bytea from generate_series(1, {BACKLOG}) n returning id, digest
        ),
        signs as (
            insert into jobs (kind, message_id, next_run_at) select 'sign', id, now() + interval '1 hour' from texts returning id, message_id
        ),
        tried as (
            insert into attempts (job_id, number, finished_at, outcome) select id, 1, now(), 'try_again' from signs
        ),
        posts as (
            insert into requests (id, api_key_id, sign_job_id, client_request_id, payload_digest, webhook_url)
            select gen_random_uuid(), k.id, s.id, 'backlog ' || s.id, sha256(t.digest::text::bytea), 'http://elsewhere.example/' 
            from signs s join texts t on t.id = s.message_id, api_keys k
            returning id, api_key_id, webhook_url
        )
        insert into jobs (kind, request_id, receiver, next_run_at)
        select 'webhook', id, receiver_of(api_key_id, webhook_url), now() + interval '1 hour' from posts"
    ))
    .await;
    f
}

/// Does twenty of everything, and compares what was read for it with what is needed.
async fn reads_little(f: Fixture) {
    f.count_anew().await;
    work(&f, "after").await;
    let f = f.with_new_sessions().await;
    let read = f
        .counted(
            "select (select sum(idx_tup_read) from pg_stat_user_indexes where relname <> 'upstream_slots')::bigint
                + (select sum(seq_tup_read) from pg_stat_user_tables where relname in ('jobs', 'messages', 'requests', 'attempts'))::bigint",
        )
        .await;
    // Twenty of each, several indexes, and the count of competing jobs, which stops at a thousand.
    assert!((100..6_000).contains(&read), "{read} rows were read");
    assert_eq!(
        f.number("select count(*) from requests where created_at < now() - interval '1 day'").await,
        70,
        "twenty of ninety are forgotten"
    );
}

#[tokio::test]
async fn statements_that_were_planned_in_an_empty_database_read_no_more_when_it_is_full() {
    reads_little(full().await).await;
}

/// For a table that was never vacuumed, Postgres assumes ten pages; for one that was, that it is still as empty as it was then.
#[tokio::test]
async fn statements_that_were_planned_when_a_vacuum_had_found_nothing_read_no_more_when_the_tables_are_full() {
    let f = planned_on_nothing().await;
    for table in TABLES {
        f.run(&format!("vacuum analyze {table}")).await;
    }
    reads_little(filled(f.with_new_sessions().await).await).await;
}

#[tokio::test]
async fn statements_that_are_planned_on_full_tables_which_nobody_analyzed_read_no_more() {
    reads_little(full().await.with_new_sessions().await).await;
}

#[tokio::test]
async fn statements_that_are_planned_on_full_tables_which_were_analyzed_read_no_more() {
    let f = full().await.with_new_sessions().await;
    for table in TABLES {
        f.run(&format!("vacuum analyze {table}")).await;
    }
    reads_little(f).await;
}

#[tokio::test]
async fn a_claim_from_the_low_water_mark_on_steps_over_what_was_done_though_no_vacuum_can_take_it_away() {
    const ROUNDS: i32 = 10;
    let f = Fixture::new().await;
    f.agree("10000/60s").await;
    let mut holder = f.connection().await;
    let mut holder = holder.begin().await.unwrap();
    sqlx::raw_sql("set transaction isolation level repeatable read; select from jobs").execute(&mut *holder).await.unwrap();

    let rate = "10000/60s".parse().unwrap();
    let mut mark = LowWater::default();
    for round in 0..ROUNDS {
        f.run(&format!(
            "with texts as (
                insert into messages (digest, body)
                select message_digest(m::bytea), m::bytea from (select '{round} ' || n as m from generate_series(1, 100) n) m returning id
            )
            insert into jobs (kind, message_id, next_run_at) select 'sign', id, now() - interval '{} min' from texts",
            ROUNDS - round
        ))
        .await;
        let (claimed, reached) = f.store.claim_sign_jobs(100, LEASE, rate, mark).await.unwrap();
        assert_eq!(claimed.jobs.len(), 100);
        mark = reached;
        let finishes: Vec<SignFinish> = claimed.jobs.into_iter().map(|job| finish(job, SignEnding::Signed("s".to_owned()))).collect();
        f.store.finish_sign_jobs(&finishes).await.unwrap();
    }
    let mut read = Vec::new();
    let mut f = f;
    for from in [mark, LowWater::default()] {
        f = f.with_new_sessions().await;
        f.count_anew().await;
        f.post(&format!("{from:?}")).await;
        assert_eq!(f.store.claim_sign_jobs(100, LEASE, rate, from).await.unwrap().0.jobs.len(), 1);
        f = f.with_new_sessions().await;
        read.push(f.counted("select idx_tup_read from pg_stat_user_indexes where indexrelname = 'jobs_due'").await);
    }
    assert!(read[0] < 500 && read[1] > 1000, "read from the mark on, and from the beginning: {read:?}");
    holder.rollback().await.unwrap();
}

#[tokio::test]
async fn a_claim_of_few_jobs_does_not_count_all_the_slots_that_are_free() {
    const MOST: usize = 5000;
    let mut f = Fixture::new().await;
    f.agree("10000/60s").await;
    // Around the number from which on no job is counted.
    for jobs in [0, 1, 15, 16, 40] {
        for n in 0..jobs {
            f.post(&format!("{n} of {jobs}")).await;
        }
        f.count_anew().await;
        let claimed = f.claim(MOST).await;
        assert_eq!(claimed.len(), jobs);
        let finishes: Vec<SignFinish> = claimed.into_iter().map(|job| finish(job, SignEnding::Signed("s".to_owned()))).collect();
        f.store.finish_sign_jobs(&finishes).await.unwrap();
        f = f.with_new_sessions().await;
        let read = f.counted("select idx_tup_read from pg_stat_user_indexes where indexrelname = 'upstream_slots_by_time'").await;
        assert_eq!(read < 200, jobs < 16, "{read} slots were read for {jobs} jobs");
    }
}

#[tokio::test]
async fn to_look_for_overdue_jobs_at_the_beginning_of_the_queue_reads_no_waiting_retry() {
    let f = Fixture::new().await;
    f.run(
        "with texts as (
            insert into messages (digest, body) select message_digest(n::text::bytea), n::text::bytea from generate_series(1, 10000) n returning id
        )
        insert into jobs (kind, message_id, lane) select 'sign', id, 1 from texts",
    )
    .await;
    f.count_anew().await;
    assert!(f.store.claim_overdue_sign_jobs(RETENTION, Scan::OfThoseDueFirst, 10, LEASE).await.unwrap().is_empty());
    let f = f.with_new_sessions().await;
    let read = f.counted("select (select sum(idx_tup_read) from pg_stat_user_indexes)::bigint + (select sum(seq_tup_read) from pg_stat_user_tables where relname = 'jobs')::bigint").await;
    assert!(read < 100, "{read} rows were read");
}

#[tokio::test]
async fn a_slot_that_was_used_often_is_taken_and_freed_without_a_look_at_its_earlier_uses() {
    const SLOTS: usize = 10;
    const ROUNDS: usize = 30;
    let f = Fixture::new().await;
    f.agree("10/100ms").await;
    let mut holder = f.connection().await;
    let mut holder = holder.begin().await.unwrap();
    sqlx::raw_sql("set transaction isolation level repeatable read; select from jobs").execute(&mut *holder).await.unwrap();
    f.count_anew().await;
    let (rate, mut mark) = ("10/100ms".parse().unwrap(), LowWater::default());
    for round in 0..ROUNDS {
        for n in 0..SLOTS {
            f.post(&format!("{round} {n}")).await;
        }
        let mut finishes = Vec::new();
        while finishes.len() < SLOTS {
            let (claimed, reached) = f.store.claim_sign_jobs(SLOTS, LEASE, rate, mark).await.unwrap();
            mark = reached;
            if claimed.jobs.is_empty() {
                tokio::time::sleep(claimed.next_in.unwrap()).await;
            }
            finishes.extend(claimed.jobs.into_iter().map(|job| finish(job, SignEnding::Signed("s".to_owned()))));
        }
        f.store.finish_sign_jobs(&finishes).await.unwrap();
    }
    let f = f.with_new_sessions().await;
    let touched = "select (heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read)::bigint from pg_statio_user_tables where relname = 'upstream_slots'";
    let (touched, uses) = (f.counted(touched).await, f.number("select sum(uses)::bigint from upstream_slots").await);
    assert_eq!(uses, i64::try_from(SLOTS * ROUNDS).unwrap());
    assert!(touched < 30 * uses, "{touched} pages for {uses} uses");
    holder.rollback().await.unwrap();
}
