-- Every statement that inserts a webhook job names its receiver, and has for several versions.
drop trigger webhook_jobs_know_their_receiver on jobs;
drop function set_receiver();

comment on column requests.created_at is 'When it was stored. RETENTION counts from the end of its jobs, or from this if it is later.';
comment on column jobs.excused is
    'Attempts that do not count: the upstream was unavailable, no call was made, the lease of a webhook expired, or the webhook is sent again from the start.';
comment on column jobs.lane is
    'Of sign jobs: 0: to be tried first; 1: after a retry, a lost lease or a refusal that looked like one of every message. Ordered first by the claim. Of webhook jobs: 0.';
