-- The budget of upstream calls, shared by every worker. See ARCHITECTURE.md, "Slots", for why two uses of a slot can never reach the
-- upstream less than a window apart.

create table upstream (
    only_row boolean primary key default true,
    calls integer not null,
    window_length interval not null,
    paused_until timestamptz not null default '-infinity',
    breaker_failures integer not null default 0,
    breaker_reason text,
    probe_at timestamptz,
    constraint there_is_one_upstream check (only_row),
    constraint a_window_has_calls_and_length check (calls > 0 and window_length > interval '0'),
    constraint breaker_is_open_iff_it_has_failures check (
        (probe_at is null) = (breaker_failures = 0) and (probe_at is null) = (breaker_reason is null)
    )
);

comment on table upstream is 'What all workers know about the upstream: the agreed rate, a pause it asked for, the circuit breaker.';
comment on column upstream.calls is 'Calls allowed in any window; as many rows has upstream_slots.';
comment on column upstream.window_length is 'Length of the window.';
comment on column upstream.paused_until is 'No call before this time: the upstream answered 429 with Retry-After.';
comment on column upstream.breaker_failures is 'Failures in a row that say something about the upstream, not about a message; 0: closed.';
comment on column upstream.breaker_reason is 'Stable class of the last such failure.';
comment on column upstream.probe_at is 'When one worker may try one call; null: the breaker is closed.';

create table upstream_slots (
    slot integer primary key,
    free_at timestamptz not null default '-infinity',
    uses bigint not null default 0,
    lease_token uuid,
    retired boolean not null default false
) with (fillfactor = 50);

comment on table upstream_slots is 'One row per call that the budget allows in a window.';
comment on column upstream_slots.free_at is 'When the slot may be used again: after a claim, the end of the lease plus the window; after the response, that time plus the window.';
comment on column upstream_slots.uses is 'Times used; every so many uses the slot prefers a retry to a first try, which is the guaranteed share of retries.';
comment on column upstream_slots.retired is 'Taken away when the rate was lowered; kept, so that raising it again does not forget when it was used.';
comment on column upstream_slots.lease_token is 'The lease that uses it, so that only its holder can bring free_at forward.';
