-- A finish asked Postgres four times: begin, lock the messages, write, commit. It locked them first because a statement sees only what was
-- committed before it began, and a POST may attach a request to the job in between. Now a job counts the requests that were attached to it.
-- A statement that finds fewer than the job says has missed one, and leaves the job to a second try, which locks first.

alter table jobs add column requests integer not null default 1;
update jobs j set requests = (select count(*) from requests r where r.sign_job_id = j.id) where kind = 'sign' and state = 'pending';

comment on column jobs.requests is 'Of sign jobs: how many requests were attached while it was pending. Says whether a finish saw all of them; nothing else is decided by it.';
