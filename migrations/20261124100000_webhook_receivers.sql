-- Webhooks are claimed receiver by receiver, so that the jobs of one that is dead or slow are not in the way of the others'. For that a
-- job has to know its receiver, and what is known about a receiver needs a row.
--
-- A receiver is the scheme, host and port of an address, for one API key. Not the whole address, because what dies is a host; and not the
-- host for everybody, because then a tenant could make somebody else's receiver look dead.

create function receiver_of(api_key_id uuid, url text) returns uuid
language sql stable strict as $$
    select encode(substring(sha256(convert_to(
        api_key_id::text || ' ' || lower(coalesce(substring(url from '^[^:/?#]+://[^/?#]+'), url)), 'UTF8'
    )) for 16), 'hex')::uuid
$$;

comment on function receiver_of is 'The receiver of an address: the first 128 bits of SHA-256 over the API key, scheme, host and port. A short key of fixed size, because jobs are ordered by it.';

alter table jobs add column receiver uuid;
comment on column jobs.receiver is 'Whom a webhook job tells, by receiver_of; null for sign jobs. Copied from the request, because the claim orders by it.';

update jobs set receiver = receiver_of(r.api_key_id, r.webhook_url)
from requests r where r.id = jobs.request_id and jobs.kind = 'webhook' and jobs.state = 'pending';

alter table jobs add constraint pending_webhook_jobs_have_a_receiver
    check (kind <> 'webhook' or state <> 'pending' or receiver is not null);

-- A trigger, and not one more column in each insert: processes of the version before go on inserting while this one starts.
create function set_receiver() returns trigger
language plpgsql as $$
begin
    select receiver_of(r.api_key_id, r.webhook_url) into new.receiver from requests r where r.id = new.request_id;
    return new;
end
$$;

create trigger webhook_jobs_know_their_receiver before insert on jobs
for each row when (new.kind = 'webhook' and new.receiver is null) execute function set_receiver();

-- The claim goes from receiver to receiver in this index, one step each, and sees with the same step when its first job is due.
create index jobs_by_receiver on jobs (receiver, next_run_at, id) where kind = 'webhook' and state = 'pending';

create table receivers (
    receiver uuid primary key,
    failures integer not null default 1,
    slow boolean not null default false,
    probe_at timestamptz not null default now(),
    failing_since timestamptz default now(),
    changed_at timestamptz not null default now(),
    constraint failures_are_counted_from_zero check (failures >= 0),
    constraint failing_since_iff_failures check ((failing_since is null) = (failures = 0))
);

comment on table receivers is 'A circuit breaker for each receiver of webhooks, shared by all workers. Written only when a receiver changes between working, slow and failing.';
comment on column receivers.receiver is 'As in jobs.receiver.';
comment on column receivers.failures is 'Failures in a row; those of deliveries that were in flight together count once. 0: it works, and several deliveries at a time go to it. Above: one at a time, and from the third on ever less often. Begins with 1: a receiver that nobody knows has to show first that it works.';
comment on column receivers.slow is 'Its last answer took so long that several deliveries at a time would hold calls that others wait for: one at a time goes to it.';
comment on column receivers.probe_at is 'While it fails: when the next delivery may be tried; while that one is in flight, the end of its lease.';
comment on column receivers.failing_since is 'When the first of these failures was, or of those since somebody watched again; null while it works.';
comment on column receivers.changed_at is 'When this row last changed, so that it can be forgotten.';

-- For those that nobody needs any more.
create index receivers_by_change on receivers (changed_at);
