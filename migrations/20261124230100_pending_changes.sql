-- The count of unfinished requests was kept in sixteen rows, which every group of POSTs and every group of results wrote anew. While some
-- transaction holds back the vacuum, each writing leaves a row behind that all later ones step over, and within minutes that was most of
-- their time. A row that is only ever added costs the same whatever else goes on.

create table pending_changes (
    id bigint generated always as identity primary key,
    requests bigint not null
);

comment on table pending_changes is 'The number of unfinished requests is the sum over all rows, and over those of pending_requests. Written in the transaction that changes it; every now and then many rows become one.';
comment on column pending_changes.requests is 'Accepted less finished.';
comment on table pending_requests is 'As much of the number of unfinished requests as processes of the version before count.';
