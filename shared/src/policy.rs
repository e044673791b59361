//! Decides what to try next: which due jobs take which free slots of the budget.
//!
//! Failures belong to one message and last for minutes. So a message that was never tried is worth more than a retry: it has a fair chance
//! to succeed, and if it does not, its call starts the clock of its outage. First attempts go first, in the order of arrival, then retries
//! by how long they have been due. Retries must not starve while first attempts keep coming. So every [`RETRY_EVERY`]th use of a slot
//! prefers a retry that has been due for [`RETRY_OVERDUE_WINDOWS`] windows. The count is kept in the slot, so this holds for any number of
//! workers, and for a single slot too.
//!
//! The claim (`store::sign_claim`) does this in SQL, with these constants. [`pick`] is a model of it: a test compares the two, and the
//! simulation that the constants were chosen with runs [`pick`]. This module does not depend on the rest of the crate, so that the
//! simulation can include it.

use std::time::Duration;

/// One in this many uses of a slot prefers an overdue retry, so under overload this is the share of retries. With a larger share, first
/// attempts wait for messages that have failed. With a smaller one, the longest wait for a retry grows: at 150 % of capacity for four
/// hours, from 2.1 h (one in five) to 2.8 h (one in eight).
pub const RETRY_EVERY: u16 = 5;

/// A retry is overdue when it has been due for this many windows. A smaller number would spend calls on messages that failed a moment ago
/// while first attempts wait: 60 messages over a minute end at 1.21 times the earliest possible end with none, at 1.16 with four, and at
/// 1.135 with five or more.
pub const RETRY_OVERDUE_WINDOWS: u16 = 5;

/// A due job that is not being worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Due {
    /// When the job became due. All times are relative to one moment that the caller chooses.
    pub at: Duration,
    /// The number of the job. If two jobs became due together, the lower number goes first.
    pub job: i64,
}

/// A free slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The number of the slot.
    pub number: u32,
    /// When the slot became free.
    pub free_at: Duration,
    /// How often the slot was used.
    pub uses: u64,
}

impl Slot {
    /// Whether its next use prefers an overdue retry. The slot's number staggers this: not all slots prefer retries at once.
    fn prefers_retry(&self) -> bool {
        (u64::from(self.number) + self.uses).is_multiple_of(u64::from(RETRY_EVERY))
    }
}

/// Decides which job takes which slot `now`. Returns at most `most` pairs of a job and a slot's number.
///
/// `fresh` are the due jobs that were never tried, `retries` those that were. Both are in order, and no more than `most` of each matter.
/// `slots` are all free slots. `window` is the length of the budget's window.
#[must_use]
pub fn pick(now: Duration, window: Duration, most: usize, fresh: &[Due], retries: &[Due], slots: &[Slot]) -> Vec<(i64, u32)> {
    let room = most.min(slots.len());
    let fresh = &fresh[..fresh.len().min(room)];
    let retries = &retries[..retries.len().min(room)];
    // Slots that have been free longest go first, so that all slots are used equally.
    let mut slots = slots.to_vec();
    slots.sort_unstable_by_key(|slot| (slot.free_at, slot.number));
    slots.truncate(room.min(fresh.len() + retries.len()));
    let overdue = retries.iter().filter(|retry| now.saturating_sub(window * u32::from(RETRY_OVERDUE_WINDOWS)) >= retry.at).count();
    let guaranteed = overdue.min(slots.iter().filter(|slot| slot.prefers_retry()).count());
    let retried = guaranteed.max(slots.len().saturating_sub(fresh.len()));
    slots.sort_unstable_by_key(|slot| slot.number);
    let jobs = retries.iter().take(retried).chain(fresh);
    jobs.zip(slots).map(|(due, slot)| (due.job, slot.number)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_mins(1);
    const NOW: Duration = Duration::from_secs(10_000);

    fn due(jobs: std::ops::Range<i64>, since: Duration) -> Vec<Due> {
        jobs.map(|job| Due { at: NOW.saturating_sub(since), job }).collect()
    }

    /// `count` free slots, of which only the first `preferring` prefer a retry.
    fn slots(count: u32, preferring: u32) -> Vec<Slot> {
        let slot = |n: u32| Slot { number: n, free_at: Duration::ZERO, uses: u64::from(n > preferring) + 5 * 7 - u64::from(n % 5) };
        (1..=count).map(slot).collect()
    }

    fn jobs(picked: &[(i64, u32)]) -> Vec<i64> {
        picked.iter().map(|(job, _)| *job).collect()
    }

    #[test]
    fn first_tries_go_before_retries_that_are_just_due() {
        let picked = pick(NOW, WINDOW, 4, &due(0..3, WINDOW), &due(10..20, WINDOW * 4), &slots(4, 4));
        assert_eq!(jobs(&picked), [10, 0, 1, 2], "one slot is left over");
        let picked = pick(NOW, WINDOW, 4, &due(0..9, WINDOW), &due(10..20, WINDOW * 4), &slots(4, 4));
        assert_eq!(jobs(&picked), [0, 1, 2, 3]);
    }

    #[test]
    fn a_slot_whose_turn_it_is_takes_a_retry_that_is_overdue() {
        let (fresh, retries) = (due(0..9, WINDOW * 100), due(10..20, WINDOW * 5));
        assert_eq!(jobs(&pick(NOW, WINDOW, 4, &fresh, &retries, &slots(4, 1))), [10, 0, 1, 2]);
        assert_eq!(jobs(&pick(NOW, WINDOW, 4, &fresh, &retries, &slots(4, 0))), [0, 1, 2, 3]);
        assert_eq!(jobs(&pick(NOW, WINDOW, 4, &fresh, &retries[..1], &slots(4, 3))), [10, 0, 1, 2], "only one is there");
    }

    #[test]
    fn the_slots_that_were_free_longest_are_taken_and_no_more_than_asked_for() {
        let slot = |number: u32, free: u64| Slot { number, free_at: Duration::from_secs(free), uses: 0 };
        let picked = pick(NOW, WINDOW, 2, &due(0..9, WINDOW), &[], &[slot(1, 30), slot(2, 10), slot(3, 20)]);
        assert_eq!(picked, [(0, 2), (1, 3)]);
        assert!(pick(NOW, WINDOW, 0, &due(0..9, WINDOW), &[], &[slot(1, 30)]).is_empty());
        assert!(pick(NOW, WINDOW, 9, &[], &[], &[slot(1, 30)]).is_empty());
    }
}
