-- How many requests are unfinished, so that there can be a most. Counted where it changes, in the transaction that changes it; in
-- several rows, so that transactions which run at the same time seldom wait for each other.

create table pending_requests (
    shard integer primary key,
    requests bigint not null default 0
) with (fillfactor = 20);

insert into pending_requests (shard) select generate_series(0, 15);
update pending_requests
set requests = (select count(*) from requests r join jobs j on j.id = r.sign_job_id where j.state = 'pending')
where shard = 0;

comment on table pending_requests is 'The number of unfinished requests is the sum over all rows.';
comment on column pending_requests.shard is 'A session counts in a row that no other holds at the moment.';
comment on column pending_requests.requests is 'Accepted less finished, as counted in this row; below zero where more were finished than accepted.';
