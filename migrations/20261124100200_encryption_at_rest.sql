-- Webhook secrets and the headers that callers want sent along can be encrypted (ENCRYPTION_KEY). A value is plain if it names no key, so
-- rows from before stay readable; or AES-256-GCM: 12 bytes of nonce, the ciphertext, 16 bytes of tag, bound to what it is and whose.

alter table api_keys add column webhook_secret_key_id text;
alter table api_keys drop constraint webhook_secret_is_24_to_64_bytes;
alter table api_keys add constraint webhook_secret_is_24_to_64_bytes check (
    octet_length(webhook_secret) - case when webhook_secret_key_id is null then 0 else 28 end between 24 and 64
);
comment on column api_keys.webhook_secret is 'Bytes of the Standard Webhooks secret, without the whsec_ prefix and the base64; encrypted if webhook_secret_key_id is set.';
comment on column api_keys.webhook_secret_key_id is 'Encryption key of webhook_secret; null: it is plain.';

create table retired_webhook_secrets (
    id bigint generated always as identity primary key,
    api_key_id uuid not null references api_keys (id),
    secret bytea not null,
    secret_key_id text,
    signs_until timestamptz not null,
    constraint secret_is_24_to_64_bytes check (
        octet_length(secret) - case when secret_key_id is null then 0 else 28 end between 24 and 64
    )
);
create index retired_webhook_secrets_by_key on retired_webhook_secrets (api_key_id);

comment on table retired_webhook_secrets is 'Webhook secrets that were replaced. Until their grace is over, webhooks are signed with them too, so that receivers can change at their own time.';
comment on column retired_webhook_secrets.secret is 'As api_keys.webhook_secret; encrypted for the same place, so that a rotation can move it.';
comment on column retired_webhook_secrets.secret_key_id is 'Encryption key of secret; null: it is plain.';
comment on column retired_webhook_secrets.signs_until is 'From this time on it is not used any more.';

alter table requests add column sealed_webhook_headers bytea;
alter table requests add column webhook_headers_key_id text;
alter table requests add constraint webhook_headers_are_plain_or_sealed check (webhook_headers is null or sealed_webhook_headers is null);
alter table requests add constraint sealed_headers_iff_key check ((sealed_webhook_headers is null) = (webhook_headers_key_id is null));
comment on column requests.webhook_headers is 'Headers to be sent along with the webhook, as they are; null if there are none, or if they are encrypted.';
comment on column requests.sealed_webhook_headers is 'The same, encrypted.';
comment on column requests.webhook_headers_key_id is 'Encryption key of sealed_webhook_headers.';
comment on column requests.payload_digest is 'Over message, webhook URL and headers: tells a repeated request from another one under the same idempotency key. SHA-256; HMAC-SHA256 where there are headers and an encryption key, so that nobody who reads it can try out headers.';

-- How many requests still need a key that is to be removed.
create index requests_by_encryption_key on requests (webhook_headers_key_id) where webhook_headers_key_id is not null;

create table encryption_keys (
    id text primary key,
    proof bytea not null,
    first_used_at timestamptz not null default now(),
    constraint id_is_1_to_32_characters check (char_length(id) between 1 and 32)
);
comment on table encryption_keys is 'The encryption keys that were ever the first of ENCRYPTION_KEY, so that a process that lacks one says so when it starts and not when it sends. The keys themselves are not here.';
comment on column encryption_keys.id is 'What the key is called in ENCRYPTION_KEY.';
comment on column encryption_keys.proof is 'Something encrypted with it, by which another key under the same name is recognised.';
