//! How many calls a sliding window holds: the rule for enforcing and auditing the budget.

use std::collections::VecDeque;
use std::time::Duration;

/// Counts calls in a window that ends now. A window is half-open: two calls exactly one length apart never share one.
#[derive(Clone, Debug)]
pub(super) struct SlidingWindow {
    length: Duration,
    times: VecDeque<Duration>,
}

impl SlidingWindow {
    /// An empty window of this length.
    pub(super) fn new(length: Duration) -> Self {
        Self { length, times: VecDeque::new() }
    }

    /// Adds a call, which must not be earlier than the previous one. Returns the number of calls in the window that ends with it, this one
    /// included.
    pub(super) fn push(&mut self, now: Duration) -> usize {
        while self.times.front().is_some_and(|first| *first + self.length <= now) {
            self.times.pop_front();
        }
        self.times.push_back(now);
        self.times.len()
    }

    /// How long after `now` a call would be within `limit` again, if no other call arrives until then.
    pub(super) fn free_in(&self, limit: usize, now: Duration) -> Duration {
        match self.times.len().checked_sub(limit.max(1)) {
            Some(index) => (self.times[index] + self.length).saturating_sub(now),
            None => Duration::ZERO,
        }
    }
}

/// The largest number of calls in any window of this length. Times must be in ascending order.
pub(super) fn most_in_a_window(times: impl IntoIterator<Item = Duration>, length: Duration) -> usize {
    let mut window = SlidingWindow::new(length);
    times.into_iter().map(|time| window.push(time)).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    #[test]
    fn calls_one_length_apart_do_not_share_a_window() {
        assert_eq!(most_in_a_window([ms(0), ms(100)], ms(100)), 1);
        assert_eq!(most_in_a_window([ms(0), ms(99)], ms(100)), 2);
        assert_eq!(most_in_a_window([], ms(100)), 0);
    }

    #[test]
    fn a_full_window_says_when_the_next_call_fits() {
        let mut window = SlidingWindow::new(ms(100));
        assert_eq!(window.free_in(2, ms(0)), ms(0));
        window.push(ms(0));
        window.push(ms(30));
        assert_eq!(window.free_in(2, ms(40)), ms(60));
        window.push(ms(50));
        assert_eq!(window.free_in(2, ms(50)), ms(80));
    }

    proptest! {
        #[test]
        fn the_audit_agrees_with_counting_every_window(mut times in prop::collection::vec(0u64..2_000, 0..120), length in 1u64..600) {
            times.sort_unstable();
            // Every window that matters starts with a call.
            let brute = times.iter().map(|start| times.iter().filter(|time| (*start..start + length).contains(*time)).count()).max();
            prop_assert_eq!(most_in_a_window(times.iter().copied().map(ms), ms(length)), brute.unwrap_or(0));
        }

        #[test]
        fn waiting_as_told_is_enough_and_no_longer_than_needed(mut times in prop::collection::vec(0u64..500, 1..40), limit in 1usize..8) {
            times.sort_unstable();
            let mut window = SlidingWindow::new(ms(200));
            for time in &times {
                window.push(ms(*time));
            }
            let now = ms(*times.last().unwrap());
            let wait = window.free_in(limit, now);
            prop_assert!(window.clone().push(now + wait) <= limit);
            prop_assert!(wait.is_zero() || window.clone().push(now + wait.saturating_sub(ms(1))) > limit);
        }
    }
}
