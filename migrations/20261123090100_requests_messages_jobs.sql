-- The main job. Three tables, because three things have different lives:
--   messages  what is signed: one row per distinct text, written once, completed once with the signature;
--   jobs      what workers do: the only rows that change often, and therefore small ones;
--   requests  what callers posted: one row per POST, immutable. Its state is the state of the sign job it waits for,
--             so finishing a job answers every request that waits for it without touching one of them.
--
-- Lock order, everywhere: messages by digest, then jobs, then requests. Whoever ends a sign job for good, and whoever attaches a
-- request to one, holds the message's row; so no request can attach to a job in the moment it ends.

create type job_kind as enum ('sign', 'webhook');
create type job_state as enum ('pending', 'succeeded', 'failed');

create table messages (
    digest bytea primary key,
    body bytea not null,
    signature bytea,
    signed_at timestamptz,
    signed_by bigint,
    constraint digest_is_sha256 check (octet_length(digest) = 32),
    constraint signed_at_and_by_iff_signature check (
        (signature is null) = (signed_at is null) and (signature is null) = (signed_by is null)
    )
);

comment on table messages is 'One row per distinct message. Once signed, it is never sent upstream again.';
comment on column messages.digest is 'SHA-256 of body; the identity of a message.';
comment on column messages.body is 'The message, byte for byte as posted. bytea, because text cannot hold U+0000.';
comment on column messages.signature is 'The upstream''s answer, byte for byte; null until there is one.';
comment on column messages.signed_by is 'The sign job that obtained the signature; requests answered from here are attached to it.';

create table jobs (
    id bigint generated always as identity primary key,
    kind job_kind not null,
    state job_state not null default 'pending',
    message_digest bytea references messages (digest),
    request_id uuid,
    next_run_at timestamptz not null default now(),
    attempt integer not null default 0,
    excused integer not null default 0,
    lane smallint not null generated always as (case when attempt > excused then 1 else 0 end) stored,
    lease_token uuid,
    failure text,
    traceparent text,
    created_at timestamptz not null default now(),
    finished_at timestamptz,
    constraint sign_jobs_have_a_message_and_webhook_jobs_a_request check (
        (kind = 'sign') = (message_digest is not null) and (kind = 'webhook') = (request_id is not null)
    ),
    constraint attempts_are_counted_from_zero check (attempt >= excused and excused >= 0),
    constraint only_pending_jobs_are_leased check (lease_token is null or state = 'pending'),
    constraint finished_at_iff_not_pending check ((finished_at is null) = (state = 'pending')),
    constraint failure_iff_failed check ((failure is not null) = (state = 'failed'))
);

comment on table jobs is 'The queue. A pending row whose next_run_at has come may be claimed.';
comment on column jobs.message_digest is 'What a sign job signs.';
comment on column jobs.request_id is 'Whose outcome a webhook job delivers.';
comment on column jobs.next_run_at is 'When a worker may take the job: its due time, or, while it is leased, the end of the lease. One column for both makes an expired lease and a due retry the same thing to the claim.';
comment on column jobs.attempt is 'Attempts started, ever. Numbers the rows of attempts.';
comment on column jobs.excused is 'Attempts that do not count: the upstream was unavailable, or the worker gave the job back.';
comment on column jobs.lane is '0: never tried (no attempt that counts); 1: a retry. Ordered first by the claim.';
comment on column jobs.lease_token is 'Fencing token of the worker that has the job; null: nobody. Every write of a worker names its token.';
comment on column jobs.failure is 'Stable code of why the job failed for good.';
comment on column jobs.traceparent is 'W3C trace context of the request that made the job, so that attempts continue the caller''s trace across restarts.';

create table requests (
    id uuid primary key,
    api_key_id uuid not null references api_keys (id),
    sign_job_id bigint not null references jobs (id),
    client_request_id text,
    payload_digest bytea not null,
    webhook_url text,
    webhook_headers jsonb,
    traceparent text,
    created_at timestamptz not null default now(),
    constraint client_request_id_is_1_to_128_characters check (char_length(client_request_id) between 1 and 128),
    constraint payload_digest_is_sha256 check (octet_length(payload_digest) = 32),
    constraint webhook_headers_need_a_url check (webhook_headers is null or webhook_url is not null)
);

alter table jobs add constraint jobs_request_id_fkey foreign key (request_id) references requests (id);

comment on table requests is 'The log of requests: one immutable row per accepted POST.';
comment on column requests.sign_job_id is 'The job whose end is this request''s end.';
comment on column requests.client_request_id is 'Idempotency key, unique per API key.';
comment on column requests.payload_digest is 'SHA-256 over message, webhook URL and headers: tells a repeated request from another one under the same idempotency key.';
comment on column requests.traceparent is 'W3C trace context of the POST.';

-- The hot index: workers walk it in order, one range per lane (see ARCHITECTURE.md, "What to try next"). Finished jobs leave it.
create index jobs_due on jobs (kind, lane, next_run_at, id) where state = 'pending';

-- At most one upstream call in flight per message follows from at most one live job per message.
create unique index jobs_one_live_sign_job_per_message on jobs (message_digest) where kind = 'sign' and state = 'pending';
create unique index jobs_one_webhook_per_request on jobs (request_id) where kind = 'webhook';
create unique index requests_idempotency on requests (api_key_id, client_request_id) where client_request_id is not null;
create index requests_by_sign_job on requests (sign_job_id);

-- What retention walks, oldest first, and how it sees that nothing refers to a message any more.
create index requests_by_age on requests (created_at);
create index jobs_by_message on jobs (message_digest) where kind = 'sign';

create table attempts (
    job_id bigint not null references jobs (id) on delete cascade,
    number integer not null,
    started_at timestamptz not null default now(),
    finished_at timestamptz,
    outcome text,
    status smallint,
    error text,
    primary key (job_id, number),
    constraint outcome_iff_finished check ((outcome is null) = (finished_at is null)),
    constraint outcomes_are_known check (outcome in ('succeeded', 'try_again', 'refused', 'unavailable', 'released'))
);

comment on table attempts is 'One row per call made, opened in the claim that allowed it. A row left open by a crash reads: outcome unknown.';
comment on column attempts.number is 'jobs.attempt at the time of the claim.';
comment on column attempts.outcome is 'How it ended; null while it runs, and for ever if the worker died.';
comment on column attempts.status is 'HTTP status that was answered; null when none was.';
comment on column attempts.error is 'Stable class of what went wrong: timeout, connection, reset, status, body, ...';
