-- What a claim costs. It moved next_run_at, by which the queue is ordered, and with it came a new entry in every index of jobs; and it
-- opened an attempt that the finish looked up and wrote anew. Now a lease stands in columns of its own, which no index knows, so that
-- Postgres can write the leased row beside the old one and leave the indexes alone (a HOT update); and an attempt is written once, when it
-- ends: by the finish, or by the claim that finds a lease which ran out.

alter table jobs add column leased_at timestamptz;
alter table jobs add column leased_until timestamptz;
update jobs
set leased_until = next_run_at,
    leased_at = coalesce((select started_at from attempts where job_id = jobs.id and number = jobs.attempt), now()),
    next_run_at = least(created_at, coalesce((select started_at from attempts where job_id = jobs.id and number = jobs.attempt), now()))
where lease_token is not null;

-- A worker of the version before would take what is leased for what is due. Its claims break one of these, so it claims nothing any more;
-- what it has, it finishes.
alter table jobs add constraint leases_begin_and_end check (lease_token is null or leased_at is not null and leased_until is not null);
alter table jobs add constraint only_due_jobs_are_leased check (lease_token is null or next_run_at <= leased_at);

-- Followed from the number of attempts, which every claim counts up.
alter table jobs alter column lane drop expression;
alter table jobs alter column lane set default 0;

-- Room for the leased version of each job, and for the signature of each message. Without it, a new version needs a new entry in every index,
-- and digests land anywhere in theirs: with ten million messages that is another page to write for each signature.
alter table jobs set (fillfactor = 50);
alter table messages set (fillfactor = 50);

comment on table jobs is 'The queue. A pending row whose next_run_at has come, and which nobody has a lease on that is not over, may be claimed.';
comment on column jobs.next_run_at is 'When a worker may take the job, if nobody has it.';
comment on column jobs.attempt is 'Attempts started, ever. Numbers the rows of attempts.';
comment on column jobs.lane is 'Of sign jobs: 0: never tried, as far as anybody knows; 1: a retry. Ordered first by the claim.';
comment on column jobs.lease_token is 'Fencing token of the worker that has the job; null: nobody. Every write of a worker names its token.';
comment on column jobs.leased_at is 'When it was leased last.';
comment on column jobs.leased_until is 'When that lease ends: from then on anybody may take the job, whose token is still there. Means nothing without a token.';
comment on table attempts is 'One row per call made, written when it has ended. One whose worker died is written by the next claim of the job, and reads: outcome unknown. The one that is under way is in jobs.';
comment on column attempts.number is 'jobs.attempt while it was under way.';
comment on column attempts.outcome is 'How it ended; null for ever if the worker died.';
