//! A group of POSTs becomes requests, messages and jobs, in one transaction.
//!
//! Two facts must never part: a request that was answered has a job that will end it, and a message that is signed is never asked for
//! again. Both can be broken in the moment in which a job ends. So everybody who attaches a request to a job holds the message's row,
//! and so does everybody who ends a job: whoever comes second sees what the first one wrote.

use std::collections::{BTreeMap, HashSet};

use time::OffsetDateTime;
use uuid::Uuid;

use super::database::Transaction;
use super::keys::KeyId;
use super::{Result, Store, StoreError, listen};
use crate::encryption::{Keyring, Place};
use crate::forecast::Waiting;
use crate::message::{Message, digest_of_parts};
use crate::secret::Secret;

/// A request as posted, checked and ready to be stored.
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// Its identity, should it be new.
    pub id: Uuid,
    /// Who posts it.
    pub key: KeyId,
    /// What is to be signed.
    pub message: Message,
    /// Where the outcome is sent.
    pub webhook: Option<WebhookTarget>,
    /// The caller's idempotency key.
    pub client_request_id: Option<String>,
    /// The caller's trace.
    pub traceparent: Option<String>,
}

/// Where a webhook goes.
#[derive(Clone, Debug)]
pub struct WebhookTarget {
    url: String,
    posted: String,
    headers: Secret<BTreeMap<String, String>>,
}

impl WebhookTarget {
    /// A target at the address `url`, that was `posted` as this text, with headers that the caller wants sent along; they may hold the
    /// receiver's credentials.
    ///
    /// What is stored is the parsed address: a text has many spellings, and a receiver would be another one in each of them. The posted
    /// text still tells a repeated request from another one, so that one from before a change of the parser stays the same.
    #[must_use]
    pub fn new(posted: String, url: &url::Url, headers: Secret<BTreeMap<String, String>>) -> Self {
        Self { url: url.as_str().to_owned(), posted, headers }
    }
}

impl NewRequest {
    /// Digests over what was asked for: the same for the same request, whatever the order of its headers. The first is the one to store; the
    /// others may be stored already, from before a key was added. Headers may hold credentials that are short enough to be tried out, so
    /// with them the digest is keyed; the message and the address lie beside it anyway.
    fn payload_digests(&self, keyring: &Keyring) -> Vec<[u8; 32]> {
        let digest = self.message.digest();
        let mut parts: Vec<&[u8]> = vec![digest.as_bytes()];
        if let Some(webhook) = &self.webhook {
            parts.push(webhook.posted.as_bytes());
            for (name, value) in webhook.headers.expose() {
                parts.extend([name.as_bytes(), value.as_bytes()]);
            }
        }
        let plain = digest_of_parts(&parts);
        let has_headers = self.webhook.as_ref().is_some_and(|webhook| !webhook.headers.expose().is_empty());
        if has_headers { keyring.digests(&plain) } else { vec![plain] }
    }
}

/// What became of one POST.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// It is stored, now or earlier under the same idempotency key.
    Stored {
        /// The request that answers it.
        id: Uuid,
        /// When that request was stored.
        created_at: OffsetDateTime,
        /// Whether its outcome is there already.
        settled: bool,
        /// How its message waits, if nobody has waited for it before: then nothing else is to be known about the request.
        waiting: Option<Waiting>,
    },
    /// The idempotency key was used with another payload. Nothing was stored.
    Mismatch,
    /// There are as many unfinished requests as there may be. Nothing was stored.
    Full,
}

impl Store {
    /// Stores `requests` together, durably, and tells the workers once if there is something new to do. One result per request, in order.
    /// No more than `most_pending` are unfinished at a time; groups that are stored at the same moment do not see each other, and may
    /// exceed it by their size.
    ///
    /// # Errors
    /// Those of a statement; then nothing was stored, or (if the connection broke during the commit) all was.
    pub async fn accept(&self, requests: &[NewRequest], most_pending: u64) -> Result<Vec<Accepted>> {
        // Two groups that race for one idempotency key can make the second one's new job pointless. It shows as a request that was
        // not inserted; rolled back and read again, the first one's rows are visible.
        for _ in 0..3 {
            if let Some(accepted) = self.try_accept(requests, most_pending).await? {
                return Ok(accepted);
            }
        }
        Err(StoreError::Unavailable(sqlx::Error::Protocol("lost three races for one idempotency key".into())))
    }

    async fn try_accept(&self, requests: &[NewRequest], most_pending: u64) -> Result<Option<Vec<Accepted>>> {
        let columns = Columns::of(requests, &self.keyring);
        let mut transaction = self.database.begin().await?;

        // Inserts what is new and locks what is there (a row whose `where` fails is locked all the same), in the order of digests.
        let new = sqlx::query_scalar!(
            "-- accept.messages
            insert into messages (digest, body)
            select distinct on (digest) digest, body from unnest($1::bytea[], $2::bytea[]) as posted (digest, body) order by digest
            on conflict (digest) do update set body = excluded.body where false
            returning digest",
            &columns.digests as _,
            &columns.bodies as _,
        )
        .fetch_all(&mut transaction)
        .await?;

        let rows = sqlx::query!(
            r#"-- accept.requests
            with posted as materialized (
                select *, case when client_id is null then id::text else key::text || client_id end as same_as
                from unnest($1::uuid[], $2::uuid[], $3::bytea[], $4::text[], $5::bytea[], $6::text[], $7::jsonb[], $8::text[],
                    $11::bytea[], $12::text[])
                    with ordinality as p (id, key, digest, client_id, payload, url, headers, traceparent, sealed, sealed_with, ord)
            ),
            earlier as materialized (
                select p.ord, r.id, r.created_at, r.sign_job_id,
                    r.payload_digest = p.payload or exists (
                        select from unnest($13::bigint[], $14::bytea[]) as o (ord, payload) where o.ord = p.ord and o.payload = r.payload_digest
                    ) as same
                from posted p join requests r on r.api_key_id = p.key and r.client_request_id = p.client_id
            ),
            -- One per idempotency key; what was not asked for with one is always new.
            wanted as materialized (
                select distinct on (p.same_as) p.*, m.signature is not null as signed, m.signed_by, live.id as live_job
                from posted p
                join messages m on m.digest = p.digest
                left join jobs live on live.message_digest = p.digest and live.kind = 'sign' and live.state = 'pending'
                where not exists (select from earlier e where e.ord = p.ord)
                order by p.same_as, p.ord
            ),
            -- What is signed already is finished at once; of the others, as many as there is room for.
            admitted as materialized (
                select * from (select *, row_number() over (partition by signed order by ord) as place from wanted) w
                where signed or place <= $10::bigint - (select sum(requests) from pending_requests)
            ),
            opened as (
                insert into jobs (kind, message_digest, traceparent)
                select distinct on (digest) 'sign', digest, traceparent
                from admitted
                where not signed and live_job is null
                order by digest, ord
                returning id, message_digest
            ),
            stored as (
                insert into requests
                    (id, api_key_id, sign_job_id, client_request_id, payload_digest, webhook_url, webhook_headers, traceparent,
                    sealed_webhook_headers, webhook_headers_key_id)
                select w.id, w.key, coalesce(w.signed_by, w.live_job, o.id), w.client_id, w.payload, w.url, w.headers, w.traceparent,
                    w.sealed, w.sealed_with
                from admitted w left join opened o on o.message_digest = w.digest
                on conflict (api_key_id, client_request_id) where client_request_id is not null do nothing
                returning id, created_at
            ),
            -- A message that is signed already needs no sign job, but its receiver wants to hear.
            outbox as (
                insert into jobs (kind, request_id, traceparent)
                select 'webhook', w.id, w.traceparent
                from admitted w join stored s on s.id = w.id
                where w.signed and w.url is not null
                returning id
            ),
            -- One that nobody holds at this moment; each session begins at its own.
            shard as materialized (
                select coalesce(
                    (select shard from pending_requests order by (shard + pg_backend_pid()) % 16, shard limit 1
                        for no key update skip locked),
                    pg_backend_pid() % 16
                ) as shard
            ),
            counted as (
                update pending_requests
                set requests = requests + (select count(*) from stored s join admitted a on a.id = s.id where not a.signed)
                where shard = (select shard from shard) and exists (select from admitted where not signed)
            ),
            told as (
                select case when exists (select from opened) then pg_notify($9, 'sign') end,
                    case when exists (select from outbox) then pg_notify($9, 'webhook') end
            )
            select
                coalesce(s.id, e.id) as id,
                coalesce(s.created_at, e.created_at) as created_at,
                coalesce(e.same, w.payload = p.payload) as same,
                coalesce(w.signed, j.state <> 'pending') as settled,
                (select o.id from opened o where o.message_digest = w.digest and w.live_job is null) as opened,
                (select count(*) from admitted) = (select count(*) from stored) as "whole!",
                w.id is not null and not exists (select from admitted a where a.id = w.id) as "full!",
                (select count(*) from told) as "told!"
            from posted p
            left join earlier e on e.ord = p.ord
            left join jobs j on j.id = e.sign_job_id
            left join wanted w on w.same_as = p.same_as
            left join stored s on s.id = w.id
            order by p.ord"#,
            &columns.ids,
            &columns.keys,
            &columns.digests as _,
            &columns.client_ids as &[Option<String>],
            &columns.payloads as _,
            &columns.urls as &[Option<String>],
            &columns.headers as &[Option<serde_json::Value>],
            &columns.traceparents as &[Option<String>],
            listen::JOBS,
            i64::try_from(most_pending).unwrap_or(i64::MAX),
            &columns.sealed as &[Option<Vec<u8>>],
            &columns.sealed_with as &[Option<String>],
            &columns.older_of,
            &columns.older_payloads as _,
        )
        .fetch_all(&mut transaction)
        .await?;

        if rows.iter().any(|row| !row.whole) {
            transaction.rollback().await?;
            return Ok(None);
        }
        let accepted = rows
            .into_iter()
            .map(|row| {
                if row.full {
                    Ok(Accepted::Full)
                } else {
                    match (row.id, row.created_at, row.same, row.settled) {
                        (Some(id), Some(created_at), Some(true), Some(settled)) => {
                            let waiting = row.opened.map(|job| Waiting { fresh: true, turn: (created_at, job), in_flight: false });
                            Ok(Accepted::Stored { id, created_at, settled, waiting })
                        }
                        (_, _, Some(false), _) => Ok(Accepted::Mismatch),
                        _ => Err(StoreError::Corrupt("request")),
                    }
                }
            })
            .collect::<Result<Vec<_>>>()?;
        forget_unused(&mut transaction, new, requests, &accepted).await?;
        transaction.commit().await?;
        Ok(Some(accepted))
    }
}

/// Takes back the new messages that no request uses, because none that brought one was stored.
async fn forget_unused(transaction: &mut Transaction, new: Vec<Vec<u8>>, requests: &[NewRequest], accepted: &[Accepted]) -> Result<()> {
    let is_stored = |accepted: &Accepted| matches!(accepted, Accepted::Stored { .. });
    if accepted.iter().all(is_stored) {
        return Ok(());
    }
    let used: HashSet<[u8; 32]> = requests
        .iter()
        .zip(accepted)
        .filter(|(_, accepted)| is_stored(accepted))
        .map(|(request, _)| *request.message.digest().as_bytes())
        .collect();
    let unused: Vec<Vec<u8>> =
        new.into_iter().filter(|digest| <[u8; 32]>::try_from(digest.as_slice()).is_ok_and(|digest| !used.contains(&digest))).collect();
    sqlx::query!("-- accept.forget_unused\ndelete from messages where digest = any($1)", &unused).execute(&mut *transaction).await?;
    Ok(())
}

/// The requests as columns, which is how `unnest` takes them.
#[derive(Default)]
struct Columns {
    ids: Vec<Uuid>,
    keys: Vec<Uuid>,
    digests: Vec<[u8; 32]>,
    bodies: Vec<Vec<u8>>,
    client_ids: Vec<Option<String>>,
    payloads: Vec<[u8; 32]>,
    urls: Vec<Option<String>>,
    headers: Vec<Option<serde_json::Value>>,
    traceparents: Vec<Option<String>>,
    sealed: Vec<Option<Vec<u8>>>,
    sealed_with: Vec<Option<String>>,
    /// Digests of a payload by keys before the first, each with the number of its request, counted from 1.
    older_of: Vec<i64>,
    older_payloads: Vec<[u8; 32]>,
}

impl Columns {
    fn of(requests: &[NewRequest], keyring: &Keyring) -> Self {
        let mut columns = Self::default();
        for (request, ord) in requests.iter().zip(1..) {
            columns.ids.push(request.id);
            columns.keys.push(request.key.0);
            columns.digests.push(*request.message.digest().as_bytes());
            columns.bodies.push(request.message.text().as_bytes().to_vec());
            columns.client_ids.push(request.client_request_id.clone());
            let mut payloads = request.payload_digests(keyring).into_iter();
            columns.payloads.extend(payloads.next());
            for older in payloads {
                columns.older_of.push(ord);
                columns.older_payloads.push(older);
            }
            columns.urls.push(request.webhook.as_ref().map(|webhook| webhook.url.clone()));
            let headers = stored_headers(request, keyring);
            columns.headers.push(headers.plain);
            columns.sealed.push(headers.sealed);
            columns.sealed_with.push(headers.sealed_with);
            columns.traceparents.push(request.traceparent.clone());
        }
        columns
    }
}

/// Headers as they are stored: plain, or sealed with a key.
#[derive(Default)]
struct StoredHeaders {
    plain: Option<serde_json::Value>,
    sealed: Option<Vec<u8>>,
    sealed_with: Option<String>,
}

fn stored_headers(request: &NewRequest, keyring: &Keyring) -> StoredHeaders {
    let Some(headers) = request.webhook.as_ref().map(|webhook| serde_json::json!(webhook.headers.expose())) else {
        return StoredHeaders::default();
    };
    if keyring.first().is_none() || headers.as_object().is_none_or(serde_json::Map::is_empty) {
        return StoredHeaders { plain: Some(headers), ..StoredHeaders::default() };
    }
    let stored = keyring.seal(Place::WebhookHeaders(request.id), headers.to_string().as_bytes());
    StoredHeaders { plain: None, sealed: Some(stored.bytes), sealed_with: stored.key_id }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::digest_of_parts;

    #[test]
    fn the_payload_digest_covers_the_address_as_it_was_posted_and_what_is_stored_is_the_parsed_one() {
        let posted = "HTTP:Example.com:80/%7Ea";
        let webhook = WebhookTarget::new(posted.to_owned(), &posted.parse().unwrap(), Secret::new(BTreeMap::new()));
        let request = NewRequest {
            id: Uuid::nil(),
            key: KeyId(Uuid::nil()),
            message: Message::new("m".to_owned()),
            webhook: Some(webhook),
            client_request_id: None,
            traceparent: None,
        };
        let columns = Columns::of(&[request], &Keyring::default());
        let stored_before = digest_of_parts(&[Message::new("m".to_owned()).digest().as_bytes(), posted.as_bytes()]);
        assert_eq!(columns.payloads, [stored_before]);
        assert_eq!(columns.urls, [Some("http://example.com/%7Ea".to_owned())]);
    }
}
