-- An api refuses an address that no webhook may be sent to at once. What the operator allows is a setting of the worker, which is the one that
-- sends: it says so here, so that an api need not be told the same.

create table webhook_addresses (
    only_row boolean primary key default true,
    networks text[] not null,
    ports integer[] not null,
    constraint there_is_one_answer check (only_row),
    constraint ports_are_ports check (0 < all (ports) and 65535 >= all (ports))
);

comment on table webhook_addresses is 'What the worker that started last lets webhooks go to, besides the public internet. Asked by an api before it refuses an address; who sends asks its own settings.';
comment on column webhook_addresses.only_row is 'True: there is one row.';
comment on column webhook_addresses.networks is 'WEBHOOK_ALLOW_NETWORKS.';
comment on column webhook_addresses.ports is 'WEBHOOK_ALLOW_PORTS.';

-- What had no comment yet.
comment on column api_keys.id is 'What requests call it by; UUID version 7.';
comment on column api_keys.created_at is 'When it was made.';
comment on column jobs.id is 'Ascends with time, nearly: the order among jobs that are due at the same moment.';
comment on column jobs.kind is 'sign: call the upstream; webhook: tell a receiver.';
comment on column jobs.state is 'pending until it succeeded, or failed for good.';
comment on column jobs.created_at is 'When it was inserted. SIGN_DEADLINE counts from it.';
comment on column jobs.finished_at is 'When it succeeded or failed; null while pending.';
comment on column requests.id is 'What callers call it by; UUID version 7, made by the api.';
comment on column requests.webhook_url is 'Where its outcome is sent; null: nowhere.';
comment on column requests.created_at is 'When it was stored. RETENTION counts from it.';
comment on column attempts.started_at is 'When the job was leased for it.';
comment on column attempts.finished_at is 'When its outcome was written; null for ever if the worker died.';
comment on column upstream.only_row is 'True: there is one row.';
comment on column upstream_slots.slot is 'Counted from 1.';
comment on column retired_webhook_secrets.id is 'Ascends with time.';
comment on column retired_webhook_secrets.api_key_id is 'Whose it was: a row of api_keys.';
comment on column encryption_keys.first_used_at is 'When a process was first started with it.';
comment on column pending_changes.id is 'Ascends with time.';
