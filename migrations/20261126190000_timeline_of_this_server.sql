-- Which timeline a server is on is asked in several statements, so it has a name. It is in the name of the current WAL file;
-- pg_control_checkpoint() would tell it only after the first checkpoint that follows a failover.

create function server_timeline() returns text
language sql volatile as $$ select substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) $$;

comment on function server_timeline is 'The timeline of this server: another one after each failover.';

comment on trigger webhook_jobs_know_their_receiver on jobs is 'For the inserts of earlier versions: since this one, inserts say whom a webhook job tells.';
