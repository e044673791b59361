-- The count of unfinished requests was the sum of two tables while processes that knew only the first of them could be at work.
insert into pending_changes (requests) select sum(requests) from pending_requests having sum(requests) <> 0;
drop table pending_requests;

comment on table pending_changes is 'The number of unfinished requests is the sum over all rows. Written in the transaction that changes it; every now and then many rows become one.';
