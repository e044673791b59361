//! Stores what may be known already, in a transaction that first locks the messages and their live jobs, and then reads what exists.
//!
//! Table rows are looked up with `lateral … limit 1`: one index lookup each, whatever sizes the planner assumes. Statements are prepared
//! while the tables may still be empty, when every plan looks cheap.

use std::collections::HashSet;
use std::time::Duration;

use uuid::Uuid;

use super::columns::Columns;
use super::{Accepted, NewRequest, Rejection, Stored};
use crate::forecast::Waiting;
use crate::store::transaction::Transaction;
use crate::store::{Hint, JobKind, Result, Store, StoreError};

/// The maximum number of requests that wait for one message. When the message's job ends, the statement that writes the outcome inserts a
/// webhook job for each of them. With very many, that statement would time out on every attempt.
const MOST_ATTACHED: i32 = 10_000;

/// How long [`Store::accept_unless_held`] waits for a lock: somewhat longer than a statement of ours usually holds one.
const HELD_AFTER: Duration = Duration::from_millis(100);

impl Store {
    /// Stores `requests` in one transaction, durably, and notifies the workers once if there is new work. Returns one result per request,
    /// in order.
    ///
    /// At most `most_pending` requests are unfinished at a time. What other processes store at the same moment is not seen, and may exceed
    /// the limit: see `pending`. At most 10,000 requests wait for one message.
    ///
    /// # Errors
    /// If a statement fails. Then nothing was stored or, if the connection broke during the commit, everything was.
    pub async fn accept(&self, requests: &[NewRequest], most_pending: u64) -> Result<Vec<Accepted>> {
        self.accept_with(None, requests, most_pending).await
    }

    /// The same, but does not wait for long if another transaction holds one of the messages, or its job.
    ///
    /// # Errors
    /// As for [`accept`](Self::accept); [`StoreError::Contended`] if one is held.
    pub async fn accept_unless_held(&self, requests: &[NewRequest], most_pending: u64) -> Result<Vec<Accepted>> {
        self.accept_with(Some(HELD_AFTER), requests, most_pending).await
    }

    async fn accept_with(&self, lock_timeout: Option<Duration>, requests: &[NewRequest], most_pending: u64) -> Result<Vec<Accepted>> {
        // Two batches that race for one idempotency key can make the second one's new job pointless. This shows as a request that was not
        // inserted. After a rollback, the next try sees the first one's rows.
        for _ in 0..3 {
            if let Some(accepted) = self.try_accept(lock_timeout, requests, most_pending).await? {
                return Ok(accepted);
            }
        }
        Err(StoreError::LostRaces)
    }

    async fn try_accept(
        &self,
        lock_timeout: Option<Duration>,
        requests: &[NewRequest],
        most_pending: u64,
    ) -> Result<Option<Vec<Accepted>>> {
        let columns = Columns::of(requests, &self.keyring);
        let room = self.room(requests.len(), most_pending).await?;
        let mut transaction = self.database.begin_with(lock_timeout).await?;

        // Inserts new messages and locks existing ones (a row whose `where` fails is locked all the same), in the order of digests.
        let new = sqlx::query_scalar!(
            "-- accept.messages
            insert into messages (digest, body)
            select distinct on (digest) digest, body from unnest($1::uuid[], $2::bytea[]) as posted (digest, body) order by digest
            on conflict (digest) do update set body = excluded.body where false
            returning digest",
            &columns.digests,
            &columns.bodies as _,
        )
        .fetch_all(&mut transaction)
        .await?;
        // A job that a finish holds now has ended when the next statement begins, and a job locked here ends after the commit. Locks in the
        // order of ids, as a finish does.
        sqlx::query!(
            "-- accept.lock_jobs
            select from jobs
            where id = any(array(
                select live.id
                from unnest($1::uuid[]) as posted (digest)
                cross join lateral (select id from messages m where m.digest = posted.digest limit 1) m
                cross join lateral (
                    select id from jobs j where j.message_id = m.id and j.kind = 'sign' and j.state = 'pending' limit 1
                ) live
            ))
            order by id for no key update",
            &columns.digests,
        )
        .execute(&mut transaction)
        .await?;

        let rows = sqlx::query!(
            r#"-- accept.requests
            with posted as materialized (
                select *, case when client_id is null then id::text else key::text || client_id end as same_as
                from unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::text[], $5::bytea[], $6::text[], $7::jsonb[], $8::text[],
                    $10::bytea[], $11::text[], $15::bytea[])
                    with ordinality as p (id, key, digest, client_id, payload, url, headers, traceparent, sealed, sealed_with, body, ord)
            ),
            earlier as materialized (
                select p.ord, r.id, r.created_at, r.sign_job_id,
                    r.payload_digest = p.payload or exists (
                        select from unnest($12::bigint[], $13::bytea[]) as o (ord, payload) where o.ord = p.ord and o.payload = r.payload_digest
                    ) as same
                from posted p cross join lateral (
                    select * from requests r where r.api_key_id = p.key and r.client_request_id = p.client_id limit 1
                ) r
            ),
            -- One per idempotency key; what was not asked for with one is always new.
            wanted as materialized (
                select distinct on (p.same_as) p.*, m.id as message, done.id is not null as signed, done.id as signed_by, live.id as live_job,
                    coalesce(live.attached, 0) as attached
                from posted p
                cross join lateral (select id from messages m where m.digest = p.digest and m.body = p.body limit 1) m
                left join lateral (
                    select id from jobs j where j.message_id = m.id and j.kind = 'sign' and j.state = 'succeeded' limit 1
                ) done on true
                left join lateral (
                    select id, attached from jobs j where j.message_id = m.id and j.kind = 'sign' and j.state = 'pending' limit 1
                ) live on true
                where not exists (select from earlier e where e.ord = p.ord)
                order by p.same_as, p.ord
            ),
            -- What is signed already is finished at once; of the others, as many as there is room for.
            admitted as materialized (
                select * from (
                    select *, row_number() over (partition by signed order by ord) as place,
                        row_number() over (partition by message order by ord) as seat
                    from wanted
                ) w
                where signed or place <= $9::bigint and attached + seat <= $14::int
            ),
            opened as (
                insert into jobs (kind, message_id, traceparent, attached)
                select distinct on (message) 'sign', message, traceparent, count(*) over (partition by message)
                from admitted
                where not signed and live_job is null
                order by message, ord
                returning id, message_id
            ),
            joined as (
                update jobs j set attached = j.attached + a.requests
                from (
                    select live_job, count(*) as requests from admitted where not signed and live_job is not null group by live_job
                ) a
                where j.id = any(array[a.live_job])
            ),
            stored as (
                insert into requests
                    (id, api_key_id, sign_job_id, client_request_id, payload_digest, webhook_url, webhook_headers, traceparent,
                    sealed_webhook_headers, webhook_headers_key_id)
                select w.id, w.key, coalesce(w.signed_by, w.live_job, o.id), w.client_id, w.payload, w.url, w.headers, w.traceparent,
                    w.sealed, w.sealed_with
                from admitted w left join opened o on o.message_id = w.message
                on conflict (api_key_id, client_request_id) where client_request_id is not null do nothing
                returning id, created_at
            ),
            -- A message that is signed already needs no sign job, but its receiver wants to hear.
            outbox as (
                insert into jobs (kind, request_id, receiver, traceparent)
                select 'webhook', w.id, receiver_of(w.key, w.url), w.traceparent
                from admitted w join stored s on s.id = w.id
                where w.signed and w.url is not null
                returning id
            ),
            counted as (
                insert into pending_changes (requests)
                select count(*) from stored s join admitted a on a.id = s.id where not a.signed having count(*) > 0
            )
            select
                coalesce(s.id, e.id) as id,
                coalesce(s.created_at, e.created_at) as created_at,
                coalesce(e.same, w.payload = p.payload) as same,
                coalesce(w.signed, j.state <> 'pending') as settled,
                (select o.id from opened o where o.message_id = w.message and w.live_job is null) as opened,
                (select count(*) from admitted) = (select count(*) from stored) as "whole!",
                w.id is not null and not exists (select from admitted a where a.id = w.id) as "full!",
                exists (select from outbox) as "tells!"
            from posted p
            left join earlier e on e.ord = p.ord
            left join lateral (select state from jobs j where j.id = e.sign_job_id limit 1) j on true
            left join wanted w on w.same_as = p.same_as
            left join stored s on s.id = w.id
            order by p.ord"#,
            &columns.ids,
            &columns.keys,
            &columns.digests,
            &columns.client_ids as &[Option<&str>],
            &columns.payloads as _,
            &columns.urls as &[Option<&str>],
            &columns.headers as &[Option<serde_json::Value>],
            &columns.traceparents as &[Option<&str>],
            room,
            &columns.sealed as &[Option<Vec<u8>>],
            &columns.sealed_with as &[Option<String>],
            &columns.older_of,
            &columns.older_payloads as _,
            MOST_ATTACHED,
            &columns.bodies as _,
        )
        .fetch_all(&mut transaction)
        .await?;

        if rows.iter().any(|row| !row.whole) {
            transaction.rollback().await?;
            return Ok(None);
        }
        let new_jobs = [
            rows.iter().any(|row| row.opened.is_some()).then_some(Hint::Jobs(JobKind::Sign)),
            rows.iter().any(|row| row.tells).then_some(Hint::Jobs(JobKind::Webhook)),
        ];
        let accepted = rows
            .into_iter()
            .map(|row| {
                if row.full {
                    Ok(Err(Rejection::Full))
                } else {
                    match (row.id, row.created_at, row.same, row.settled) {
                        (Some(id), Some(created_at), Some(true), Some(settled)) => {
                            let waiting = row.opened.map(|job| Waiting { fresh: true, turn: (created_at, job), in_flight: false });
                            Ok(Ok(Stored { id, created_at, settled, waiting }))
                        }
                        (_, _, Some(false), _) => Ok(Err(Rejection::Mismatch)),
                        (None, ..) => Ok(Err(Rejection::Collision)),
                        _ => Err(StoreError::Corrupt("request")),
                    }
                }
            })
            .collect::<Result<Vec<_>>>()?;
        forget_unused(&mut transaction, new, requests, &accepted).await?;
        transaction.commit().await?;
        self.tell(new_jobs.into_iter().flatten());
        let unsettled = accepted.iter().flatten().filter(|stored| !stored.settled).count();
        self.pending.add(i64::try_from(unsettled).unwrap_or(i64::MAX));
        Ok(Some(accepted))
    }
}

/// Deletes the new messages that no request uses, because no request that brought one was stored.
async fn forget_unused(transaction: &mut Transaction, new: Vec<Uuid>, requests: &[NewRequest], accepted: &[Accepted]) -> Result<()> {
    if accepted.iter().all(Result::is_ok) {
        return Ok(());
    }
    let used: HashSet<Uuid> = requests
        .iter()
        .zip(accepted)
        .filter(|(_, accepted)| accepted.is_ok())
        .map(|(request, _)| request.message.digest().short())
        .collect();
    let unused: Vec<Uuid> = new.into_iter().filter(|digest| !used.contains(digest)).collect();
    sqlx::query!("-- accept.forget_unused\ndelete from messages where digest = any($1)", &unused).execute(&mut *transaction).await?;
    Ok(())
}
