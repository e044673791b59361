-- What a POST costs, and what it costs to keep ten million of them.
--
-- Postgres checks a reference row by row: a look-up, and a lock written on the row that is referred to. Three references of a POST were
-- a third of its time in Postgres, and the one from attempts is in the way of every claim. What they checked holds without them:
--   * a job and its message, and a request and its job, are inserted by one statement, or under the lock of the message's row;
--   * they are deleted by retention alone, under the same lock, and only when nothing refers to them any more;
--   * API keys are never deleted;
--   * an attempt is inserted by the statement that leases its job.
-- Tests that race all of these look for rows that refer to nothing. The reference of a webhook job to its request stays: somebody
-- may ask for a webhook again while its request is being forgotten.
alter table jobs drop constraint jobs_message_digest_fkey;
alter table requests drop constraint requests_sign_job_id_fkey;
alter table requests drop constraint requests_api_key_id_fkey;
alter table attempts drop constraint attempts_job_id_fkey;

comment on column jobs.message_digest is 'What a sign job signs: a row of messages.';
comment on column requests.sign_job_id is 'The job whose end is this request''s end: a row of jobs.';
comment on column requests.api_key_id is 'Who posted it: a row of api_keys.';
comment on column attempts.job_id is 'Whose attempt it is: a row of jobs.';

-- The jobs of a message are the one that signed it (messages.signed_by), the one that is live (jobs_one_live_sign_job_per_message), and
-- those that failed. Only the last need an index of their own, which is small; the one over all jobs was as large as that of messages, and
-- digests land anywhere in it.
create index jobs_failed_by_message on jobs (message_digest) where kind = 'sign' and state = 'failed';
drop index jobs_of_message;

-- A claim takes the slots that are free for the longest. With ten of them any way will do; a budget of thousands of calls in a window has
-- as many rows, and they were all read and sorted by every claim.
create index upstream_slots_by_time on upstream_slots (free_at, slot) where not retired;
