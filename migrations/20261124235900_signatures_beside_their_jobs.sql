-- A finish wrote two rows for each signature: the job, and the message, whose new version came with an entry in the index of digests, which
-- land anywhere in it; and it locked the message before. The signature now stands in the job that obtained it, which is written anyway when
-- it ends. A message is written once, and whoever attaches a request to a job locks the job in place of the message.

-- All rows are joined; sessions of this program are told to do everything by indexes.
set local enable_seqscan = on;
set local enable_mergejoin = on;

alter table jobs add column signature bytea;
update jobs set signature = messages.signature from messages where messages.signed_by = jobs.id;
alter table jobs add constraint signature_iff_signed check ((signature is not null) = (kind = 'sign' and state = 'succeeded'));

alter table messages drop column signature, drop column signed_at, drop column signed_by;
alter table messages reset (fillfactor);

create unique index jobs_one_signature_per_message on jobs (message_id) where kind = 'sign' and state = 'succeeded';

-- In tables that nobody had analyzed, either of these looked as good for what the other is there for, and then each claim, or each look-up of a
-- message, read all of it. Now who does not name a message can't use the one, and who does not name a time can't use the other.
drop index jobs_one_live_sign_job_per_message, jobs_due;
create unique index jobs_one_live_sign_job_per_message on jobs (message_id)
    where kind = 'sign' and state = 'pending' and message_id is not null;
create index jobs_due on jobs (kind, lane, next_run_at, id) where state = 'pending' and next_run_at is not null;

alter table jobs rename column requests to attached;

comment on table messages is 'One row per distinct message, written once.';
comment on column jobs.signature is 'Of sign jobs: the upstream''s answer, byte for byte, obtained at finished_at. A message that has one is never sent upstream again; who posts it then is attached to the job that obtained it.';
