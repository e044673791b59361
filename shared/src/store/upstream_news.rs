//! What calls say about the upstream, apart from the outcomes of their messages: that it answers, that it works for nobody, that it asks
//! for a pause. Recorded along with the outcomes (see `sign_finish`), in the row that every claim reads (see `upstream`).

use std::mem::discriminant;
use std::time::Duration;

use tokio::time::Instant;

use super::sign_finish::SignFinish;
use super::{Result, Store, seconds};
use crate::call_error::CallError;
use crate::telemetry::display_chain;

/// What an attempt says about the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamNews {
    /// Nothing.
    None,
    /// It answers: the circuit breaker closes.
    Up,
    /// It works for nobody: the circuit breaker opens.
    Down {
        /// The delay before one call may be tried.
        probe_in: Duration,
        /// Consecutive failures including this one, as far as its claim knew. Calls that were in flight together fail together, and count
        /// once.
        failures: u32,
    },
    /// It asked all callers to wait.
    Pause {
        /// When the pause ends. Not its length: the news may be told late, or again.
        until: Instant,
        /// Whether this was the answer to a probe. If so, the upstream answers, and the circuit breaker closes.
        probed: bool,
    },
    /// It was to be probed, and was not: another worker may probe it at once.
    NotProbed {
        /// Consecutive failures before, as far as the claim knew.
        failures: u32,
    },
}

impl Store {
    /// Records what `finishes` say about the upstream. Like an outcome, news counts only while one of its leases is valid: a worker that
    /// hung must not open or close a circuit breaker that others have probed since. Only a pause is always kept.
    ///
    /// # Errors
    /// If a statement fails. Then some of the news was recorded, or none.
    pub(super) async fn record_upstream_news(&self, finishes: &[SignFinish]) -> Result<()> {
        for news in together(finishes) {
            self.record_one(&news).await?;
        }
        Ok(())
    }

    async fn record_one(&self, News { what, error, jobs, tokens }: &News) -> Result<()> {
        let answers = match *what {
            UpstreamNews::None | UpstreamNews::NotProbed { .. } => false,
            UpstreamNews::Up => true,
            UpstreamNews::Pause { until, probed } => {
                let left = until.saturating_duration_since(Instant::now());
                if !left.is_zero() {
                    sqlx::query!(
                        "-- upstream.pause
                        update upstream set paused_until = greatest(paused_until, now() + make_interval(secs => $1))",
                        seconds(left),
                    )
                    .execute(&self.database)
                    .await?;
                }
                probed
            }
            UpstreamNews::Down { probe_in, failures } => {
                sqlx::query!(
                    "-- upstream.open_breaker
                    update upstream
                    set probe_at = now() + make_interval(secs => $1), breaker_failures = $2, breaker_reason = $3, breaker_at = now()
                    where breaker_failures < $2 and exists (
                        select from unnest($4::bigint[], $5::uuid[]) as l (job, token)
                        cross join lateral (
                            select from jobs j where j.id = l.job and j.lease_token = l.token and j.leased_until > now() limit 1
                        ) held
                    )",
                    seconds(probe_in),
                    i32::try_from(failures).unwrap_or(i32::MAX),
                    error.unwrap_or("unavailable"),
                    jobs,
                    tokens,
                )
                .execute(&self.database)
                .await?;
                false
            }
        };
        if answers {
            sqlx::query!(
                "-- upstream.close_breaker
                update upstream set probe_at = null, breaker_failures = 0, breaker_reason = null, breaker_at = null
                where probe_at is not null and exists (
                    select from unnest($1::bigint[], $2::uuid[]) as l (job, token)
                    cross join lateral (
                        select from jobs j where j.id = l.job and j.lease_token = l.token and j.leased_until > now() limit 1
                    ) held
                )",
                jobs,
                tokens,
            )
            .execute(&self.database)
            .await?;
        }
        Ok(())
    }

    /// Gives back the probes that these finishes did not make. If this fails, others may probe once the leases would have ended.
    pub(super) async fn give_probes_back(&self, written: impl Iterator<Item = &SignFinish>) {
        for finish in written {
            // After its lease, another worker may have claimed the next probe.
            if let UpstreamNews::NotProbed { failures } = finish.upstream
                && !finish.lease.left().is_zero()
            {
                self.give_probe_back(failures).await;
            }
        }
    }

    async fn give_probe_back(&self, failures: u32) {
        let given_back = sqlx::query!(
            "-- upstream.give_probe_back
            update upstream set probe_at = now() where breaker_failures = $1 and probe_at > now()",
            i32::try_from(failures).unwrap_or(i32::MAX),
        )
        .execute(&self.database);
        if let Err(error) = given_back.await {
            tracing::debug!(error = display_chain(&error), "can't give a probe back");
        }
    }
}

/// What some outcomes say about the upstream, and the leases under which they were obtained.
struct News {
    what: UpstreamNews,
    error: Option<&'static str>,
    jobs: Vec<i64>,
    tokens: Vec<uuid::Uuid>,
}

/// What the finishes say about the upstream, each kind of news once: the longest pause, the most failures.
fn together(finishes: &[SignFinish]) -> Vec<News> {
    let mut all: Vec<News> = Vec::new();
    for SignFinish { upstream, error, lease, .. } in finishes.iter().filter(|finish| finish.upstream != UpstreamNews::None) {
        let (what, error, jobs, tokens) = (*upstream, error.map(CallError::code), vec![lease.job.0], vec![lease.token]);
        match all.iter_mut().find(|news| discriminant(&news.what) == discriminant(&what)) {
            None => all.push(News { what, error, jobs, tokens }),
            Some(news) => {
                news.jobs.extend(jobs);
                news.tokens.extend(tokens);
                match (&mut news.what, what) {
                    (UpstreamNews::Pause { until, probed }, UpstreamNews::Pause { until: other, probed: by_other }) => {
                        *until = other.max(*until);
                        *probed |= by_other;
                    }
                    (UpstreamNews::Down { failures: most, .. }, UpstreamNews::Down { failures, .. }) if failures > *most => {
                        (news.what, news.error) = (what, error);
                    }
                    _ => {}
                }
            }
        }
    }
    // News that closes the breaker comes before news that opens it.
    all.sort_by_key(|news| matches!(news.what, UpstreamNews::Down { .. }));
    all
}
