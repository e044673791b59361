//! Estimates when a waiting message will be signed, from the queue, the slots and the policy. Pure.
//!
//! A [`Forecast`] is a snapshot of the whole queue. It is read once and answers all questions that come soon after, so that a thousand
//! callers who ask for their place cost one statement.
//!
//! It knows how many messages go first, when each slot is free, and when a retry is due. Whether the next call for a message succeeds is
//! unknown; the forecast is the time of that call.

use std::time::Duration;

use time::OffsetDateTime;

use crate::policy;

/// The sort key of a lane's jobs: when a job is due, and its number.
pub type Turn = (OffsetDateTime, i64);

/// The pending jobs of one lane, in the order in which they are tried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lane {
    /// Some of the jobs, each with its place, counted from 1. The first jobs are all included.
    pub marks: Vec<(Turn, u32)>,
}

impl Lane {
    /// The place of a job with this turn in the lane: exact for the first jobs, approximate between two marks.
    fn place(&self, turn: Turn) -> u32 {
        let before = self.marks.partition_point(|(mark, _)| *mark < turn);
        self.marks.get(before).map_or_else(|| self.length() + 1, |(_, place)| *place)
    }

    /// When the first job is due. `None` if the lane is empty.
    #[must_use]
    pub fn first(&self) -> Option<OffsetDateTime> {
        self.marks.first().map(|((due, _), _)| *due)
    }

    fn length(&self) -> u32 {
        self.marks.last().map_or(0, |(_, place)| *place)
    }
}

/// A snapshot of the queue of sign jobs.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// When the snapshot was taken.
    pub at: OffsetDateTime,
    /// Jobs that were never tried.
    pub fresh: Lane,
    /// Jobs whose message was called for without a signature.
    pub retries: Lane,
    /// When the first slots are free, in ascending order. If there are many slots, not all of them are included.
    pub first_slots: Vec<OffsetDateTime>,
    /// The number of slots. 0 if no worker has started yet.
    pub slots: u32,
    /// How long after its use a slot is free again.
    pub window: Duration,
    /// No call is made before this time: the upstream asked for a pause.
    pub paused_until: OffsetDateTime,
    /// No call but a probe is made before this time: the same, or the upstream is down. Sooner, if a probe says that it is up again.
    pub closed_until: OffsetDateTime,
}

/// A waiting job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Whether the job was never tried.
    pub fresh: bool,
    /// The turn of the job.
    pub turn: Turn,
    /// Whether the job is being tried at this moment.
    pub in_flight: bool,
}

/// A place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Counted from 1.
    pub position: u32,
    /// When a signature is expected.
    pub expected_at: OffsetDateTime,
    /// Nothing is called before this time.
    pub not_before: OffsetDateTime,
}

impl Forecast {
    /// The place of a job.
    #[must_use]
    pub fn place(&self, job: Waiting) -> Place {
        if job.in_flight {
            return Place { position: 1, expected_at: self.at, not_before: self.at };
        }
        let position = if job.fresh {
            self.fresh.place(job.turn)
        } else {
            let rank = self.retries.place(job.turn);
            let behind_all_fresh = self.fresh.length().saturating_add(rank);
            // Retries that have been due for long have a share of the slots to themselves.
            let share = self
                .calls_until(job.turn.0 + self.window * u32::from(policy::RETRY_OVERDUE_WINDOWS))
                .saturating_add(rank.saturating_mul(policy::RETRY_EVERY.into()));
            behind_all_fresh.min(share)
        };
        Place { position, expected_at: self.call(position).max(job.turn.0), not_before: self.paused_until }
    }

    /// The number of waiting jobs, as far as the snapshot reaches.
    #[must_use]
    pub fn length(&self) -> u32 {
        self.fresh.length().saturating_add(self.retries.length())
    }

    /// When the call with this number, counted from 1, is made, if every earlier call is made as soon as a slot is free.
    fn call(&self, number: u32) -> OffsetDateTime {
        let opens = self.closed_until.max(self.at);
        let Some(before) = number.checked_sub(1).filter(|_| self.slots > 0) else { return opens };
        // Slots that were not read are free no sooner than the last one that was.
        let free = self.first_slots.get((before % self.slots) as usize).or(self.first_slots.last());
        free.map_or(opens, |free| opens.max(*free)) + self.window.saturating_mul(before / self.slots)
    }

    /// The number of calls made until `time`.
    fn calls_until(&self, time: OffsetDateTime) -> u32 {
        let seconds = (time - self.at).as_seconds_f64().max(0.0);
        let windows = seconds / self.window.as_secs_f64();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "not negative; a float too large becomes the largest number"
        )]
        let calls = (windows * f64::from(self.slots)) as u32;
        calls
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use time::macros::datetime;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-01-01 00:00 UTC);
    const WINDOW: Duration = Duration::from_mins(1);

    fn lane(length: u32) -> Lane {
        Lane { marks: (1..=length).map(|place| ((NOW, i64::from(place)), place)).collect() }
    }

    fn forecast(fresh: u32, retries: u32) -> Forecast {
        let (fresh, retries) = (lane(fresh), lane(retries));
        Forecast { at: NOW, fresh, retries, first_slots: vec![NOW; 10], slots: 10, window: WINDOW, paused_until: NOW, closed_until: NOW }
    }

    fn seconds(place: Place) -> i64 {
        (place.expected_at - NOW).whole_seconds()
    }

    fn fresh(number: i64) -> Waiting {
        Waiting { fresh: true, turn: (NOW, number), in_flight: false }
    }

    fn retry(number: i64, due_in: u64) -> Waiting {
        Waiting { fresh: false, turn: (NOW + Duration::from_secs(due_in), number), in_flight: false }
    }

    #[test]
    fn ten_go_at_once_and_ten_a_window_later() {
        let places: Vec<(u32, i64)> = [1, 10, 11, 20, 21].map(|n| forecast(60, 0).place(fresh(n))).map(|p| (p.position, seconds(p))).into();
        assert_eq!(places, [(1, 0), (10, 0), (11, 60), (20, 60), (21, 120)]);
    }

    #[test]
    fn slots_that_are_taken_are_waited_for_and_so_is_a_pause() {
        let mut later = forecast(60, 0);
        later.first_slots = (0..10).map(|n| NOW + Duration::from_secs(n * 6)).collect();
        assert_eq!((seconds(later.place(fresh(3))), seconds(later.place(fresh(13)))), (12, 72));
        later.closed_until = NOW + Duration::from_secs(30);
        assert_eq!((seconds(later.place(fresh(1))), seconds(later.place(fresh(10)))), (30, 54));
    }

    #[test]
    fn of_many_slots_the_first_ones_say_enough() {
        let first_slots = vec![NOW, NOW + Duration::from_secs(6)];
        let many = Forecast { slots: 1000, first_slots, ..forecast(3000, 0) };
        let expected = [1, 2, 3, 1000, 1001, 1002].map(|n| seconds(many.place(fresh(n))));
        assert_eq!(expected, [0, 6, 6, 6, 60, 66]);
    }

    #[test]
    fn a_retry_comes_after_what_was_never_tried_and_not_before_it_is_due() {
        let place = forecast(20, 5).place(retry(5, 0));
        assert_eq!((place.position, seconds(place)), (25, 120));
        assert_eq!(seconds(forecast(0, 1).place(retry(1, 40))), 40);
    }

    #[test]
    fn a_retry_behind_a_long_queue_is_tried_in_its_share() {
        let place = forecast(10_000, 1).place(retry(1, 0));
        assert_eq!(place.position, 50 + u32::from(policy::RETRY_EVERY), "five windows of ten calls, and the next fifth one");
    }

    #[test]
    fn what_came_after_the_look_stands_at_the_end() {
        assert_eq!(forecast(7, 0).place(fresh(1000)).position, 8);
        assert_eq!(forecast(0, 0).place(fresh(1)).position, 1);
    }

    proptest! {
        #[test]
        fn nobody_is_expected_before_who_goes_first(
            length in 1u32..200, offsets in prop::collection::vec(0u64..120, 1..20), pause in 0u64..200,
        ) {
            let mut slots: Vec<OffsetDateTime> = offsets.iter().map(|s| NOW + Duration::from_secs(*s)).collect();
            slots.sort();
            // A slot is never taken for longer than a window from now.
            for free in &mut slots {
                *free = (*free).min(NOW + WINDOW);
            }
            let (first_slots, slots) = (slots.clone(), u32::try_from(slots.len()).unwrap());
            let forecast = Forecast { first_slots, slots, closed_until: NOW + Duration::from_secs(pause), ..forecast(length, 0) };
            let times: Vec<_> = (1..=length).map(|n| forecast.place(fresh(n.into())).expected_at).collect();
            prop_assert!(times.is_sorted(), "{times:?}");
            prop_assert!(times[0] >= NOW + Duration::from_secs(pause));
        }
    }
}
