//! Rows by the million, as the services write them, without the services: a table of ten million requests is filled in minutes.
//!
//! The one place of the harness that knows the schema. Ids ascend with time as those of the services do, because where a row lands in an
//! index is part of what it costs.

use super::world::{Database, Progress};
use crate::error::{Context, Result};

/// What to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rows<'a> {
    /// Requests whose sign job is due.
    Waiting,
    /// Requests that were signed at the first try, so many days ago.
    Finished { days_ago: i32 },
    /// Requests that were signed, whose webhook to this address is due.
    Undelivered { url: &'a str },
}

const AT_ONCE: u64 = 20_000;

/// $1, $2: the first and the last number; $3: what messages begin with; $4: days since, null while waiting; $5: where webhooks go.
const STATEMENT: &str = r"
with key as (
    select id from api_keys where name = 'bench'
),
numbers as (
    select n, convert_to($3 || n, 'UTF8') as body, now() - make_interval(days => coalesce($4, 0)) as at,
        nextval('messages_id_seq') as message, nextval('jobs_id_seq') as job
    from generate_series($1::bigint, $2::bigint) n
),
texts as (
    insert into messages (id, digest, body)
    overriding system value
    select message, sha256(body), body
    from numbers
    order by n
),
signs as (
    insert into jobs (id, kind, message_id, state, attempt, created_at, finished_at, signature)
    overriding system value
    select job, 'sign', message, case when $4 is null then 'pending' else 'succeeded' end::job_state, ($4 is not null)::int, at,
        case when $4 is not null then at end, case when $4 is not null then convert_to('c2lnbmF0dXJl', 'UTF8') end
    from numbers
    order by n
    returning id, created_at
),
calls as (
    insert into attempts (job_id, number, started_at, finished_at, outcome, status)
    select id, 1, created_at, created_at, 'succeeded', 200 from signs where $4 is not null
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
    insert into pending_changes (requests) select count(*) from signs where $4 is null
)
insert into jobs (kind, request_id, receiver) select 'webhook', posts.id, receiver_of(key.id, $5) from posts, key where $5 is not null
";

/// Writes so many, and says every now and then how far it is. What `prefix` the messages begin with tells one filling from another.
pub(super) async fn fill(database: &Database, progress: &Progress, rows: Rows<'_>, count: u64, prefix: &str) -> Result<()> {
    let mut connection = database.connect().await?;
    let key = "insert into api_keys (id, name, digest, scopes, webhook_secret)
        values (gen_random_uuid(), 'bench', sha256('bench'), '{sign}', sha256('bench')) on conflict do nothing";
    database.statement(&mut connection, key).await?;
    let (days, url) = match rows {
        Rows::Waiting => (None, None),
        Rows::Finished { days_ago } => (Some(days_ago), None),
        Rows::Undelivered { url } => (Some(0), Some(url)),
    };
    let mut told = 0;
    for first in (0..count).step_by(usize::try_from(AT_ONCE).unwrap_or(usize::MAX)) {
        let last = count.min(first + AT_ONCE);
        sqlx::query(STATEMENT)
            .bind(i64::try_from(first + 1).unwrap_or(i64::MAX))
            .bind(i64::try_from(last).unwrap_or(i64::MAX))
            .bind(prefix)
            .bind(days)
            .bind(url)
            .execute(&mut connection)
            .await
            .context(|| "filling the database")?;
        let tenth = last * 10 / count;
        if tenth > told && count > 10 * AT_ONCE {
            told = tenth;
            progress.note(format!("filled {last} of {count} rows"));
        }
    }
    database.settle().await
}
