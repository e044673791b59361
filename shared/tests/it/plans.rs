//! What the hot statements read, by Postgres's own count: whenever their plans were made, they must do when the tables are full.

use std::time::Duration;

use shared::store::accept::NewRequest;
use shared::store::sign_finish::{Ending, SignFinish};

use crate::fixture::{Fixture, finish, id};

/// Rows of the backlog, of which a statement that works on a few must not notice anything.
const BACKLOG: i64 = 30_000;

/// Those that grow.
const TABLES: [&str; 4] = ["jobs", "messages", "requests", "attempts"];

/// Twenty of everything: new messages, known ones with and without a key, a claim, a finish, states.
async fn work(f: &Fixture, round: &str) {
    let new: Vec<NewRequest> = (0..20).map(|n| f.request(&format!("{round} {n}"))).collect();
    let stored = f.store.accept_new(&new, u64::MAX).await.unwrap();
    let key = |n| Some(format!("{round} {}", n % 10));
    let known = (0..20).map(|n| NewRequest { client_request_id: key(n), ..f.request(&format!("{round} {}", n % 10)) });
    f.store.accept(&known.collect::<Vec<_>>(), u64::MAX).await.unwrap();
    let finishes: Vec<SignFinish> = f.claim(20).await.into_iter().map(|job| finish(job, Ending::Signed("s".to_owned()))).collect();
    assert_eq!(finishes.len(), 20);
    f.store.finish_sign_jobs(&finishes).await.unwrap();
    let ids: Vec<_> = stored.iter().flatten().map(id).collect();
    assert_eq!(f.store.requests(&ids).await.unwrap().len(), 20);
}

/// Fresh tables with twenty jobs done and a backlog, which nobody analyzes.
async fn full() -> Fixture {
    let f = Fixture::new().await;
    f.agree("10000/60s").await;
    for table in TABLES {
        f.run(&format!("alter table {table} set (autovacuum_enabled = off)")).await;
    }
    for round in 0..3 {
        work(&f, &format!("before {round}")).await;
    }
    f.run(&format!(
        "with texts as (
            insert into messages (digest, body) select sha256(n::text::bytea), n::text::bytea from generate_series(1, {BACKLOG}) n returning digest
        ),
        signs as (
            insert into jobs (kind, message_digest, next_run_at) select 'sign', digest, now() + interval '1 hour' from texts returning id, message_digest
        ),
        tried as (
            insert into attempts (job_id, number) select id, 1 from signs
        )
        insert into requests (id, api_key_id, sign_job_id, client_request_id, payload_digest)
        select gen_random_uuid(), k.id, s.id, 'backlog ' || s.id, s.message_digest from signs s, api_keys k"
    ))
    .await;
    f
}

/// Does twenty of everything, and holds what was read for it against what is needed.
async fn reads_little(f: Fixture) {
    f.run("select pg_stat_reset()").await;
    work(&f, "after").await;
    // Sessions report what they read at their end at the latest.
    f.store.close().await;
    while f.number("select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()").await > 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let read = f
        .number(
            "select (select sum(idx_tup_read) from pg_stat_user_indexes where relname <> 'upstream_slots')::bigint
                + (select sum(seq_tup_read) from pg_stat_user_tables where relname in ('jobs', 'messages', 'requests', 'attempts'))::bigint",
        )
        .await;
    // Twenty of each, several indexes, and the count of those that compete, which ends at a thousand.
    assert!((100..6_000).contains(&read), "{read} rows were read");
}

#[tokio::test]
async fn statements_that_were_planned_in_an_empty_database_read_no_more_when_it_is_full() {
    reads_little(full().await).await;
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
