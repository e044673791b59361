//! Ends the webhooks of receivers that have been down for too long.

use std::time::Duration;

use super::receivers::WATCHED_WITHIN;
use super::webhook_finish::WebhookFailure;
use super::{Result, Store, count, seconds};

impl Store {
    /// Ends up to `most` webhook jobs that have been due for longer than `age`, if their receivers were observed to fail for as long. A
    /// receiver that is down is probed so rarely that not each of its webhooks gets its attempts. The jobs are exhausted, and kept. While
    /// no worker was running to probe it, no receiver counts as lost: its probe is overdue then, and the next probe begins a new period of
    /// failures.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn exhaust_webhooks_of_lost_receivers(&self, age: Duration, most: u32) -> Result<u32> {
        let ended = sqlx::query_scalar!(
            r#"-- webhook.exhaust
            with due as materialized (
                select j.id, j.lost_since
                from receivers r
                cross join lateral (
                    select id, case when lease_token is not null then leased_at end as lost_since from jobs
                    where kind = 'webhook' and state = 'pending' and receiver = r.receiver and next_run_at < now() - make_interval(secs => $1)
                        and (lease_token is null or leased_until < now() - make_interval(secs => $1))
                    order by next_run_at, id
                    limit $2
                    for no key update skip locked
                ) j
                where r.failing_since < now() - make_interval(secs => $1) and r.probe_at > now() - make_interval(secs => $3)
                limit $2
            ),
            ended as (
                update jobs set state = 'failed', failure = $4, finished_at = now(), lease_token = null
                from due
                where jobs.id = any(array[due.id])
                returning jobs.id, jobs.attempt, due.lost_since
            ),
            lost as (
                insert into attempts (job_id, number, started_at)
                select id, attempt, lost_since from ended where lost_since is not null
                on conflict (job_id, number) do nothing
            )
            select count(*) as "ended!" from ended"#,
            seconds(age),
            i64::from(most),
            seconds(WATCHED_WITHIN),
            WebhookFailure::ReceiverDown.code(),
        )
        .fetch_one(&self.database)
        .await?;
        Ok(count(ended))
    }
}
