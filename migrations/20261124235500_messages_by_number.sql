-- A digest lands anywhere in its index, and with ten million messages that is a gigabyte. A POST has to go there: it is how a message is known
-- again. But claims and finishes went there too, and each live job had a second entry by digest. They now go by a number that ascends with time,
-- so that what they touch lies close together.

-- All rows are joined; sessions of this program are told to do everything by indexes.
set local enable_seqscan = on;
set local enable_mergejoin = on;

alter table messages drop constraint messages_pkey;
alter table messages add column id bigint generated always as identity primary key;
alter table messages add constraint messages_are_distinct unique (digest);

alter table jobs add column message_id bigint;
update jobs set message_id = messages.id from messages where messages.digest = jobs.message_digest;
-- With it go what was built on it: two indexes and the check.
alter table jobs drop column message_digest;
alter table jobs add constraint sign_jobs_have_a_message_and_webhook_jobs_a_request check (
    (kind = 'sign') = (message_id is not null) and (kind = 'webhook') = (request_id is not null)
);
create unique index jobs_one_live_sign_job_per_message on jobs (message_id) where kind = 'sign' and state = 'pending';
create index jobs_failed_by_message on jobs (message_id) where kind = 'sign' and state = 'failed';

comment on column messages.id is 'What jobs call it by.';
comment on column messages.digest is 'SHA-256 of body: how a message is known again.';
comment on column jobs.message_id is 'What a sign job signs.';
