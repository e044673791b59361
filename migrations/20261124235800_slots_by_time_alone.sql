-- Each use of a slot writes its row twice, and with it an entry in every index. In a unique one Postgres looks at all entries of the same number
-- first, to see whether they are dead; of a large budget under a transaction that holds back the vacuum, these are hundreds within minutes, and
-- most of what a claim did. Claims and finishes no longer ask by number, and numbers are given in one place, by one at a time (see `join_workers`).
alter table upstream_slots drop constraint upstream_slots_pkey;
alter table upstream_slots replica identity full;
