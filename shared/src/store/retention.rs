//! Deletes what is old enough.
//!
//! `offset 0` leaves the planner no choice but one index lookup per row: see `plans.rs` among the tests.

use std::time::Duration;

use super::{Result, Store, count, seconds};

impl Store {
    /// Deletes up to `most` requests that ended longer than `age` ago, with their webhook jobs, and with the sign jobs and messages that no
    /// request refers to any more. Returns how many requests it deleted. Fewer than `most` normally means that nothing is left to delete.
    ///
    /// A signature is deleted with the last request for it. If the message is posted again, it is signed again.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn delete_ended_requests(&self, age: Duration, most: u32) -> Result<u32> {
        let mut transaction = self.database.begin().await?;
        let ids = sqlx::query_scalar!(
            r#"-- retention.pick
            select r.id
            from requests r
            cross join lateral (
                select from jobs
                where id = r.sign_job_id and state <> 'pending' and finished_at < now() - make_interval(secs => $1)
                offset 0
            ) s
            left join lateral (select state, finished_at from jobs where request_id = r.id and kind = 'webhook' offset 0) w on true
            where r.created_at < now() - make_interval(secs => $1)
                and (w.state is null or w.state <> 'pending' and w.finished_at < now() - make_interval(secs => $1))
            order by r.created_at
            limit $2
            for update of r skip locked"#,
            seconds(age),
            i64::from(most),
        )
        .fetch_all(&mut transaction)
        .await?;
        if ids.is_empty() {
            return Ok(0);
        }
        // Before the rows were locked, someone may have asked to send a webhook again: webhook jobs that wait to be sent stay.
        sqlx::query!(
            "-- retention.webhook_jobs
            with forgotten as (
                delete from jobs where kind = 'webhook' and request_id = any($1) and state <> 'pending' returning id
            )
            delete from attempts where job_id in (select id from forgotten)",
            &ids,
        )
        .execute(&mut transaction)
        .await?;
        let sign_jobs = sqlx::query_scalar!(
            "-- retention.requests
            delete from requests r
            where r.id = any($1) and not exists (select from jobs w where w.request_id = r.id and w.kind = 'webhook' offset 0)
            returning r.sign_job_id",
            &ids,
        )
        .fetch_all(&mut transaction)
        .await?;
        // The message is locked before it is checked, so that no POST attaches to a job that is about to be deleted (see `accept`). This
        // waits for other holders of the lock: another one may be deleting too, and the last of the two has to see that nothing refers to
        // the message any more.
        let messages = sqlx::query_scalar!(
            r#"-- retention.lock_messages
            select id from messages
            where id in (select message_id from jobs where id = any($1))
            order by digest for update"#,
            &sign_jobs,
        )
        .fetch_all(&mut transaction)
        .await?;
        sqlx::query!(
            "-- retention.sign_jobs
            with forgotten as (
                delete from jobs j
                where j.id = any($1) and j.message_id = any($2) and not exists (select from requests r where r.sign_job_id = j.id offset 0)
                returning id
            )
            delete from attempts where job_id in (select id from forgotten)",
            &sign_jobs,
            &messages,
        )
        .execute(&mut transaction)
        .await?;
        sqlx::query!(
            "-- retention.messages
            delete from messages m
            where m.id = any($1)
                and not exists (select from jobs j where j.message_id = m.id and j.kind = 'sign' and j.state = 'pending' offset 0)
                and not exists (select from jobs j where j.message_id = m.id and j.kind = 'sign' and j.state = 'succeeded' offset 0)
                and not exists (select from jobs j where j.message_id = m.id and j.kind = 'sign' and j.state = 'failed' offset 0)",
            &messages,
        )
        .execute(&mut transaction)
        .await?;
        transaction.commit().await?;
        Ok(count(sign_jobs.len()))
    }

    /// Deletes up to `most` receivers that have no webhook waiting and have not changed for longer than `age`. Returns how many.
    ///
    /// # Errors
    /// If the statement fails.
    pub async fn delete_idle_receivers(&self, age: Duration, most: u32) -> Result<u32> {
        let deleted = sqlx::query!(
            "-- retention.receivers
            delete from receivers where receiver in (
                select r.receiver from receivers r
                where r.changed_at < now() - make_interval(secs => $1)
                    and not exists (
                        select from jobs j where j.kind = 'webhook' and j.state = 'pending' and j.receiver = r.receiver offset 0
                    )
                order by r.changed_at
                limit $2
                for update skip locked
            )",
            seconds(age),
            i64::from(most),
        )
        .execute(&self.database)
        .await?;
        Ok(count(deleted.rows_affected()))
    }

    /// Deletes up to `most` webhook secrets whose grace period is over. Returns how many.
    ///
    /// # Errors
    /// If the statement fails.
    pub async fn delete_retired_secrets(&self, most: u32) -> Result<u32> {
        let deleted = sqlx::query!(
            "-- retention.secrets
            delete from retired_webhook_secrets where id in (
                select id from retired_webhook_secrets where signs_until < now() order by id limit $1 for update skip locked
            )",
            i64::from(most),
        )
        .execute(&self.database)
        .await?;
        Ok(count(deleted.rows_affected()))
    }
}
