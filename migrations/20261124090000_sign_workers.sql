-- Workers of one upstream must not mix rates: each one that calls it says so here, and with which rate, while it lives.

create table sign_workers (
    id uuid primary key,
    calls integer not null,
    window_length interval not null,
    seen_at timestamptz not null default now(),
    constraint a_window_has_calls_and_length check (calls > 0 and window_length > interval '0')
) with (fillfactor = 50);

comment on table sign_workers is 'The workers that call the upstream. A row whose worker has not been seen for a while is a worker that was killed.';
comment on column sign_workers.id is 'Made by the worker at its start.';
comment on column sign_workers.calls is 'Calls allowed in any window, as this worker was told.';
comment on column sign_workers.window_length is 'Length of the window, as this worker was told.';
comment on column sign_workers.seen_at is 'When the worker last said that it lives.';

-- The window stands beside the slot, because a claim that began before the rate was changed and got its slot after reads its slot anew,
-- but nothing else.
alter table upstream_slots add column window_length interval;
update upstream_slots set window_length = (select window_length from upstream);
alter table upstream_slots alter column window_length set not null;
-- For a slot that a worker of the version before adds: the longest window there can be, until a worker of this version says which it is.
alter table upstream_slots alter column window_length set default interval '24 hours';
comment on column upstream_slots.window_length is 'Length of the window of the agreed rate: how long after the response the slot is free again.';

alter table upstream add column breaker_at timestamptz;
update upstream set breaker_at = now() where probe_at is not null;
comment on column upstream.breaker_at is 'When the last failure that opened the circuit breaker, or kept it open, was noticed. Means nothing while probe_at is null; workers of the version before do not write it.';

alter table upstream add column timeline text;
comment on column upstream.timeline is 'Timeline of the server by whose clock free_at of the slots was last set. Another one means that a standby has taken over, whose clock may be ahead: slots then wait as if they had just been used.';
