//! Decides which job may send now: divides the calls of this process among receivers.
//!
//! A claimed job has a seat until its outcome is written. More jobs are seated than may call at the same time, so that the claims and
//! writes of some overlap with the calls of others. A call needs a permit of its receiver, and then one of the process. A job that waits
//! for the permit of a slow receiver holds no permit of the process, so it blocks no other receiver.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shared::store::receivers::{Held, ReceiverId, Room, Standing, Wanted};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The number of seats for each call that may be made at the same time. One job calls; the others are being claimed, wait for their turn,
/// or are being written.
const SEATS_PER_CALL: usize = 8;

/// How many calls may be made at the same time.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// To all receivers.
    pub calls: usize,
    /// To one receiver.
    pub per_receiver: usize,
}

/// The seats of a process. Clones share them.
#[derive(Clone, Debug)]
pub struct Seats {
    limits: Limits,
    calls: Arc<Semaphore>,
    receivers: Arc<Mutex<HashMap<ReceiverId, Receiver>>>,
}

#[derive(Debug)]
struct Receiver {
    held: Held,
    calls: Arc<Semaphore>,
}

/// The seat of one job. Dropping it frees it.
#[derive(Debug)]
pub struct Seat {
    receiver: ReceiverId,
    standing: Standing,
    calls: Arc<Semaphore>,
    seats: Seats,
}

/// The right to make one call.
#[derive(Debug)]
pub struct Permit {
    _receiver: OwnedSemaphorePermit,
    _process: OwnedSemaphorePermit,
}

impl Seats {
    /// Creates the seats for `limits`.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, calls: Arc::new(Semaphore::new(limits.calls)), receivers: Arc::default() }
    }

    /// Maximum number of jobs that are seated.
    #[must_use]
    pub fn most_leased(&self) -> usize {
        self.limits.calls * SEATS_PER_CALL
    }

    /// What to claim if there is room for up to `most` jobs: no more jobs of a receiver than it has seats. Receivers that fail or are slow
    /// share two eighths of the calls, unknown receivers three; the receivers of one server have at most half of either. So however many
    /// there are, the others keep their share, and receivers that work have the other three eighths. Of few calls, unknown receivers have
    /// two, and so has one server of them: one that hangs does not keep another one waiting. With fewer than four calls, that may be all of
    /// them.
    #[must_use]
    pub fn wanted(&self, most: usize) -> Wanted {
        let held: Vec<Held> = self.receivers().values().map(|receiver| receiver.held).collect();
        let room = |eighths: usize, least: usize, taken: fn(&Held) -> u32| {
            let all = (self.limits.calls * eighths / 8).max(least.min(self.limits.calls));
            let of_one_server = all.div_ceil(2).max(least).min(all);
            let [all, of_one_server] = [all, of_one_server].map(|count| u32::try_from(count).unwrap_or(u32::MAX));
            Room { in_all: all.saturating_sub(held.iter().map(taken).sum()), of_one_server }
        };
        Wanted {
            most,
            per_receiver: u32::try_from(self.limits.per_receiver * SEATS_PER_CALL).unwrap_or(u32::MAX),
            newcomers: room(3, 2, |held| held.as_new),
            troubled: room(2, 1, |held| held.as_troubled),
            held,
        }
    }

    /// Takes a seat for a job of this receiver, which has this standing.
    #[must_use]
    pub fn take(&self, id: ReceiverId, standing: Standing) -> Seat {
        let new = || Receiver {
            held: Held { receiver: id, jobs: 0, as_new: 0, as_troubled: 0 },
            calls: Arc::new(Semaphore::new(self.limits.per_receiver)),
        };
        let mut receivers = self.receivers();
        let receiver = receivers.entry(id).or_insert_with(new);
        receiver.held.jobs += 1;
        if let Some(of_standing) = of_standing(&mut receiver.held, standing) {
            *of_standing += 1;
        }
        Seat { receiver: id, standing, calls: Arc::clone(&receiver.calls), seats: self.clone() }
    }

    fn receivers(&self) -> MutexGuard<'_, HashMap<ReceiverId, Receiver>> {
        self.receivers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The number of jobs that were claimed while their receiver had this standing. `None` if such jobs are not limited.
fn of_standing(held: &mut Held, standing: Standing) -> Option<&mut u32> {
    match standing {
        Standing::Good => None,
        Standing::New => Some(&mut held.as_new),
        Standing::Troubled => Some(&mut held.as_troubled),
    }
}

impl Seat {
    /// Waits until this job may call.
    pub async fn permit(&self) -> Permit {
        let never_closed = "the semaphores are never closed";
        let receiver = Arc::clone(&self.calls).acquire_owned().await.expect(never_closed);
        let process = Arc::clone(&self.seats.calls).acquire_owned().await.expect(never_closed);
        Permit { _receiver: receiver, _process: process }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut receivers = self.seats.receivers();
        let Some(receiver) = receivers.get_mut(&self.receiver) else { return };
        receiver.held.jobs -= 1;
        if let Some(of_standing) = of_standing(&mut receiver.held, self.standing) {
            *of_standing -= 1;
        }
        if receiver.held.jobs == 0 {
            receivers.remove(&self.receiver);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn seats() -> Seats {
        Seats::new(Limits { calls: 4, per_receiver: 2 })
    }

    fn id(number: u128) -> ReceiverId {
        ReceiverId(uuid::Uuid::from_u128(number))
    }

    #[test]
    fn a_slow_receiver_never_holds_more_calls_than_its_own() {
        let seats = seats();
        let slow: Vec<Seat> = (0..6).map(|_| seats.take(id(1), Standing::Good)).collect();
        let calling: Vec<Option<Permit>> = slow.iter().map(|seat| seat.permit().now_or_never()).collect();
        assert_eq!(calling.iter().flatten().count(), 2);
        let quick: Vec<Seat> = [2, 3].map(|number| seats.take(id(number), Standing::Good)).into();
        let others: Vec<Permit> = quick.iter().filter_map(|seat| seat.permit().now_or_never()).collect();
        assert_eq!(others.len(), 2);
        assert!(seats.take(id(4), Standing::Good).permit().now_or_never().is_none(), "the process has no more");
        drop(others);
        assert!(seats.take(id(4), Standing::Good).permit().now_or_never().is_some());
    }

    #[test]
    fn what_is_seated_is_not_wanted_again_and_what_left_is() {
        let seats = seats();
        let taken = [seats.take(id(1), Standing::Good), seats.take(id(1), Standing::New), seats.take(id(2), Standing::Troubled)];
        let mut wanted = seats.wanted(5);
        wanted.held.sort_by_key(|held| held.jobs);
        let held = |receiver, jobs, as_new, as_troubled| Held { receiver: id(receiver), jobs, as_new, as_troubled };
        assert_eq!(wanted.held, [held(2, 1, 0, 1), held(1, 2, 1, 0)]);
        assert_eq!(wanted.per_receiver, u32::try_from(2 * SEATS_PER_CALL).unwrap());
        assert_eq!((wanted.newcomers.in_all, wanted.troubled.in_all), (1, 0));
        drop(taken);
        let wanted = seats.wanted(5);
        assert!(wanted.held.is_empty() && (wanted.newcomers.in_all, wanted.troubled.in_all) == (2, 1));
    }

    #[test]
    fn however_few_calls_may_be_made_an_unknown_receiver_that_hangs_leaves_one_for_another() {
        let shares = |calls| {
            let wanted = Seats::new(Limits { calls, per_receiver: 1 }).wanted(100);
            [wanted.newcomers, wanted.troubled].map(|room| (room.in_all, room.of_one_server))
        };
        assert_eq!(shares(1), [(1, 1), (1, 1)]);
        for calls in 2..8 {
            assert_eq!(shares(calls), [(2, 2), (1, 1)], "{calls}");
        }
        assert_eq!(shares(8), [(3, 2), (2, 1)]);
        assert_eq!(shares(64), [(24, 12), (16, 8)]);
    }
}
