//! What processes of the previous version leave behind, and what those that are still running can do on the current schema.

use devkit::wait::until;
use shared::store::sign_finish::SignEnding;
use sqlx::{Connection, PgConnection};

use crate::fixture::{Fixture, connect, database_at};

/// The last version that kept the end of a lease in `next_run_at`, and wrote an attempt when it began.
const BEFORE_LEASES: i64 = 20_261_124_200_000;

/// Two jobs, neither of them leased.
const JOBS: &str = "
    insert into messages (digest, body) select sha256(m::bytea), m::bytea from unnest(array['first', 'second']) m;
    insert into jobs (kind, message_digest, created_at) values ('sign', sha256('first'), now() - interval '1 min'), ('sign', sha256('second'), now());";

/// How a worker of that version claimed a job.
const CLAIM: &str = "
    with leased as (
        update jobs set attempt = attempt + 1, lease_token = gen_random_uuid(), next_run_at = now() + interval '1 min'
        where id = (select id from jobs where kind = 'sign' and state = 'pending' and next_run_at <= now() order by created_at limit 1)
        returning id, attempt
    )
    insert into attempts (job_id, number) select id, attempt from leased";

/// The last version that kept a signature in the row of its message.
const BEFORE_SIGNATURES_IN_JOBS: i64 = 20_261_124_235_800;

/// A message that was signed, one that was signed after it had failed, one that failed, and one that waits.
const SIGNED: &str = "
    insert into api_keys (id, name, digest, scopes, webhook_secret) values (gen_random_uuid(), 'old', sha256('old'), '{sign}', sha256('secret'));
    insert into messages (digest, body) select sha256(m::bytea), m::bytea from unnest(array['signed', 'failed and signed', 'failed', 'waits']) m;
    insert into jobs (kind, message_id, created_at, state, failure, finished_at)
        select 'sign', m.id, now() - interval '3 min', 'failed', 'deadline-exceeded', now() - interval '2 min'
        from messages m where m.body in ('failed and signed', 'failed');
    insert into jobs (kind, message_id, created_at, state, finished_at)
        select 'sign', m.id, now() - interval '1 min', 'succeeded', '2026-11-24 12:00Z' from messages m where m.body in ('signed', 'failed and signed');
    insert into jobs (kind, message_id) select 'sign', m.id from messages m where m.body = 'waits';
    update messages m set signature = 'signature of '::bytea || m.body, signed_at = j.finished_at, signed_by = j.id
        from jobs j where j.message_id = m.id and j.state = 'succeeded';
    insert into requests (id, api_key_id, sign_job_id, payload_digest)
        select gen_random_uuid(), k.id, j.id, sha256('payload') from jobs j, api_keys k;
    update jobs set requests = 1";

#[tokio::test]
async fn signatures_of_the_version_before_are_kept_and_nothing_is_signed_twice() {
    let f = Fixture::upgraded(BEFORE_SIGNATURES_IN_JOBS, &[SIGNED]).await;
    for message in ["signed", "failed and signed"] {
        let id = f.post(message).await;
        let request = f.state(id).await;
        assert_eq!(request.signature, Some(format!("signature of {message}")));
        assert_eq!(request.signed_at, Some(time::macros::datetime!(2026-11-24 12:00 UTC)));
    }
    let failed = "select count(*) from requests r join jobs j on j.id = r.sign_job_id where j.failure is not null and j.signature is null";
    assert_eq!(f.number(failed).await, 2, "what failed stays failed for who was told so");
    f.post("failed").await;
    f.post("waits").await;
    let mut claimed: Vec<_> = f.claim(10).await.into_iter().map(|job| job.message.text().to_owned()).collect();
    claimed.sort();
    assert_eq!(claimed, ["failed", "waits"]);
    assert_eq!(f.strays().await, 0);
}

#[tokio::test]
async fn a_worker_of_the_version_before_keeps_what_it_has_and_claims_nothing_more() {
    let f = Fixture::upgraded(BEFORE_LEASES, &[JOBS, CLAIM]).await;
    let claimed = f.claim(10).await;
    assert_eq!(claimed.iter().map(|job| job.message.text()).collect::<Vec<_>>(), ["second"], "the other one is leased");
    let reason = f.refused(CLAIM).await;
    assert!(reason.contains("only_due_jobs_are_leased"), "{reason}");
    f.run("insert into messages (digest, body) values (message_digest('third'), 'third')").await;
    f.run("insert into jobs (kind, message_id, created_at, next_run_at) values ('sign', (select max(id) from messages), now() - interval '1 d', now() - interval '1 d')").await;
    let reason = f.refused(CLAIM).await;
    assert!(reason.contains("leases_begin_and_end"), "{reason}");
    assert_eq!(f.number("select count(*) from jobs where lease_token is not null and leased_until > now()").await, 2);
}

#[tokio::test]
async fn what_a_worker_of_the_version_before_had_is_tried_again_and_stands_once_in_the_log() {
    let f = Fixture::upgraded(BEFORE_LEASES, &[JOBS, CLAIM]).await;
    f.run("update jobs set leased_until = now() - interval '1 s' where lease_token is not null").await;
    let mut claimed = f.claim(10).await;
    claimed.sort_by_key(|job| job.message.text().to_owned());
    assert_eq!(claimed.iter().map(|job| (job.message.text(), job.attempt)).collect::<Vec<_>>(), [("first", 2), ("second", 1)]);
    for job in claimed {
        f.finish(job, SignEnding::Signed("s".to_owned())).await;
    }
    assert_eq!(f.number("select count(*) from attempts where outcome is null").await, 1);
    assert_eq!(f.number("select count(*) from attempts").await, 3);
}

#[tokio::test]
async fn every_table_and_every_column_says_what_it_is() {
    let f = Fixture::without_rate().await;
    let silent = "select count(*) from pg_class c join pg_attribute a on a.attrelid = c.oid
        where c.relnamespace = 'public'::regnamespace and c.relkind = 'r' and c.relname not like '\\_sqlx%' and a.attnum > 0 and not a.attisdropped
            and (col_description(c.oid, a.attnum) is null or obj_description(c.oid, 'pg_class') is null)";
    assert_eq!(f.number(silent).await, 0);
}

#[tokio::test]
async fn a_migration_that_waits_for_a_table_lets_everybody_else_at_it() {
    let url = database_at(BEFORE_LEASES).await;
    let store = connect(&url);
    let mut backup = PgConnection::connect(&url).await.unwrap();
    let mut reading = backup.begin().await.unwrap();
    sqlx::raw_sql("select from jobs").execute(&mut *reading).await.unwrap();
    tokio::join!(async { store.migrate().await.unwrap() }, async {
        let mut other = PgConnection::connect(&url).await.unwrap();
        sqlx::raw_sql("set lock_timeout = '500ms'").execute(&mut other).await.unwrap();
        for _ in 0..3 {
            until("the migration waits", async || {
                let waits = "select exists (select from pg_locks where relation = 'jobs'::regclass and not granted)";
                sqlx::query_scalar(waits).fetch_one(&mut other).await.unwrap()
            })
            .await;
            sqlx::raw_sql("select from jobs").execute(&mut other).await.expect("it is let through");
        }
        reading.rollback().await.unwrap();
    });
    store.check_schema().await.unwrap();
}
