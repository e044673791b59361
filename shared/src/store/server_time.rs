//! Postgres's clock, as a process knows it.

use time::OffsetDateTime;
use tokio::time::Instant;

/// The time of Postgres's clock at one moment, carried on by this process's monotonic clock. The clocks of hosts differ, and what callers
/// and receivers see is counted by one of them only.
#[derive(Clone, Copy, Debug)]
pub struct ServerTime {
    told: OffsetDateTime,
    heard: Instant,
}

impl ServerTime {
    /// Postgres has just said that it is `told`.
    #[must_use]
    pub fn heard(told: OffsetDateTime) -> Self {
        Self { told, heard: Instant::now() }
    }

    /// What Postgres's clock shows now, but for the time that the answer took.
    #[must_use]
    pub fn now(self) -> OffsetDateTime {
        self.told + self.heard.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_goes_on_whatever_the_clock_of_this_host_shows() {
        let told = OffsetDateTime::UNIX_EPOCH;
        let clock = ServerTime::heard(told);
        tokio::time::advance(Duration::from_secs(90)).await;
        assert_eq!(clock.now(), told + Duration::from_secs(90));
    }
}
