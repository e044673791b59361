-- Who may call. The key itself is shown once and never stored: a row holds its SHA-256 digest. 256 random bits need no slow hash.

create table api_keys (
    id uuid primary key,
    name text not null,
    digest bytea not null unique,
    scopes text[] not null,
    webhook_secret bytea not null,
    created_at timestamptz not null default now(),
    expires_at timestamptz,
    revoked_at timestamptz,
    constraint name_is_1_to_64_characters check (char_length(name) between 1 and 64),
    constraint digest_is_sha256 check (octet_length(digest) = 32),
    constraint scopes_are_known check (scopes <@ array['sign', 'admin'] and cardinality(scopes) > 0),
    constraint webhook_secret_is_24_to_64_bytes check (octet_length(webhook_secret) between 24 and 64)
);

create unique index api_keys_one_live_key_per_name on api_keys (name) where revoked_at is null;

comment on table api_keys is 'One row per API key. Never deleted, only revoked, so that a request can always name who posted it.';
comment on column api_keys.name is 'What an operator calls the key; unique among keys that are not revoked.';
comment on column api_keys.digest is 'SHA-256 of the key as it is sent in X-API-Key.';
comment on column api_keys.scopes is 'What the key may do: sign (post and read its own requests), admin (read every request).';
comment on column api_keys.webhook_secret is 'Bytes of the Standard Webhooks secret, without the whsec_ prefix and the base64.';
comment on column api_keys.expires_at is 'The key is refused from this time on; null: never.';
comment on column api_keys.revoked_at is 'When an operator revoked it; null: live.';
