//! Transactions whose caller gives up: nothing of them may be left in the connection that the next one gets.

use std::task::Poll;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::fixture::Fixture;

/// Sooner than Postgres itself ends a session that is idle in a transaction.
const SOON: Duration = Duration::from_secs(3);

const OPEN: &str = "select count(*) from pg_stat_activity where datname = current_database() and state like 'idle in transaction%'";

#[tokio::test]
async fn a_transaction_whose_caller_goes_away_at_any_moment_is_not_left_open() {
    let f = Fixture::new().await;
    let mut cut = 0;
    // An answer that is there at once is no moment at which anybody can go away: so each moment is tried more than once.
    for (_, steps) in (0..40).flat_map(|round| (1..=4).map(move |steps| (round, steps))) {
        let mut left = steps;
        let mut replay = Box::pin(f.store.replay(Uuid::now_v7(), None));
        let done = std::future::poll_fn(|context| {
            if left == 0 {
                return Poll::Ready(None);
            }
            left -= 1;
            replay.as_mut().poll(context).map(Some)
        });
        cut += u32::from(done.await.is_none());
        drop(replay);
        let since = Instant::now();
        while f.number(OPEN).await > 0 {
            assert!(since.elapsed() < SOON, "after {steps} steps a session is left in a transaction");
        }
    }
    assert!(cut > 20, "{cut} were cut off");
}
