//! Stores messages that were never posted before, in one statement.
//!
//! Everything that the transaction of [`any`](super::any) has to look up is known for a message that is not stored yet: it is not signed,
//! it has no job, and no other transaction can see it before the commit. So the statement looks which messages and idempotency keys exist,
//! and ignores the requests for them.
//!
//! If someone else stores one of the messages or idempotency keys at the same moment, this violates a unique index, which fails the whole
//! statement; then the whole batch takes the longer path. `on conflict do nothing` would leave out that message alone, but costs every
//! other one a tenth of its statement.

use std::collections::HashSet;

use super::columns::Columns;
use super::{NewRequest, Stored};
use crate::forecast::Waiting;
use crate::store::{Hint, JobKind, Result, Store, listen, notify, place};

impl Store {
    /// Stores those `requests` whose message is new, in one statement, durably, and notifies the workers once. Returns one result per
    /// request, in order: `None` if it was not stored, and [`accept`](Self::accept) has to decide. If `most_pending` leaves less room than
    /// the batch needs, none is stored.
    ///
    /// # Errors
    /// [`StoreError::Refused`](crate::store::StoreError::Refused) if someone else stored one of the messages or idempotency keys at the same
    /// moment; and if a statement fails. Then nothing was stored or, if the connection broke during the commit, everything was.
    pub async fn accept_new(&self, requests: &[NewRequest], most_pending: u64) -> Result<Vec<Option<Stored>>> {
        let mut accepted = vec![None; requests.len()];
        let firsts = firsts(requests);
        if self.room(firsts.len(), most_pending).await? < i64::try_from(firsts.len()).unwrap_or(i64::MAX) {
            return Ok(accepted);
        }
        let columns = Columns::of(firsts.iter().map(|&place| &requests[place]), &self.keyring);
        let told = notify::goes_with_commit(requests.len());
        let rows = sqlx::query!(
            r#"-- accept.new
            with posted as materialized (
                select p.*, nextval('jobs_id_seq') as job, nextval('messages_id_seq') as message
                from (
                    select unnest($1::uuid[]) as id, unnest($2::uuid[]) as key, unnest($3::uuid[]) as digest, unnest($4::bytea[]) as body,
                        unnest($5::text[]) as client_id, unnest($6::bytea[]) as payload, unnest($7::text[]) as url,
                        unnest($8::jsonb[]) as headers, unnest($9::text[]) as traceparent, unnest($10::bytea[]) as sealed,
                        unnest($11::text[]) as sealed_with, generate_subscripts($1, 1) as ord
                ) p
                where not exists (select from messages m where m.digest = p.digest offset 0)
                    and (p.client_id is null or not exists (
                        select from requests r where r.api_key_id = p.key and r.client_request_id = p.client_id offset 0
                    ))
            ),
            new as (
                insert into messages (id, digest, body)
                overriding system value
                select message, digest, body from posted order by digest
            ),
            opened as (
                insert into jobs (id, kind, message_id, traceparent)
                overriding system value
                select job, 'sign', message, traceparent from posted
            ),
            stored as (
                insert into requests
                    (id, api_key_id, sign_job_id, client_request_id, payload_digest, webhook_url, webhook_headers, traceparent,
                    sealed_webhook_headers, webhook_headers_key_id)
                select id, key, job, client_id, payload, url, headers, traceparent, sealed, sealed_with from posted
            ),
            counted as (
                insert into pending_changes (requests) select count(*) from posted having count(*) > 0
            ),
            told as (
                select pg_notify($12, 'sign') from posted where $13 limit 1
            )
            select ord as "ord!", job as "job!", now() as "created_at!", (select count(*) from told) as told from posted"#,
            &columns.ids,
            &columns.keys,
            &columns.digests,
            &columns.bodies as _,
            &columns.client_ids as &[Option<&str>],
            &columns.payloads as _,
            &columns.urls as &[Option<&str>],
            &columns.headers as &[Option<serde_json::Value>],
            &columns.traceparents as &[Option<&str>],
            &columns.sealed as &[Option<Vec<u8>>],
            &columns.sealed_with as &[Option<String>],
            listen::JOBS,
            told,
        )
        .fetch_all(&self.database)
        .await?;
        self.pending.add(i64::try_from(rows.len()).unwrap_or(i64::MAX));
        if !told && !rows.is_empty() {
            self.tell([Hint::Jobs(JobKind::Sign)]);
        }
        for row in rows {
            let place = firsts[place(row.ord.into())?];
            let waiting = Some(Waiting { fresh: true, turn: (row.created_at, row.job), in_flight: false });
            accepted[place] = Some(Stored { id: requests[place].id, created_at: row.created_at, settled: false, waiting });
        }
        Ok(accepted)
    }
}

/// The first request of each message and of each idempotency key in the batch. The others find what it has stored.
fn firsts(requests: &[NewRequest]) -> Vec<usize> {
    let mut messages = HashSet::with_capacity(requests.len());
    let mut keys = HashSet::new();
    (0..requests.len())
        .filter(|&place| {
            let request = &requests[place];
            request.client_request_id.as_deref().is_none_or(|client_id| keys.insert((request.key, client_id)))
                && messages.insert(request.message.digest())
        })
        .collect()
}
