//! Decides which job may send now: divides the calls of this process among receivers.
//!
//! A claimed job has a seat until its outcome is written. More jobs are seated than may call at the same time, so that the claims and
//! writes of some overlap with the calls of others. A call needs a permit of its receiver, and then one of the process. A job that waits
//! for the permit of a slow receiver holds no permit of the process, so it blocks no other receiver.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shared::store::webhook_claim::{ReceiverId, Standing, Wanted};
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
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    receivers: HashMap<ReceiverId, Receiver>,
    newcomers: usize,
    troubled: usize,
}

#[derive(Debug)]
struct Receiver {
    seated: u32,
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
pub struct Call {
    _receiver: OwnedSemaphorePermit,
    _process: OwnedSemaphorePermit,
}

impl Seats {
    /// Creates the seats for `limits`.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, calls: Arc::new(Semaphore::new(limits.calls)), table: Arc::default() }
    }

    /// Maximum number of jobs that are seated.
    #[must_use]
    pub fn most(&self) -> usize {
        self.limits.calls * SEATS_PER_CALL
    }

    /// What to claim if there is room for up to `most` jobs: no more jobs of a receiver than it has seats. Receivers that fail or are slow
    /// share a quarter of the calls, and unknown receivers another quarter. So however many there are of either, the others keep their
    /// share, and receivers that work have half of all calls. Begins with the first receiver.
    #[must_use]
    pub fn wanted(&self, most: usize) -> Wanted {
        let table = self.table();
        let left = |taken| u32::try_from((self.limits.calls / 4).max(1).saturating_sub(taken)).unwrap_or(u32::MAX);
        Wanted {
            most,
            per_receiver: u32::try_from(self.limits.per_receiver * SEATS_PER_CALL).unwrap_or(u32::MAX),
            held: table.receivers.iter().map(|(id, receiver)| (*id, receiver.seated)).collect(),
            newcomers: left(table.newcomers),
            troubled: left(table.troubled),
            after: None,
        }
    }

    /// Takes a seat for a job of this receiver, which has this standing.
    #[must_use]
    pub fn take(&self, id: ReceiverId, standing: Standing) -> Seat {
        let mut table = self.table();
        if let Some(taken) = table.share_of(standing) {
            *taken += 1;
        }
        let new = || Receiver { seated: 0, calls: Arc::new(Semaphore::new(self.limits.per_receiver)) };
        let receiver = table.receivers.entry(id).or_insert_with(new);
        receiver.seated += 1;
        Seat { receiver: id, standing, calls: Arc::clone(&receiver.calls), seats: self.clone() }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// The number of seats taken from the share of receivers with this standing. `None` if their share is not limited.
    fn share_of(&mut self, standing: Standing) -> Option<&mut usize> {
        match standing {
            Standing::Good => None,
            Standing::New => Some(&mut self.newcomers),
            Standing::Troubled => Some(&mut self.troubled),
        }
    }
}

impl Seat {
    /// Waits until this job may call.
    pub async fn call(&self) -> Call {
        let never_closed = "the semaphores are never closed";
        let receiver = Arc::clone(&self.calls).acquire_owned().await.expect(never_closed);
        let process = Arc::clone(&self.seats.calls).acquire_owned().await.expect(never_closed);
        Call { _receiver: receiver, _process: process }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut table = self.seats.table();
        if let Some(taken) = table.share_of(self.standing) {
            *taken -= 1;
        }
        if let Some(receiver) = table.receivers.get_mut(&self.receiver) {
            receiver.seated -= 1;
            if receiver.seated == 0 {
                table.receivers.remove(&self.receiver);
            }
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
        ReceiverId::from(uuid::Uuid::from_u128(number))
    }

    #[test]
    fn a_slow_receiver_never_holds_more_calls_than_its_own() {
        let seats = seats();
        let slow: Vec<Seat> = (0..6).map(|_| seats.take(id(1), Standing::Good)).collect();
        let calling: Vec<Option<Call>> = slow.iter().map(|seat| seat.call().now_or_never()).collect();
        assert_eq!(calling.iter().flatten().count(), 2);
        let quick: Vec<Seat> = [2, 3].map(|number| seats.take(id(number), Standing::Good)).into();
        let others: Vec<Call> = quick.iter().filter_map(|seat| seat.call().now_or_never()).collect();
        assert_eq!(others.len(), 2);
        assert!(seats.take(id(4), Standing::Good).call().now_or_never().is_none(), "the process has no more");
        drop(others);
        assert!(seats.take(id(4), Standing::Good).call().now_or_never().is_some());
    }

    #[test]
    fn what_is_seated_is_not_wanted_again_and_what_left_is() {
        let seats = seats();
        let taken = [seats.take(id(1), Standing::Good), seats.take(id(1), Standing::New), seats.take(id(2), Standing::Troubled)];
        let mut wanted = seats.wanted(5);
        wanted.held.sort_by_key(|(_, jobs)| *jobs);
        assert_eq!(wanted.held, [(id(2), 1), (id(1), 2)]);
        assert_eq!((wanted.per_receiver, wanted.newcomers, wanted.troubled), (u32::try_from(2 * SEATS_PER_CALL).unwrap(), 0, 0));
        drop(taken);
        let wanted = seats.wanted(5);
        assert!(wanted.held.is_empty() && (wanted.newcomers, wanted.troubled) == (1, 1));
    }
}
