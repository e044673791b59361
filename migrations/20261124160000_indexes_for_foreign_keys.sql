-- When a request or a message is deleted, Postgres looks for jobs that refer to it, with nothing but the reference: an index whose
-- condition is about the kind of job is of no use to it, and it would read all jobs for each row that goes. These hold the same rows.

create unique index jobs_one_per_told_request on jobs (request_id) where request_id is not null;
drop index jobs_one_webhook_per_request;

create index jobs_of_message on jobs (message_digest) where message_digest is not null;
drop index jobs_by_message;
