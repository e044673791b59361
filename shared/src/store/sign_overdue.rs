//! Claims sign jobs that are past their deadline, in order to end them.

use std::time::Duration;

use super::lease::ClaimSentAt;
use super::{JobId, Lease, Result, Store, StoreError, seconds};
use crate::message::MessageDigest;

/// Which waiting jobs are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scan {
    /// Those at the beginning of the queue. A job that was never tried is usually due since it was posted, so the old ones are there.
    /// Retries, and jobs that met an upstream that was down, are due since later, and are not found.
    OfThoseDueFirst,
    /// Every waiting job. The statement reads all of them.
    Full,
}

impl Store {
    /// Claims up to `most` sign jobs that are older than `deadline`, in order to end them. Takes no slots, because no call is made. It also
    /// finds jobs that no claim reaches because the upstream has been down for so long.
    ///
    /// # Errors
    /// If a statement fails.
    pub async fn claim_overdue_sign_jobs(
        &self,
        deadline: Duration,
        scan: Scan,
        most: u32,
        lease: Duration,
    ) -> Result<Vec<(Lease, MessageDigest)>> {
        let sent_at = ClaimSentAt::now();
        let rows = sqlx::query!(
            r#"-- sign.claim_overdue
            with overdue as materialized (
                select id, case when lease_token is not null then leased_at end as lost_since from jobs
                where id = any(array(
                    (select id from jobs
                        where kind = 'sign' and state = 'pending' and lane = 0
                            and next_run_at < case when $4 then 'infinity' else now() - make_interval(secs => $1) end
                            and created_at < now() - make_interval(secs => $1) and (lease_token is null or leased_until <= now())
                        limit $2)
                    union all
                    (select id from jobs
                        where kind = 'sign' and state = 'pending' and lane = 1
                            and next_run_at < case when $4 then 'infinity' else now() - make_interval(secs => $1) end
                            and created_at < now() - make_interval(secs => $1) and (lease_token is null or leased_until <= now())
                        limit $2)
                    limit $2
                ))
                    and state = 'pending' and (lease_token is null or leased_until <= now())
                order by id
                for no key update skip locked
            ),
            leased as (
                update jobs
                set attempt = attempt + 1, lease_token = gen_random_uuid(), leased_at = now(),
                    leased_until = now() + make_interval(secs => $3), next_run_at = least(next_run_at, now())
                from overdue
                where jobs.id = any(array[overdue.id])
                returning jobs.id, jobs.attempt, jobs.lease_token, jobs.message_id, overdue.lost_since
            ),
            lost as (
                insert into attempts (job_id, number, started_at)
                select id, attempt - 1, lost_since from leased where lost_since is not null
                on conflict (job_id, number) do nothing
            )
            select leased.id, lease_token as "lease_token!", sha256(m.body) as "digest!"
            from leased cross join lateral (select body from messages where id = leased.message_id limit 1) m"#,
            seconds(deadline),
            i64::from(most),
            seconds(lease),
            scan == Scan::Full,
        )
        .fetch_all(&self.database)
        .await?;
        rows.into_iter()
            .map(|row| {
                let digest = row.digest.try_into().map_err(|_| StoreError::Corrupt("digest"))?;
                Ok((Lease::new(JobId(row.id), row.lease_token, sent_at, lease), digest))
            })
            .collect()
    }
}
