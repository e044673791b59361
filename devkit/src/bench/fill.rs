//! Writes millions of rows as the services write them, but without the services: a table of ten million requests is filled in minutes.
//!
//! This is the only place in the harness that writes to the schema. IDs ascend with time, as those of the services do, and finished rows
//! were waiting and leased before, because the position of a row, in an index as in its table, is part of its cost: rows inserted as
//! finished leave pages with room for exactly one waiting row, and then every claim and every POST writes a page of its own.

use anyhow::{Context, Result};

use super::world::{Database, Progress};

/// The rows to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rows<'a> {
    /// Requests whose sign job is due.
    Waiting,
    /// Requests that were signed at the first attempt, this many days ago.
    Finished { days_ago: i32 },
    /// Signed requests whose webhook to this address is due.
    Undelivered { url: &'a str },
}

const AT_ONCE: u64 = 20_000;

/// $1, $2: the first and the last number; $3: the prefix of the messages; $4: the age in days; $5: the address of the webhooks.
const STATEMENT: &str = r"
with key as (
    select id from api_keys where name = 'bench'
),
numbers as (
    select n, convert_to($3 || n, 'UTF8') as body, now() - make_interval(days => $4) as at,
        nextval('messages_id_seq') as message, nextval('jobs_id_seq') as job
    from generate_series($1::bigint, $2::bigint) n
),
texts as (
    insert into messages (id, digest, body)
    overriding system value
    select message, message_digest(body), body
    from numbers
    order by n
),
signs as (
    insert into jobs (id, kind, message_id, created_at)
    overriding system value
    select job, 'sign', message, at
    from numbers
    order by n
    returning id, created_at
),
posts as (
    insert into requests (id, api_key_id, sign_job_id, payload_digest, webhook_url, created_at)
    select (lpad(to_hex((extract(epoch from created_at) * 1000)::bigint), 12, '0') || '7' || lpad(to_hex(signs.id % 4096), 3, '0')
            || '8' || substr(md5(signs.id::text), 1, 15))::uuid,
        key.id, signs.id, sha256(signs.id::text::bytea), $5, created_at
    from signs, key
    order by signs.id
    returning id
),
counted as (
    insert into pending_changes (requests) select count(*) from signs
)
insert into jobs (kind, request_id, receiver) select 'webhook', posts.id, receiver_of(key.id, $5) from posts, key where $5 is not null
";

/// $1: the ID of the last job before this batch.
const LEASE: &str = r"
update jobs set attempt = 1, lease_token = gen_random_uuid(), leased_at = now(), leased_until = now() + interval '40 s'
where id > $1 and kind = 'sign'
";

/// $1: the ID of the last job before this batch.
const FINISH: &str = r"
with signed as (
    update jobs
    set state = 'succeeded', lease_token = null, next_run_at = now(), finished_at = created_at, signature = convert_to('c2lnbmF0dXJl', 'UTF8')
    where id > $1 and kind = 'sign'
    returning id, created_at
),
counted as (
    insert into pending_changes (requests) select -count(*) from signed
)
insert into attempts (job_id, number, started_at, finished_at, outcome, status)
select id, 1, created_at, created_at, 'succeeded', 200 from signed
";

/// Writes `count` rows, and reports progress now and then. The messages begin with `prefix`, which distinguishes one filling from another.
pub(super) async fn fill(database: &Database, progress: &Progress, rows: Rows<'_>, count: u64, prefix: &str) -> Result<()> {
    let mut connection = database.connect().await?;
    let key = "insert into api_keys (id, name, digest, scopes, webhook_secret)
        values (gen_random_uuid(), 'bench', sha256('bench'), '{sign}', sha256('bench')) on conflict do nothing";
    database.statement(&mut connection, key).await?;
    let (days, url) = match rows {
        Rows::Waiting => (0, None),
        Rows::Finished { days_ago } => (days_ago, None),
        Rows::Undelivered { url } => (0, Some(url)),
    };
    let mut told = 0;
    for first in (0..count).step_by(usize::try_from(AT_ONCE).unwrap_or(usize::MAX)) {
        let last = count.min(first + AT_ONCE);
        let before = database.number(&mut connection, "select coalesce(max(id), 0) from jobs").await?;
        sqlx::query(STATEMENT)
            .bind(i64::try_from(first + 1).unwrap_or(i64::MAX))
            .bind(i64::try_from(last).unwrap_or(i64::MAX))
            .bind(prefix)
            .bind(days)
            .bind(url)
            .execute(&mut connection)
            .await
            .context("filling the database")?;
        if rows != Rows::Waiting {
            for statement in [LEASE, FINISH] {
                sqlx::query(statement).bind(before).execute(&mut connection).await.context("filling the database")?;
            }
        }
        let tenth = last * 10 / count;
        if tenth > told && count > 10 * AT_ONCE {
            told = tenth;
            progress.note(format!("filled {last} of {count} rows"));
        }
    }
    database.settle().await
}
