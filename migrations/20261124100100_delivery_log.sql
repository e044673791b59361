-- What receivers answered, for the tenants who ask why a webhook did not arrive.
--
-- In `attempts`, which has a row for each delivery already, opened by the claim and closed by the finish. A table of its own would double
-- the writes of the path that has to be fast, and could disagree with this one about how often something was sent. The new columns are
-- null for calls of the upstream: its answers are nobody's business but the signature's.

alter table attempts add column duration_ms integer;
alter table attempts add column response bytea;
alter table attempts add constraint responses_are_at_most_2_kib check (octet_length(response) <= 2048);
alter table attempts add constraint durations_are_not_negative check (duration_ms >= 0);

comment on column attempts.duration_ms is 'How long a delivery took, in milliseconds, from the look-up of the name to the end of the answer. Null for calls of the upstream.';
comment on column attempts.response is 'The first bytes of what a receiver answered; null when it answered nothing, and for calls of the upstream.';
